"""Sections of YAML and JSON files as pydantic models; every mistake becomes one line with its path.

The JSON Schema of a model is the one description of its fields: editors, the reference page and the messages use it.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import cache
from numbers import Integral
from typing import Annotated, Any, Self, TypeVar, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError, core_schema

from genray.config.values import AsTuple, Schedule, number_to_yaml, parse_fraction

ONE_BY_ONE = "fields are checked one by one, not what they may not be together"
RANGES = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
WORDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
UNKNOWN = ("extra_forbidden", "invalid_key")
TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


def option(default: Any, doc: str, unit: str = "", **ranges: Any) -> Any:
    """Declares a field: default (a class or function is called for each object), meaning, unit and range.

    The range (`ge`, `gt`, `le`, `lt`) holds for each number in the field's value.
    """
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, **_described(doc, unit, ranges))


def required(doc: str, unit: str = "", **ranges: Any) -> Any:
    """Declares a field without a default."""
    return Field(**_described(doc, unit, ranges))


def _described(doc: str, unit: str, ranges: dict[str, Any]) -> dict[str, Any]:
    extra = {RANGES[name]: bound for name, bound in ranges.items()} | ({"unit": unit} if unit else {})
    return {"description": doc, "json_schema_extra": extra}


class Described(BaseModel):
    """A mapping of described fields. A subclass may define `problems()`: conflicts between its fields."""

    def problems(self) -> Iterable[str]:
        """Yields "field: message" lines."""
        return ()

    @model_validator(mode="after")
    def _together(self, info: Any) -> Self:
        problems = [] if info.context == ONE_BY_ONE else [*self.problems()]
        if problems:
            raise PydanticCustomError("together", "fields that do not go together", {"problems": problems})
        return self


class Section(Described):
    """A mapping of known keys; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with other values, which are not checked."""
        return self.model_copy(update=changes)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, data: Any) -> Any:
        return {} if data is None else data  # a key without lines below it

    @field_validator("*", mode="after")
    @classmethod
    def _within_range(cls, value: Any, info: Any) -> Any:
        ranges: Any = cls.model_fields[info.field_name].json_schema_extra or {}
        for suffix, held, number in _numbers(value):
            if not _in_range(number, ranges):
                raise PydanticCustomError("range", "out of range", {"suffix": suffix, "given": _as_given(held)})
        return value


def _numbers(value: Any) -> Iterator[tuple[Any, ...]]:
    """(path below the field, what holds the number, number) of each number in a value."""
    if isinstance(value, (int, float, Fraction)) and not isinstance(value, bool):
        yield "", value, value
    elif isinstance(value, Schedule):
        yield from (("", value, number) for number in value.values)
    elif isinstance(value, tuple):
        yield from ((f"[{i}]", *rest) for i, item in enumerate(value) for _, *rest in _numbers(item))
    elif isinstance(value, dict):
        yield from ((f".{key}", *rest) for key, item in value.items() for _, *rest in _numbers(item))


def _as_given(value: Any) -> Any:
    """A number or schedule as YAML holds it."""
    if isinstance(value, Schedule):
        return value.to_yaml()
    return number_to_yaml(parse_fraction(value)) if isinstance(value, (float, Fraction)) else value


def _in_range(number: Any, ranges: dict[str, Any]) -> bool:
    return (
        (not isinstance(number, int) or abs(number) < 2**63)
        and number >= ranges.get("minimum", number)
        and number <= ranges.get("maximum", number)
        and not ("exclusiveMinimum" in ranges and number <= ranges["exclusiveMinimum"])
        and not ("exclusiveMaximum" in ranges and number >= ranges["exclusiveMaximum"])
    )


def _without_nulls(raw: Any) -> Any:
    """An override may remove an entry by null."""
    return {k: v for k, v in raw.items() if v is not None} if isinstance(raw, dict) else raw


def _without_values(raw: Any) -> Any:
    """Returns a mapping as the text of its keys: it is refused, and the message must not quote a password."""
    return f"settings of {', '.join(map(str, raw))}" if isinstance(raw, dict) else raw


def _as_text(raw: Any) -> Any:
    """A whole number is written in one way only, so that it is the text that was meant."""
    return str(raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw


def _as_int(raw: Any) -> Any:
    return int(raw) if isinstance(raw, Integral) and not isinstance(raw, bool) else raw


Text = Annotated[str, BeforeValidator(_as_text)]
AsInt = BeforeValidator(_as_int)  # NumPy's whole numbers too
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
RunName = Annotated[
    Text,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
            "$comment": "text of letters, digits, . _ and -, up to 100",
        }
    ),
]
T = TypeVar("T")
Loggers = Annotated[tuple[T, ...], AsTuple, BeforeValidator(_without_values)]
Entries = Annotated[dict[Name, T], Field(min_length=1), BeforeValidator(_without_nulls)]


class Short:
    """Annotation of a type that may also be written in shorter forms.

    Args:
        forms: JSON Schemas of these forms.
        expand: turns plain data in one of these forms into the long one, and returns all other data as it is.
        words: the type in words, where they are not to be made from the schema.
    """

    def __init__(self, *forms: dict, expand: Callable[[Any], Any], words: str = "") -> None:
        self.forms, self.expand, self.words = forms, expand, words

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [*self.forms, handler(core)], **({"$comment": self.words} if self.words else {})}


OWN_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
OWN_TAG = "package.module:CLASS"
OwnName = Annotated[
    str, Field(pattern=OWN_NAME), WithJsonSchema({"type": "string", "pattern": OWN_NAME, "$comment": OWN_TAG})
]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Refuses what a configuration file cannot hold; the message is better than that of pydantic's JsonValue."""
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            "plain values (text, finite numbers, true, false, null, and lists and mappings of them)"
        ) from None
    return options


