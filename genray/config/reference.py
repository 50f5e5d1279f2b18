"""The reference of all configuration fields, from the JSON Schema: `python -m genray.config reference`."""

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from genray.config.model import WORDS, json_schema, words
from genray.config.schema import RunConfig

HEAD = """# Configuration reference

<!-- Made by `python -m genray.config reference > docs/configuration.md`; a test fails when it is not up to date. -->

One YAML file is one run. Every field of it stands here; `python -m genray.train --dry-run` prints a configuration with
all of them filled in. Any field can be overridden on the command line by its path: `training.epochs=10`,
`base_learners.linf.attack.num_steps=7`, `base_learners.natural=null` (which removes an entry).

- Unquoted, `true`, `false`, `null` and decimal numbers without leading zeros are what they look like (YAML 1.2's rule);
  everything else is text: `no`, `on`, `010`, `0x10`, `1:20` and `2024-11-30` are. The command line and
  `overrides=["key=value"]` in Python follow the same rule; a mapping, `overrides={"training": {"epochs": 10}}` or
  `{"training.epochs": 10}`, takes its values as they are.
- A number may be written as a fraction, `8/255`, and is then exact.
- A *schedule* is a number, or a list of `[position, value]` pairs, linear between them; a position is a fraction of the
  run, from 0 to 1: `[[0, 0.1], [1/2, 0.1], [1, 0]]`.
- *required*: there is no default. `null`: the description says what happens then.
- Pixels are on the scale [0, 1] everywhere.
- Unknown keys, wrong types and combinations that cannot work are all listed at once, one line each, before anything
  starts ([troubleshooting](troubleshooting.md)).
- What each method needs, with an example: [methods](methods/README.md). The embedded default is
  [`digits.yaml`](../genray/config/digits.yaml).
"""


def reference(model: type[BaseModel] = RunConfig) -> str:
    """Returns the page as Markdown: each kind of section once, at its highest place, in the order of the file."""
    root = json_schema(model)
    found = [*_sections(root, root, "")]
    highest = dict(sorted(found, key=lambda section: -section[1].count(".")))
    titles = {name: title for name, title in found if highest[name] == title}
    parts = [HEAD]
    for name, title in titles.items():
        section = root["$defs"][name] if name else root
        parts.append(f"## {title}\n")
        if name and section.get("description"):
            parts.append(f"{' '.join(section['description'].split())}\n")
        parts.append(_table(section, titles))
    return "\n".join(parts)


def fields_page(head: str, files: dict[str, type[BaseModel]]) -> str:
    """Returns the page of the fields of records as Markdown: each kind of record once, where it first stands.

    Args:
        head: its first lines.
        files: title -> record.
    """
    parts, known = [head], {}
    for title, model in files.items():
        root = json_schema(model)
        parts.append(f"## {title}\n\n{_sentence(root)}")
        parts += _records(root, root, "", known, title)
    return "\n".join(parts)


def _sentence(node: dict[str, Any]) -> str:
    text = " ".join(node.get("description", "").split())
    return f"{text}\n" if text else ""


def _records(root: dict[str, Any], node: dict[str, Any], path: str, known: dict[str, str], file: str) -> Iterator[str]:
    """Tables of a record and of those in it that are not known yet."""
    lines, below = ["| field | what | meaning |", "|---|---|---|"], []
    for name, field in node["properties"].items():
        at, inside = f"{path}.{name}".lstrip("."), [*_inside(field)]
        text = words(field).replace("one or more ", "").replace("a list of values", "a list")
        for suffix, ref in inside:
            title = f"`{at}{suffix}` in {file}"
            below += [(ref, title)] if ref not in known else []
            text = f"`{name}{suffix}`: as {known[ref]}" if ref in known else f"`{name}{suffix}`: below"
            known.setdefault(ref, title)
        text += " or null" if inside and {"type": "null"} in field.get("anyOf", []) else ""
        cells = text, field.get("description", "")
        lines.append(f"| `{name}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    yield "\n".join(lines) + "\n"
    for ref, title in below:
        inner = root["$defs"][ref]
        yield f"### {title}\n\n{_sentence(inner)}"
        yield from _records(root, inner, title.split("`")[1], known, file)


def _inside(field: dict[str, Any], suffix: str = "") -> Iterator[tuple[str, str]]:
    """(what follows the field's name, name in $defs) of the records that a field holds."""
    if "$ref" in field:
        yield suffix, field["$ref"].removeprefix("#/$defs/")
    for member in field.get("anyOf", []):
        yield from _inside(member, suffix)
    for key, place in (("items", "[]"), ("additionalProperties", ".<name>")):
        if isinstance(field.get(key), dict):
            yield from _inside(field[key], suffix + place)


def _sections(root: dict[str, Any], node: dict[str, Any], path: str, choice: str = "") -> Iterator[tuple[str, str]]:
    """(name in $defs, title) of a section and of all below it."""
    below = {}
    for name, field in node["properties"].items():
        at = f"{path}.{name}".lstrip(".")
        many = "<name>" if "patternProperties" in str(field) else ""
        for key, tag in _kinds(field):
            below.setdefault(key, (f"{at}.{many}".rstrip("."), tag))
    yield node["title"] if node is not root else "", f"`{path}`{choice}" if path else "The run"
    for key, (at, tag) in below.items():
        yield from _sections(root, root["$defs"][key], at, f", `name: {tag}`" if tag else "")


def _kinds(field: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name in $defs, value of `name` that chooses it or "") of the sections that a field may hold."""
    if "$ref" in field:
        yield field["$ref"].removeprefix("#/$defs/"), ""
    for member in field.get("anyOf", []):
        yield from _kinds(member)
    for inner in field.get("patternProperties", {}).values():
        yield from _kinds(inner)
    tags = {ref: tag for tag, ref in field.get("discriminator", {}).get("mapping", {}).items()}
    yield from ((member["$ref"].removeprefix("#/$defs/"), tags[member["$ref"]]) for member in field.get("oneOf", []))


def _table(section: Any, titles: dict[str, str]) -> str:
    rows = [(name, field) for name, field in section["properties"].items() if "const" not in field]
    if not rows:
        return "No further fields.\n"
    lines = ["| field | what | default | unit | meaning |", "|---|---|---|---|---|"]
    for name, field in rows:
        cells = _what(field, titles), _default(name, field, section), field.get("unit", ""), field["description"]
        lines.append(f"| `{name}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _what(field: dict[str, Any], titles: dict[str, str]) -> str:
    kinds = [*_kinds(field)]
    null = " or null" if {"type": "null"} in field.get("anyOf", []) else ""
    if not kinds:
        ranges = {key: field[key] for key in WORDS if key in field}
        text = words({key: value for key, value in field.items() if key not in WORDS})
        return f"{text},{words({'$comment': '', **ranges})}" if ranges else text
    first, tag = kinds[0]
    link = f"[`{titles[first].split('`')[1]}`](#{_anchor(titles[first])})"
    if tag:
        return f"one of {', '.join(f'`{tag}`' for _, tag in kinds)}, or a section with `name`: {link}{null}"
    return ("name: section, " if "patternProperties" in str(field) else "section ") + link + null


def _anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _default(name: str, field: dict[str, Any], section: Any) -> str:
    if name in section.get("required", []):
        return "*required*"
    if "default" not in field:
        return "its defaults"
    return f"`{yaml.safe_dump(field['default'], default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"
