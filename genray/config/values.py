"""Types of values beyond YAML: exact fractions and piecewise linear schedules."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import core_schema

from genray.types import fraction_text

# Few enough digits that no text, however hostile, makes an exact number that is slow to hold or beyond a float.
# No leading zeros: 010 is ten to one reader and eight to another.
WHOLE = r"(?:0|[1-9]\d{0,39})"
NUMBER = re.compile(rf"([+-]?(?:{WHOLE}(?:\.\d{{0,40}})?|\.\d{{1,40}})(?:[eE][+-]?\d{{1,3}})?)(?:\s*/\s*({WHOLE}))?")
LARGEST = Fraction(10) ** 300
AS_JSON = {"type": ["number", "string"], "pattern": rf"^\s*{NUMBER.pattern}\s*$"}  # "8/255" is a number too


def parse_fraction(value: Any) -> Fraction:
    """Reads 8/255 ("8/255"), 0.031 or 3 without rounding: a decimal is the decimal that was written.

    Raises:
        ValueError: not a finite number in one of these forms.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Fraction)):
        raise ValueError
    match = NUMBER.fullmatch(str(value).strip())
    if match is None or (match[2] and not int(match[2])):
        raise ValueError
    number = Fraction(match[1]) / int(match[2] or 1)
    if abs(number) > LARGEST or (number and not float(number)):
        raise ValueError
    if not NUMBER.fullmatch(fraction_text(number)):  # `config.yaml` has to be readable again
        raise ValueError
    return number


@dataclass(frozen=True)
class Schedule:
    """A piecewise linear function of the position in the run.

    Attributes:
        knots: (position, value) pairs; positions are fractions of the run, 0 to 1, in non-decreasing order. Two
            knots at one position are a jump, and the later value holds there. Constant before the first knot and
            after the last.
    """

    knots: tuple[tuple[Fraction, Fraction], ...]

    @classmethod
    def parse(cls, value: Any) -> "Schedule":
        """Reads a number (constant) or a list of [position, value] pairs.

        Raises:
            ValueError: with the reason, for any other form.
        """
        if not isinstance(value, (list, tuple)):
            return cls(((Fraction(0), parse_fraction(value)),))
        if not value or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in value):
            raise ValueError("a number or a list of [position, value] pairs")
        knots = tuple((parse_fraction(at), parse_fraction(to)) for at, to in value)
        positions = [at for at, _ in knots]
        if positions != sorted(positions) or positions[0] < 0 or positions[-1] > 1:
            raise ValueError("positions from 0 to 1 in non-decreasing order")
        return cls(knots) if len(knots) > 1 else cls(((Fraction(0), knots[0][1]),))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            lambda raw: raw if isinstance(raw, cls) else cls.parse(raw),
            serialization=core_schema.plain_serializer_function_ser_schema(cls.to_yaml),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        pair = {"type": "array", "items": AS_JSON, "minItems": 2, "maxItems": 2}
        pairs = {"type": "array", "items": pair, "minItems": 1}
        return {"anyOf": [AS_JSON, pairs], "$comment": "a number or a list of [position, value] pairs"}

    @property
    def values(self) -> tuple[Fraction, ...]:
        return tuple(value for _, value in self.knots)

    def exact(self, position: Fraction) -> Fraction:
        """Returns the exact value at `position`."""
        before: Any = None
        for at, value in self.knots:
            if at > position:
                if before is None:
                    return value
                return before[1] + (value - before[1]) * (position - before[0]) / (at - before[0])
            before = (at, value)
        return before[1]

    def to_yaml(self) -> Any:
        if len(self.knots) == 1:
            return number_to_yaml(self.knots[0][1])
        return [[number_to_yaml(at), number_to_yaml(value)] for at, value in self.knots]


def number_to_yaml(value: Fraction) -> int | float | str:
    """Returns an exact number in its YAML form: 3, 0.031 or "8/255"."""
    text = fraction_text(value)
    return text if "/" in text else float(text) if any(c in text for c in ".e") else int(text)


# Types of fields: numbers that YAML reads as text ("5e-4", "8/255") are numbers too.
Real = Annotated[
    float,
    PlainValidator(lambda raw: float(parse_fraction(raw))),
    WithJsonSchema({**AS_JSON, "$comment": "a number"}),
]
Exact = Annotated[
    Fraction,
    PlainValidator(parse_fraction),
    PlainSerializer(number_to_yaml),
    WithJsonSchema({**AS_JSON, "$comment": 'a number such as "8/255"'}),
]
AsTuple = BeforeValidator(lambda raw: tuple(raw) if isinstance(raw, list) else raw)
Pair = Annotated[tuple[int, int], AsTuple]
RealPair = Annotated[tuple[Real, Real], AsTuple]
Numbers = Annotated[tuple[Real, ...], AsTuple, Field(min_length=1)]