Options = Annotated[dict[str, Any], AfterValidator(_plain)]


def choice(*sections: Any, own: Any = None) -> Any:
    """The type of a field that holds one of several sections, told apart by `name`; a name alone takes the defaults.

    Args:
        sections: one a name.
        own: the section of all names `package.module:CLASS`.
    """
    names = [section.model_fields["name"].default for section in sections]
    tags = [*names, *([OWN_TAG] if own else [])]
    named = Short(
        {"enum": names},
        *([{"type": "string", "pattern": OWN_NAME}] if own else []),
        expand=lambda raw: {"name": raw} if isinstance(raw, str) else raw,
        words=f"a section with name: one of {_list(tags)}",
    )
    if own is None:
        return Annotated[Union[sections], Field(discriminator="name"), named]  # noqa: UP007 (as many as there are)
    tagged = tuple(Annotated[section, Tag(tag)] for section, tag in zip((*sections, own), tags))
    return Annotated[Union[tagged], Discriminator(_tag), _ByTag(tags), named]  # noqa: UP007


def _tag(raw: Any) -> Any:
    name = raw.get("name") if isinstance(raw, dict) else getattr(raw, "name", None)
    return OWN_TAG if isinstance(name, str) and ":" in name else name


class _ByTag:
    """Annotation of a union that a function tells apart: its JSON Schema says which section a tag stands for."""

    def __init__(self, tags: list[str]) -> None:
        self.tags = tags

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core)
        mapping = {tag: member["$ref"] for tag, member in zip(self.tags, schema["oneOf"], strict=True)}
        return {**schema, "discriminator": {"mapping": mapping, "propertyName": "name"}}


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def json_schema(model: type[BaseModel]) -> dict:
    """Returns the JSON Schema (draft 2020-12) of a section."""
    return model.model_json_schema(schema_generator=_Untitled)


def collect(model: Any, data: Any) -> tuple[Any, list[str]]:
    """(section, problems): the section is None where a value could not be read.

    Unknown keys, and values that do not go together, do not hinder that, so that all mistakes are listed at once.
    """
    errors = left = _errors(model, data)
    unknown = [error for error in errors if error["type"] in UNKNOWN]
    if unknown:
        data = _without(data, [_key_path(model, error) for error in unknown])
        left = _errors(model, data)
        errors = [*unknown, *left]
    lines = [*dict.fromkeys(line for error in errors for line in _lines(model, error))]
    if any(error["type"] != "together" for error in left):
        return None, lines
    return model.model_validate(data, context=ONE_BY_ONE), lines


def _key_path(model: type[BaseModel], error: Any) -> list[Any]:
    path = _path(model, error["loc"])[0]
    return [*path[:-1], error["input"]] if error["type"] == "invalid_key" else path  # whose place holds it as text


def _errors(model: type[BaseModel], data: Any) -> list[Any]:
    try:
        model.model_validate(data)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _without(data: Any, paths: list[list[Any]]) -> Any:
    """A copy of plain data without the entries at these paths."""
    if not isinstance(data, dict):
        return data
    below = {key: [path[1:] for path in paths if path[0] == key and len(path) > 1] for key in data}
    gone = [path[0] for path in paths if len(path) == 1]
    return {key: _without(value, below[key]) for key, value in data.items() if key not in gone}


