"""Turns plain YAML data into the dataclasses of `schema.py` and back, collecting every mistake on the way."""

import dataclasses
import difflib
import os
import re
import types
import typing
from fractions import Fraction
from numbers import Integral

from genray.config.values import Schedule, number_to_yaml, parse_fraction

WRONG = object()  # stands for a value that could not be read; its problem is on the list


def parse_section(cls, raw, path, problems):
    """Reads mapping `raw` as dataclass `cls`; returns it, or WRONG after adding to `problems`."""
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        return _wrong(problems, path, "a section of key: value lines", raw)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            problems.append(f"{_join(path, key)}: unknown key{did_you_mean(key, fields)}")
    values, hints, good = {}, typing.get_type_hints(cls), True
    for name, f in fields.items():
        if name in raw:
            values[name] = _parse_field(f, hints[name], raw[name], _join(path, name), problems)
            good = good and values[name] is not WRONG
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)}: missing, expected {describe(f, hints[name])}")
            good = False
    if not good:
        return WRONG
    section = cls(**values)
    if hasattr(section, "problems"):  # what its fields may not be together
        problems += [f"{path}.{problem}" for problem in section.problems()]
    return section


def _parse_field(f, hint, raw, path, problems):
    if "tagged" in f.metadata:
        return _parse_tagged(f.metadata["tagged"], raw, path, problems)
    return parse_value(hint, f.metadata, raw, path, problems)


def _parse_tagged(choices, raw, path, problems):
    """A section whose key `name` says which dataclass the other keys belong to; a bare name takes its defaults."""
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict) or "name" not in raw:
        return _wrong(problems, path, f"a section with name: one of {', '.join(choices)}", raw)
    name = raw["name"]
    if not isinstance(name, str) or name not in choices:
        return _wrong(problems, f"{path}.name", f"one of {', '.join(choices)}", name, did_you_mean(name, choices))
    return parse_section(choices[name], {k: v for k, v in raw.items() if k != "name"}, path, problems)


