"""The shipped presets, as the tests of `test_presets*.py` and `test_paper_presets.py` read them."""

import re
from functools import cache
from pathlib import Path

from genray.config.load import DEFAULT_CONFIG, load_config
from genray.config.schema import RunConfig
from genray.run.plan import make_plan

CONFIGS = Path(__file__).parents[2] / "configs"


def _is_alias(path):
    """A link to another preset, kept for its short name."""
    return path.is_symlink() and path.resolve().is_relative_to(CONFIGS)


FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if not _is_alias(path))
GRIDS = [name for name in FILES if name.startswith(("ablations/", "paper/tables/"))]  # of `genray.tune`, not runs
PRESETS = [name for name in FILES if name not in GRIDS]
ALIASES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if _is_alias(path))
PAPER = [name for name in PRESETS if name.startswith("paper/")]
SECTIONS = "|".join(RunConfig.model_fields)
OVERRIDE = re.compile(rf"'((?:{SECTIONS})[\w.]*=[^']+)'|(?<!\S)((?:{SECTIONS})[\w.]*=\S+)")


def header(name):
    schema, *lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    assert schema.startswith("# yaml-language-server: $schema=")
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def overrides_in(line):
    return [quoted or bare for quoted, bare in OVERRIDE.findall(line)]


def launch_line(name):
    """The header's first command that runs this very file; the embedded default also runs without --config."""
    commands = [line for line in header(name) if line.startswith("python -m genray.")]
    embedded = (CONFIGS / name).resolve() == DEFAULT_CONFIG.resolve()
    own = [line for line in commands if f"configs/{name}" in line.split() or (embedded and "--config" not in line)]
    assert own, f"{name}: no command in its header runs it, only {commands}"
    return own[0]


@cache
def load(name):
    """The preset as its own launch command loads it: some need a path."""
    return load_config(CONFIGS / name, overrides_in(launch_line(name)))


@cache
def plan_of(name, num_train=49_000):
    return make_plan(load(name), num_train)
