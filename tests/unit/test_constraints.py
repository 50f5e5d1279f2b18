"""constraints.txt names one tested version of every package that an install with it brings in, on this platform."""

import re
import tomllib
from importlib import metadata

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINES = (ROOT / "constraints.txt").read_text().split()
PINNED = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LINES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# torch pins its own CUDA packages exactly.
BY_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton|setuptools")


def wanted():
    """Canonical names of all that `pip install -e '.[test]'` would bring, from the installed packages' own words."""
    todo = [Requirement(line) for line in PROJECT["dependencies"]]
    todo += [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
    found = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in found or name == "genray" or BY_TORCH.fullmatch(name):
            continue
        found.add(key)
        try:
            lines = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:  # for another platform, or an extra that is not installed
            continue
        for line in lines:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return {name for name, _ in found}


def test_every_package_of_an_install_has_its_version():
    missing = {name for name in wanted() if name not in PINNED}
    assert {"torch", "ray", "onnxruntime", "pytest"} <= wanted() and missing == set()


def test_the_tested_versions_satisfy_the_project():
    for line in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]:
        requirement = Requirement(line)
        if requirement.name != "genray":
            assert requirement.specifier.contains(PINNED[canonicalize_name(requirement.name)]), line
