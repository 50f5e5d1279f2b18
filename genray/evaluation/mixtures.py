"""Operating points of one run: its averaged base learners mixed again with other weights.

A *mixture* is sum_k w_k theta_k with weights on the simplex (w_k >= 0, sum 1) over the base learners of a finished run,
the same convex combination that theta_g averages over time (methods A1). With one natural and one robust learner w is
(1 - gamma, gamma).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import comb

from genray.config.values import parse_fraction
from genray.core.mixing import weighted_sum
from genray.errors import ConfigError
from genray.types import fraction_text

MOST_MIXTURES = 1000


@dataclass(frozen=True)
class Mixture:
    """A point of the simplex.

    Attributes:
        weights: (learner, exact weight) for every base learner, in the order of the configuration; they sum to 1.
    """

    weights: tuple[tuple[str, Fraction], ...]

    def __str__(self):
        return ",".join(f"{name}={fraction_text(weight)}" for name, weight in self.weights)

    @property
    def key(self) -> str:
        """A file name."""
        return str(self).replace("/", "of")

    @property
    def only(self) -> str | None:
        """The learner that the mixture is, where all weight is on one."""
        return next((name for name, weight in self.weights if weight == 1), None)


def gamma_learner(config) -> str | None:
    """The robust learner whose share is called gamma: there is one beside one natural learner."""
    robust = [name for name, learner in config.base_learners.items() if learner.is_robust]
    return robust[0] if len(robust) == 1 and len(config.base_learners) == 2 else None


def parse_mixtures(text: str, learners, gamma_of: str | None, option: str = "--mixtures") -> list[Mixture]:
    """The points that a text names, each once, in its order.

    Args:
        text: parts between semicolons: `0,0.3,1` values of gamma and `0:1:0.1` ranges of them, both ends included;
            `natural=0.2,linf=0.5,l2=0.3` one point, learners left out have weight 0; `grid:0.25` all points of the
            simplex whose weights are multiples of that.
        learners: names of the base learners, in the order of the configuration.
        gamma_of: the learner whose weight gamma is; None where there is no such thing.
        option: what messages call the text.

    Raises:
        ConfigError: each mistake is one line.
    """
    learners, problems, found = tuple(learners), [], []
    if len(learners) < 2:
        raise ConfigError(f"{option}: expected a run of at least two base learners, this one has {', '.join(learners)}")
    for part in text.split(";"):
        try:
            found += _part(part.strip(), learners, gamma_of)
        except _Wrong as problem:
            problems.append(f"{option}: {problem}")
    if not problems and len(found) > MOST_MIXTURES:
        problems.append(f"{option}: expected at most {MOST_MIXTURES} mixtures, got {len(found)}")
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(found))


class _Wrong(ValueError):
    """What is wrong with a part of the text."""


def _part(part, learners, gamma_of):
    if part.startswith("grid:"):
        return _grid(part, learners)
    if "=" in part:
        return [_point(part, learners)]
    if gamma_of is None:
        example = ",".join(f"{name}={Fraction(int(i == 0))}" for i, name in enumerate(learners))
        raise _Wrong(
            f"expected points such as {example} or grid:0.25, because gamma is for one natural and one robust "
            f"learner and this run has {', '.join(learners)}, got {part!r}"
        )
    gammas = [gamma for word in part.split(",") for gamma in _gammas(word.strip())]
    return [_mixture({gamma_of: g} | {n: 1 - g for n in learners if n != gamma_of}, learners) for g in gammas]


def _mixture(weights, learners):
    return Mixture(tuple((name, Fraction(weights.get(name, 0))) for name in learners))


def _gammas(word):
    if ":" not in word:
        return [_share(word)]
    ends = re.fullmatch(r"([^:]+):([^:]+):([^:]+)", word)
    if not ends:
        raise _Wrong(f"expected a range START:STOP:STEP such as 0:1:0.1, got {word!r}")
    start, stop, step = (_share(end, word) for end in ends.groups())
    if step == 0 or stop < start or (stop - start) % step:
        raise _Wrong(f"expected a range that goes from START in steps above 0 exactly to STOP, got {word!r}")
    count = int((stop - start) / step) + 1
    _check_count(count, word)
    return [start + i * step for i in range(count)]


def _point(part, learners):
    weights = {}
    for pair in part.split(","):
        name, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or name not in learners:
            raise _Wrong(f"expected LEARNER=WEIGHT with learners {', '.join(learners)}, got {pair.strip()!r}")
        if name in weights:
            raise _Wrong(f"expected each learner once, got {name} twice in {part!r}")
        weights[name] = _share(value, pair.strip())
    if sum(weights.values()) != 1:
        raise _Wrong(f"expected weights that sum to 1, got {fraction_text(sum(weights.values()))} for {part!r}")
    return _mixture(weights, learners)


def _grid(part, learners):
    step = _share(part.removeprefix("grid:"), part)
    if step == 0 or step.numerator != 1:
        raise _Wrong(f"expected a grid whose step is 1 over a whole number, such as grid:0.25, got {part!r}")
    parts = step.denominator
    _check_count(comb(parts + len(learners) - 1, len(learners) - 1), part)
    counts = [()]
    for _ in learners[1:]:
        counts = [(*taken, n) for taken in counts for n in range(parts - sum(taken) + 1)]
    whole = [(parts - sum(taken), *taken) for taken in counts]
    return [_mixture(dict(zip(learners, (Fraction(n, parts) for n in taken))), learners) for taken in whole]


def _check_count(count, part):
    if count > MOST_MIXTURES:
        raise _Wrong(f"expected at most {MOST_MIXTURES} mixtures, got {count} from {part!r}")


def _share(text, whole=None):
    try:
        value = parse_fraction(text)
    except ValueError:
        value = None
    if value is None or not 0 <= value <= 1:
        raise _Wrong(f"expected numbers from 0 to 1, got {whole or text!r}")
    return value


def mix(states: dict, mixture: Mixture, counters_of: str) -> dict:
    """The state dict of a mixture: parameters and BatchNorm statistics alike, one weighted sum each.

    Args:
        states: learner -> state dict, all of one architecture; not changed.
        mixture: the weights.
        counters_of: the learner whose integer buffers (BatchNorm's step counters) are taken, as for theta_g.
    """
    weights = [float(weight) for _, weight in mixture.weights]
    parts = [states[name] for name, _ in mixture.weights]
    return {
        key: weighted_sum([part[key] for part in parts], weights) if value.is_floating_point() else value.clone()
        for key, value in states[mixture.only or counters_of].items()
    }
