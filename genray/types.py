"""The two small records that cross layer boundaries."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: move an image in [0, 1] by at most `epsilon` in `norm`.

    Attributes:
        norm: "linf", "l2" or "l1".
        epsilon: radius on the [0, 1] pixel scale, exact (8/255 and 0.031 are different threat models).
    """

    norm: str
    epsilon: Fraction

    @property
    def radius(self) -> float:
        return float(self.epsilon)

    def __str__(self) -> str:
        return f"{self.norm} {fraction_text(self.epsilon)} ({self.radius:.6g})"

    def record(self) -> dict:
        """{"norm", "epsilon" (exact, as text), "epsilon_decimal"}, as records hold it."""
        return {"norm": self.norm, "epsilon": fraction_text(self.epsilon), "epsilon_decimal": self.radius}

    @classmethod
    def of(cls, record: dict) -> "ThreatModel":
        """From what `record` gave."""
        return cls(record["norm"], Fraction(record["epsilon"]))


@dataclass(frozen=True)
class WeightSnapshot:
    """Weights of one learner at one step, as they travel through the object store.

    Attributes:
        step: number of finished optimiser steps.
        weights: (P,) float32, all parameters followed by all floating-point buffers, without padding.
        counters: (Q,) int64, the integer buffers (BatchNorm's `num_batches_tracked`), likewise.
    """

    step: int
    weights: np.ndarray
    counters: np.ndarray


def ball_names(threats: Iterable[dict]) -> list[str]:
    """What records call each ball: its norm or, where the norm has several radii, norm and radius, "linf_8/255".

    Args:
        threats: threat models as `ThreatModel.record` gives them.
    """
    balls = [(threat["norm"], threat["epsilon"]) for threat in threats]
    radii = Counter(norm for norm, _ in balls)
    return [norm if radii[norm] == 1 else f"{norm}_{radius}" for norm, radius in balls]


def fraction_text(value: Fraction) -> str:
    """An exact number in the form people write it: "8/255", "0.031", "1/3", "3"."""
    if value.denominator == 1:
        return str(value.numerator)
    decimal = repr(float(value))
    if Fraction(decimal) == value:
        return decimal
    if 255 % value.denominator == 0 and value.denominator > 12:
        return f"{value.numerator * (255 // value.denominator)}/255"
    return f"{value.numerator}/{value.denominator}"
