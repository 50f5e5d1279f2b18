"""The configurations of the package: the files of `configs/` in the repository."""

import re
from pathlib import Path

from genray.config.model import did_you_mean
from genray.errors import ConfigError

FOLDER = (Path(__file__).parents[1] / "presets").resolve()
_SCHEMA = "# yaml-language-server: $schema="


def presets() -> dict[str, Path]:
    """Name, such as "paper/cifar10_resnet18_at", -> file."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def first_comment(path: Path) -> str:
    """Returns the first comment of a preset, in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line[1:].strip() for line in lines if line.startswith("#") and not line.startswith(_SCHEMA))


def preset_text(name: str) -> str:
    """A preset for another folder: its schema, and the files that a grid names, are named by absolute paths.

    Raises:
        ConfigError: there is none of this name.
    """
    known = presets()
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in known:
        raise ConfigError(f"NAME: expected one of `genray configs list`, got {name!r}{did_you_mean(name, known)}")
    path = known[name].resolve()

    def absolute(match: re.Match[str]) -> str:
        file = path.parent / match[1]
        return str(file.resolve()) if file.is_file() else match[1]

    schema, _, rest = path.read_text(encoding="utf-8").partition("\n")
    kind = "grid" if "grid.schema" in schema else "run"
    return f"{schema_line(kind)}\n" + re.sub(r"(?<=: )(\S+\.yaml)$", absolute, rest, flags=re.MULTILINE)


def schema_line(kind: str) -> str:
    """The first line of a YAML file, by which an editor finds the schema. `kind`: "run" or "grid"."""
    return f"{_SCHEMA}{Path(__file__).parent / f'{kind}.schema.json'}"