def _lines(model: type[BaseModel], error: Any) -> list[str]:
    """The lines of one of pydantic's errors."""
    kind, given, context, loc = error["type"], error["input"], error.get("ctx", {}), error["loc"]
    if kind == "missing" and isinstance(loc[-1], int):  # an item of a list
        kind, loc = "too_short", loc[:-1]
    path, node, above = _path(model, loc)
    at = _join(path)
    if kind == "together":
        return [f"{at}.{problem}" if at else problem for problem in context["problems"]]
    if kind in UNKNOWN:
        known = [name for member in _members(json_schema(model), above) for name in member.get("properties", {})]
        return [f"{at}: unknown key{did_you_mean(path[-1], known)}"]
    if kind == "missing":
        return [f"{at}: missing, expected {words(node)}"]
    if loc and loc[-1] == "[key]":
        return [wrong(at, "names of letters, digits, _ and -", given)]
    if kind == "union_tag_invalid":
        names = node["$comment"].removeprefix("a section with name: ")
        return [wrong(f"{at}.name", names, given["name"], _choices(node))]
    if kind == "range":
        return [wrong(at + context["suffix"], words(node, items=True), context["given"])]
    reason = str(context["error"]) if kind == "value_error" else ""
    return [wrong(at, reason or words(node), given, _choices(node))]


def _path(model: type[BaseModel], loc: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """(keys of the data, JSON Schema of the field, JSON Schema of what holds it) of an error's place."""
    root = json_schema(model)
    node, above, path = root, root, []
    for part in loc:
        if part == "[key]":
            break
        inner, is_key = _child(root, node, part)
        if is_key:
            path.append(part)
            above = node
        if inner is None:
            return path, {} if is_key else node, above
        node = inner
    return path, node, above


def _child(root: dict[str, Any], node: dict[str, Any], part: Any) -> tuple[dict[str, Any] | None, bool]:
    """(schema below a key, whether the key is one of the data's)."""
    members = [*_members(root, node)]
    for member in members:
        if part in member.get("properties", {}):
            return _ranged(member["properties"][part], {}), True
        for inner in _entries(member):
            return _ranged(inner, node), True
        if isinstance(part, int) and member.get("type") == "array":
            items = member.get("prefixItems") or [member.get("items", {})]
            return (None, False) if part >= len(items) > 1 else (_ranged(items[min(part, len(items) - 1)], node), True)
    for member in members:
        mapping = member.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            return {"$ref": mapping[part]}, False
    return None, any("properties" in member for member in members)


def _entries(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema of a mapping's values, as a list of one; empty for anything else."""
    others = node.get("additionalProperties")
    return [*node.get("patternProperties", {}).values(), *([others] if isinstance(others, dict) else [])][:1]


def _ranged(inner: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """The schema of an item with the range of the field that holds it."""
    return {**{key: outer[key] for key in WORDS if key in outer}, **inner}


def _members(root: dict[str, Any], node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and its alternatives, references followed."""
    if "$ref" in node:
        yield from _members(root, root["$defs"][node["$ref"].removeprefix("#/$defs/")])
        return
    yield node
    for member in node.get("anyOf", []):
        yield from _members(root, member)


def _choices(node: dict[str, Any]) -> list[Any]:
    return [value for member in (node, *node.get("anyOf", [])) for value in member.get("enum", [])]


def words(node: dict, items: bool = False) -> str:
    """Describes the type and range of a field.

    Args:
        node: its JSON Schema.
        items: of the numbers in a list or a mapping, not of the whole.
    """
    return _type(node, items) + "".join(f" {word} {node[key]}" for key, word in WORDS.items() if key in node)


def _type(node: dict[str, Any], items: bool = False) -> str:
    if "$comment" in node:
        return node["$comment"]
    if "anyOf" in node:
        members = [member for member in node["anyOf"] if not items or member.get("type") != "null"]
        return " or ".join(dict.fromkeys(words(member, items) for member in members))
    if "const" in node or "enum" in node:
        names = node.get("enum", [node.get("const")])
        return ("one of " if len(names) > 1 else "") + _list(names)
    if "$ref" in node or "properties" in node:
        return "a section of key: value lines"
    if node.get("type") == "object":
        return _type(_entries(node)[0]) if items else "one or more name: value entries"
    if node.get("type") == "array":
        item = (node.get("prefixItems") or [node.get("items", {})])[0]
        of = "numbers" if "number" in str(item) or "integer" in str(item) else "values"
        return _type(item) if items else f"a list of {node.get('maxItems', 'one or more')} {of}"
    kinds = node.get("type", [])
    return " or ".join(TYPES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds)) or "any value"


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))


def wrong(path: str, expected: str, given: Any, known: Iterable[Any] = ()) -> str:
    """Returns the line of a wrong value."""
    from genray.storage import without_secrets  # not above: reading a configuration needs no file systems

    try:
        shown = "null" if given is None else without_secrets(repr(given))
    except ValueError:  # Python's limit on the digits of an integer it prints
        shown = "a number of thousands of digits"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{path}: expected {expected}, got {shown}{did_you_mean(given, known)}"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for a word similar to a known one, else ""."""
    close = difflib.get_close_matches(word, list(known), 1) if isinstance(word, str) else []
    return f" (did you mean {close[0]}?)" if close else ""


def _join(path: Iterable[Any]) -> str:
    text = ""
    for part in path:
        text = f"{text}[{part}]" if isinstance(part, int) else f"{text}.{part}" if text else str(part)
    return text