def parse_value(hint, checks, raw, path, problems):
    """Reads a value of type `hint` in the range `checks`; returns it, or WRONG after adding to `problems`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return parse_value(args[0], dict(args[1:]), raw, path, problems)
    if origin in (types.UnionType, typing.Union):
        if raw is None and type(None) in args:
            return None
        literals = [c for a in args if typing.get_origin(a) is typing.Literal for c in typing.get_args(a)]
        if isinstance(raw, str) and raw in literals:
            return raw
        others = [a for a in args if a is not type(None) and typing.get_origin(a) is not typing.Literal]
        hint = others[0] if others else next(a for a in args if a is not type(None))
        return parse_value(hint, checks, raw, path, problems)
    if dataclasses.is_dataclass(hint) and hint is not Schedule:
        return parse_section(hint, raw, path, problems)
    if origin is dict:
        return _parse_mapping(args[1], checks, raw, path, problems)
    if origin is tuple:
        return _parse_tuple(args, checks, raw, path, problems)
    return _parse_scalar(hint, checks, raw, path, problems)


def _parse_mapping(hint, checks, raw, path, problems):
    if not isinstance(raw, dict) or not raw:
        return _wrong(problems, path, "one or more name: value entries", raw)
    raw = {key: value for key, value in raw.items() if value is not None}  # an override may remove an entry
    if not raw:
        return _wrong(problems, path, "one or more name: value entries", None)
    names = [key for key in raw if isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key)]
    for key in raw:
        if key not in names:
            _wrong(problems, path, "names of letters, digits, _ and -", key)
    parsed = {key: parse_value(hint, checks, raw[key], _join(path, key), problems) for key in names}
    return WRONG if len(names) < len(raw) or WRONG in parsed.values() else parsed


def _parse_tuple(args, checks, raw, path, problems):
    length = None if args[-1] is Ellipsis else len(args)
    if not isinstance(raw, (list, tuple)) or not raw or (length and len(raw) != length):
        return _wrong(problems, path, f"a list of {length or 'one or more'} numbers", raw)
    items = tuple(parse_value(args[0], checks, item, f"{path}[{i}]", problems) for i, item in enumerate(raw))
    return WRONG if WRONG in items else items


def _parse_scalar(hint, checks, raw, path, problems):
    expected = describe_type(hint) + describe_range(checks)
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if isinstance(raw, str) and raw in choices:
            return raw
        return _wrong(problems, path, expected, raw, did_you_mean(raw, choices))
    try:
        value = READERS[hint](raw)
    except (ValueError, OverflowError) as error:
        reason = str(error) if hint is Schedule and str(error) and not str(error).startswith("Invalid") else ""
        return _wrong(problems, path, reason or expected, raw)
    numbers = value.values if hint is Schedule else (value,)
    if not all(_in_range(number, checks) for number in numbers):
        return _wrong(problems, path, expected, raw)
    return value


def _read_bool(raw):
    if not isinstance(raw, bool):
        raise ValueError(raw)
    return raw


def _read_int(raw):
    if isinstance(raw, bool) or not isinstance(raw, Integral) or abs(raw) >= 2**63:
        raise ValueError(raw)
    return int(raw)


def _read_float(raw):
    return float(parse_fraction(raw))  # PyYAML reads 5e-4 as text


def _read_str(raw):
    if isinstance(raw, int) and not isinstance(raw, bool):
        return str(raw)  # a whole number is written in one way only, so that it is the text that was meant
    if not isinstance(raw, str):
        raise ValueError(raw)
    return raw


def _read_path(raw):
    if not isinstance(raw, (str, os.PathLike)) or not os.fspath(raw):
        raise ValueError(raw)
    return raw


READERS = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    os.PathLike: _read_path,
    Fraction: parse_fraction,
    Schedule: Schedule.parse,
}


def _in_range(value, checks):
    if isinstance(value, str):
        return re.fullmatch(checks.get("pattern", ".*"), value) is not None
    return not (
        ("ge" in checks and value < checks["ge"])
        or ("gt" in checks and value <= checks["gt"])
        or ("le" in checks and value > checks["le"])
        or ("lt" in checks and value >= checks["lt"])
    )


def describe(f, hint):
    """A field's type and range in words."""
    if "tagged" in f.metadata:
        return f"a section with name: one of {', '.join(f.metadata['tagged'])}"
    return describe_type(hint) + describe_range(f.metadata)


def describe_type(hint):
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe_type(a) for a in args)
    if origin is typing.Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(args)
    if origin is dict or (dataclasses.is_dataclass(hint) and hint is not Schedule):
        return "a section of key: value lines"
    if origin is tuple:
        return "a list of numbers"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    names |= {Fraction: 'a number such as "8/255"', Schedule: "a number or a list of [position, value] pairs"}
    names |= {os.PathLike: "a path or URI"}
    return names[hint]


def describe_range(checks):
    """A field's range in words with a space before them; empty where it has none."""
    if "pattern" in checks:
        return " of letters, digits, . _ and -, at most 100"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return "".join(f" {words[check]} {checks[check]}" for check in words if check in checks)


def _wrong(problems, path, expected, got, hint=""):
    try:
        shown = "null" if got is None else repr(got)
    except ValueError:  # Python's limit on the digits of an integer it prints
        shown = "a number of thousands of digits"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    problems.append(f"{path}: expected {expected}, got {shown}{hint}")
    return WRONG


def did_you_mean(word, known) -> str:
    """ " (did you mean X?)" where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), 1) if isinstance(word, str) else []
    return f" (did you mean {close[0]}?)" if close else ""


def _join(path, key):
    return f"{path}.{key}" if path else str(key)


def to_plain(value, tags):
    """The YAML form of a parsed value; `tags` maps a tagged dataclass to its name."""
    if isinstance(value, Schedule):
        return value.to_yaml()
    if isinstance(value, Fraction):
        return number_to_yaml(value)
    if dataclasses.is_dataclass(value):
        plain = {f.name: to_plain(getattr(value, f.name), tags) for f in dataclasses.fields(value)}
        return {"name": tags[type(value)], **plain} if type(value) in tags else plain
    if isinstance(value, dict):
        return {key: to_plain(item, tags) for key, item in value.items()}
    return [to_plain(item, tags) for item in value] if isinstance(value, tuple) else value
