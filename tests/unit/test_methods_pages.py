"""The pages of docs/methods: their configurations load, their links lead somewhere, every objective is there."""

import re

import pytest
import yaml
from conftest import ROOT

from genray.config import load_config
from genray.config.objectives import OBJECTIVES

PAGES = sorted((ROOT / "docs/methods").glob("*.md"))
SNIPPETS = [
    pytest.param(text, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
]


def completed(snippet):
    """A whole configuration around a page's snippet, which may be as little as the lines of one learner."""
    given = yaml.safe_load(f"base_learners:\n  learner:\n{snippet}" if snippet.startswith("    ") else snippet)
    run = {"name": "page", "data": {"source": "cifar10"}, "model": {"name": "resnet18"}, "training": {"epochs": 120}}
    run["evaluation"] = {"attack": {"norm": "linf", "epsilon": "8/255", "step_size": "2/255"}}
    learners = {name: {"lr": 0.1, **learner} for name, learner in given["base_learners"].items()}
    if len(learners) > 1 and "global_learner" not in given:
        run["global_learner"] = {"gamma": 0.5}
    return {**run, **given, "base_learners": learners}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_pages_configuration_loads(snippet):
    given = completed(snippet)
    config = load_config(given)
    assert list(config.base_learners) == list(given["base_learners"])


def test_every_objective_has_a_configuration_on_a_page():
    used = set()
    for snippet in SNIPPETS:
        for learner in completed(snippet.values[0])["base_learners"].values():
            objective = learner["objective"]
            used.add(objective["name"] if isinstance(objective, dict) else objective)
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(name in used or f"| `{name}` (" in text for name in OBJECTIVES)
