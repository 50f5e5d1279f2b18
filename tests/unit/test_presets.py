"""Every shipped preset loads, says how to run it and marks where each of its facts is from."""

import re
from pathlib import Path

import pytest
import yaml
from presets import ALIASES, CONFIGS, PAPER, PRESETS, header, launch_line, load, overrides_in

from genray.config.load import load_config, to_yaml

RECIPES = ["imagenet_convnext_tiny_at.yaml", "imagenet_resnet50_generalist.yaml", "cifar10_wrn28_10_edm.yaml"]
MARK = re.compile(r"\[([A-Za-z][A-Za-z+, -]*)\]")


def test_the_name_in_the_readme_is_the_papers_preset():
    assert "cifar10_resnet18_generalist.yaml" in ALIASES
    for name in ALIASES:
        assert (CONFIGS / name).resolve() == CONFIGS / "paper" / Path(name).name


@pytest.mark.parametrize("name", PRESETS)
def test_header_examples_are_valid_overrides(name):
    launch = overrides_in(launch_line(name))
    own = [line for line in header(name) if all(word.endswith(name) for word in line.split() if ".yaml" in word)]
    examples = [line for line in own if overrides_in(line)]
    assert examples, f"{name}: expected an example override in its header"
    for line in examples:
        before = [] if line.startswith("python -m") else launch
        changed = load_config(CONFIGS / name, [*before, *overrides_in(line)])
        assert changed != load(name) or line == launch_line(name)


@pytest.mark.parametrize("name", PRESETS)
def test_loads_and_round_trips(name):
    config = load(name)
    text = to_yaml(config)
    again = load_config(yaml.safe_load(text))
    assert again == config and to_yaml(again) == text


@pytest.mark.parametrize("name", PRESETS)
def test_run_name_is_the_file_name(name):
    assert load(name).name == Path(name).stem


@pytest.mark.parametrize("name", [*PAPER, *RECIPES])
def test_every_fact_says_where_it_is_from(name):
    """Each value carries a mark, and the header says what the marks mean."""
    text = (CONFIGS / name).read_text(encoding="utf-8")
    explained = set(re.findall(MARK.pattern + ":", "\n".join(header(name))))
    body = text[text.index("\nname:") + 1 :].splitlines()
    valued = [line for line in body if re.match(r" *\w+: *[^ #]", line) and not line.startswith("name:")]
    unmarked = [line for line in valued if not MARK.search(line.partition("#")[2])]
    assert [line.split(":")[0].strip() for line in unmarked] in ([], ["sync_unit"])  # of one learner: nothing to choose
    used = {mark for line in body for marks in MARK.findall(line.partition("#")[2]) for mark in marks.split(", ")}
    assert used <= explained
