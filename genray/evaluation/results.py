"""Result records: an accuracy with its interval and its protocol."""

from math import sqrt
from statistics import NormalDist

Z_95 = NormalDist().inv_cdf(0.975)


def wilson_interval(num_correct: int, num_examples: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927).

    Args:
        num_correct: 0..num_examples.
        num_examples: at least 1.

    Returns:
        (low, high), fractions in [0, 1].
    """
    n, p, z = num_examples, num_correct / num_examples, Z_95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not exclude the proportion itself from its interval.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def accuracy(flags) -> dict:
    """An accuracy with its 95 % Wilson interval, all fractions.

    Args:
        flags: (N,), N >= 1; True for correct predictions.
    """
    correct, examples = int(flags.sum()), len(flags)
    low, high = wilson_interval(correct, examples)
    return {"value": correct / examples, "low": low, "high": high, "examples": examples}
