"""docs/configuration.md is complete, and says of each field what loading a configuration does with it."""

import re

import pytest
import yaml
from conftest import ROOT

from genray.config import load_config, to_dict
from genray.config.model import json_schema
from genray.config.schema import RunConfig
from genray.errors import ConfigError

PAGE = ROOT / "docs/configuration.md"
SCHEMA = json_schema(RunConfig)
KINDS = {"": SCHEMA, **{name: kind for name, kind in SCHEMA["$defs"].items() if "properties" in kind}}
FIELDS = {f"{kind}.{name}": f for kind, s in KINDS.items() for name, f in s["properties"].items() if "const" not in f}
# No more than a run has to say; whatever else it holds is a default.
LEAST = {"name": "a", "data": {"source": "mnist"}, "model": {"name": "resnet18"}, "training": {"epochs": 8}}
LEAST["base_learners"] = {"n": {"objective": "natural", "lr": 0.1}}
LEAST["evaluation"] = {"attack": {"norm": "linf", "epsilon": 0.1, "step_size": 0.1}}


def rows():
    """(path of the section, field, what, default) of every row of the page."""
    path = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            path = (re.match(r"## `([^`]*)`", line) or [None, ""])[1] + ("?" if "name:" in line else "")
        elif match := re.match(r"\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*) \|$", line):
            yield path, *match.groups()


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_description_and_a_unit(name):
    assert FIELDS[name]["description"].strip(), "the schema says nothing about it"
    if re.search(r"epochs$|_steps$|_s$|_gib$|examples$|\.epsilon$|\.step_size$|padding$|num_[cg]pus$", name):
        assert FIELDS[name]["unit"]


def test_every_field_has_its_row():
    assert len(list(rows())) == len(FIELDS) > 100
    assert all(meaning.strip() for *_, meaning in rows())


def value_at(path):
    value = to_dict(load_config(LEAST))
    for part in path.split("."):
        value = value[part]
    return value


DERIVED = {"global_learner.mixing_weights", "global_learner.warmup_epochs"}  # filled in from other fields


@pytest.mark.parametrize("row", [r for r in rows() if not re.search(r"[<?]|extra", r[0])], ids=lambda r: r[1])
def test_defaults_are_those_of_a_run_that_says_nothing(row):
    section, name, _, default, *_ = row
    path = f"{section}.{name}".lstrip(".")
    given = LEAST
    for part in path.split("."):
        given = given.get(part) if isinstance(given, dict) else None
    if default.startswith("`") and given is None and path not in DERIVED:
        assert value_at(path) == yaml.safe_load(default.strip("`"))
    elif default == "*required*":
        assert given is not None


BOUND = re.compile(r"(at least|above|at most|below) ([\d.]+)")
BOUNDED = [
    (s, n, *bound) for s, n, what, *_ in rows() if not re.search(r"[?]|extra", s) for bound in BOUND.findall(what)
]


@pytest.mark.parametrize(("section", "name", "side", "bound"), BOUNDED)
def test_what_is_out_of_range_is_refused(section, name, side, bound):
    """The bound itself, where it is outside; else the next number beyond it."""
    value = {"at least": float(bound) - 1, "above": float(bound), "at most": float(bound) + 1, "below": float(bound)}[
        side
    ]
    value = int(value) if value == int(value) else value
    path = f"{section}.{name}".lstrip(".").replace("<name>", "n")
    if "attack." in path and path.startswith("base"):
        learner = {"objective": "adversarial", "lr": 0.1, "attack": {"norm": "linf", "epsilon": 0.1, "step_size": 0.1}}
        source = {**LEAST, "base_learners": {"n": learner}}
    else:
        source = LEAST
    values = [f"{path}={value}", f"{path}=[{value}, {value}]", f"{path}={{n: {value}}}"]
    found = []
    for override in values:
        try:
            load_config(source, [override])
        except ConfigError as error:
            found += error.problems
    limit = rf"{re.escape(path)}[^:]*: expected .*{side} {bound}\b.*, got {value}"
    assert any(re.match(limit, problem) for problem in found), found
