"""The reference of all configuration fields, made from the schema: `python -m genray.config.reference FILE`."""

import dataclasses
import sys
import types
import typing
from pathlib import Path

from genray.config.parse import describe_range, describe_type
from genray.config.schema import RunConfig
from genray.config.values import Schedule

HEAD = """# Configuration reference

<!-- Made by `python -m genray.config.reference docs/configuration.md`; a test fails when it is not up to date. -->

One YAML file is one run. Every field of it stands here; `python -m genray.train --dry-run` prints a configuration with
all of them filled in. Any field can be overridden on the command line by its path: `training.epochs=10`,
`base_learners.linf.attack.num_steps=7`, `base_learners.natural=null` (which removes an entry).

- Unquoted, `true`, `false`, `null` and decimal numbers without leading zeros are what they look like (YAML 1.2's rule);
  everything else is text: `no`, `on`, `010`, `0x10`, `1:20` and `2024-11-30` are. The command line and
  `overrides=["key=value"]` in Python follow the same rule; a mapping, `overrides={"training": {"epochs": 10}}` or
  `{"training.epochs": 10}`, takes its values as they are.
- A number may be written as a fraction, `8/255`, and is then exact.
- A *schedule* is a number, or a list of `[position, value]` pairs, linear between them; a position is a share of the
  run, from 0 to 1: `[[0, 0.1], [1/2, 0.1], [1, 0]]`.
- *required*: there is no default. `null`: the description says what happens then.
- Pixels are on the scale [0, 1] everywhere.
- Unknown keys, wrong types and combinations that cannot work are all listed at once, one line each, before anything
  starts ([troubleshooting](troubleshooting.md)).
- What each method needs, with an example: [methods](methods/README.md). The embedded default is
  [`digits.yaml`](../genray/config/digits.yaml).
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
    """A section of the YAML file.

    Attributes:
        path: where it stands; `<name>` is a name that the user chooses.
        choice: the value of its key `name` where that chooses among several kinds of section, else empty.
        kind: its dataclass.
    """

    path: str
    choice: str
    kind: type

    @property
    def title(self):
        return f"`{self.path}`" + (f", `name: {self.choice}`" if self.choice else "") if self.path else "The run"

    @property
    def note(self):
        """What the section is about, where its dataclass says so."""
        written = not (self.kind.__doc__ or "").startswith(f"{self.kind.__name__}(")  # that is dataclass's own
        return " ".join(self.kind.__doc__.split()) if written else ""


def sections() -> list[Section]:
    """Every kind of section once, where it stands highest, in the order of the file."""
    found = list(_walk(RunConfig))
    place = {}
    for section in sorted(found, key=lambda section: section.path.count(".")):
        place.setdefault(section.kind, section)
    return [section for section in found if place[section.kind] is section]


def _walk(kind, path="", choice=""):
    yield Section(path, choice, kind)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = f"{path}.{field.name}".lstrip(".")
        section, many = _section_of(hints[field.name])
        held = field.metadata.get("tagged", {} if section is None else {"": section})
        for name, below in held.items():
            yield from _walk(below, f"{inner}.<name>" if many else inner, name)


def _section_of(hint):
    """(dataclass that a hint holds, whether under free names); (None, False) for plain values."""
    for part in typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,):
        if typing.get_origin(part) is dict:
            return _section_of(typing.get_args(part)[1])[0], True
        if dataclasses.is_dataclass(part) and part is not Schedule:
            return part, False
    return None, False


def reference() -> str:
    """The page as Markdown."""
    found = sections()
    links = {section.kind: f"[`{section.path}`](#{_anchor(section.title)})" for section in found}
    parts = [HEAD]
    for section in found:
        parts.append(f"## {section.title}\n")
        if section.note:
            parts.append(f"{section.note}\n")
        parts.append(_table(section.kind, links) if dataclasses.fields(section.kind) else "No further fields.\n")
    return "\n".join(parts)


def _anchor(title):
    """GitHub's anchor of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _table(kind, links):
    hints = typing.get_type_hints(kind)
    lines = ["| field | what | default | unit | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        cells = _kind(field, hints[field.name], links), _default(field), field.metadata.get("unit", "")
        cells = [cell.replace("|", "\\|") for cell in (*cells, field.metadata["doc"])]
        lines.append(f"| `{field.name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kind(field, hint, links):
    if "tagged" in field.metadata:
        names = ", ".join(f"`{name}`" for name in field.metadata["tagged"])
        first = next(iter(field.metadata["tagged"].values()))
        return f"one of {names}, or a section with `name`: {links[first]}"
    section, many = _section_of(hint)
    if section is not None:
        nothing = " or null" if type(None) in typing.get_args(hint) else ""
        return ("name: section, " if many else "section ") + links[section] + nothing
    text, limits = describe_type(hint), describe_range(field.metadata)
    text = text.replace("a section of key: value lines", "name: value entries")
    return f"{text},{limits}" if limits else text


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return "its defaults"
    if field.default is dataclasses.MISSING:
        return "*required*"
    value = field.default
    if isinstance(value, bool) or value is None:
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
