"""The JSON Schemas of runs and grids, as an independent validator understands them: what an editor would underline."""

import copy
import json
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml
from conftest import ROOT
from presets import CONFIGS, GRIDS, PRESETS

from genray.config import load_config, to_dict
from genray.config.load import parse_yaml

VALIDATORS = {}
for kind in ("run", "grid"):
    schema = json.loads((CONFIGS / f"{kind}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    VALIDATORS[kind] = jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(("command", "name"), [("schema", "run"), ("grid-schema", "grid")])
def test_the_files_are_what_the_command_writes(command, name):
    line = [sys.executable, "-m", "genray.config", command]
    written = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert written == (CONFIGS / f"{name}.schema.json").read_text(), f"run: {' '.join(line[1:])}"


@pytest.mark.parametrize("name", [*PRESETS, *GRIDS])
def test_every_shipped_file_names_its_schema_and_satisfies_it(name):
    path = (CONFIGS / name).resolve()
    text = path.read_text(encoding="utf-8")
    named = path.parent / text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert named.resolve() == (CONFIGS / f"{'grid' if name in GRIDS else 'run'}.schema.json").resolve()
    content = {key: value for key, value in parse_yaml(text, name).items()}
    assert list(VALIDATORS["grid" if name in GRIDS else "run"].iter_errors(content)) == []


def test_a_resolved_configuration_satisfies_the_schema():
    resolved = yaml.safe_load(json.dumps(to_dict(load_config())))
    assert list(VALIDATORS["run"].iter_errors(resolved)) == []


DIGITS = to_dict(load_config())
LINF = "base_learners.linf"
# Path and wrong value; the validator must complain about exactly that path (or, of a key, about its section).
WRONG_RUNS = [
    ("name", "../x"), ("seed", -1), ("seed", "zero"), ("seed", 1.5), ("device", "gpu"), ("sed", 1),
    ("data.source", "cifar"), ("data.download", "yes"), ("data.image_size", [8]), ("data.image_size", [8, "x"]),
    ("data.validation_examples", -3), ("data.pth", "x"), ("model.name", "resnet"), ("model.mean", ["a"]),
    ("model.width", 0), ("training.epochs", 0), ("training.epochs", True), ("training.schedules_by", "batch"),
    (f"{LINF}.attack.norm", "l3"), (f"{LINF}.attack.epsilon", "8/255th"), (f"{LINF}.attack.epsilon", -1),
    (f"{LINF}.attack.num_steps", 0.5), (f"{LINF}.lr", "fast"), (f"{LINF}.lr", [[0, 1], [1]]), (f"{LINF}.lr", None),
    (f"{LINF}.objective", "adverserial"), (f"{LINF}.optimizer.momentum", 1), (f"{LINF}.workers", "many"),
    ("global_learner.sync_unit", "epochs"), ("evaluation.select_on", "train"), ("compute.precision", "fp16"),
    ("runtime.max_failures", -1), ("base_learners", {}), ("base_learners", []),
]  # fmt: skip
WRONG_GRIDS = [
    ("mode", "best"), ("seeds", []), ("seeds", [-1]), ("grid", {"a.b": []}), ("choices", {"a": 3}), ("methods", 3),
    ("uniform", {"a": [1]}), ("scheduler", "pbt"), ("scheduler", {"name": "asha", "grace": 1}), ("samples", 0),
    ("evaluate", {"attacks": "aa"}), ("loggers", {"comet": {}}), ("loggers", ["comet"]), ("gird", {}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG_RUNS, ids=str)
def test_a_wrong_run_is_underlined_where_it_is_wrong(path, value):
    content = copy.deepcopy(DIGITS)
    *sections, key = path.split(".")
    node = content
    for section in sections:
        node = node[section]
    node[key] = value
    places = [".".join(map(str, error.absolute_path)) for error in VALIDATORS["run"].iter_errors(content)]
    assert places and all(place and path.startswith(place) or place.startswith(path) for place in places if place)


@pytest.mark.parametrize(("key", "value"), WRONG_GRIDS, ids=str)
def test_a_wrong_grid_is_underlined(key, value):
    assert not VALIDATORS["grid"].is_valid({key: value})
    assert VALIDATORS["grid"].is_valid({})


FIELDS = {
    f"{kind}.{name}": field
    for kind, section in {"": VALIDATORS["run"].schema, **VALIDATORS["run"].schema["$defs"]}.items()
    for name, field in section.get("properties", {}).items()
    if "const" not in field
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_description_and_a_unit(name):
    assert FIELDS[name]["description"].strip(), "the schema says nothing about it"
    if re.search(r"epochs$|_steps$|_s$|_gib$|examples$|\.epsilon$|\.step_size$|padding$|num_[cg]pus$", name):
        assert FIELDS[name]["unit"]
