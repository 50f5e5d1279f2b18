"""Operating points of one run: its averaged base learners mixed again with other weights.

A *mixture* is sum_k w_k theta_k with weights on the simplex (w_k >= 0, sum 1) over the base learners of a finished run,
the same convex combination that theta_g averages over time (methods A1). With one natural and one robust learner w is
(1 - gamma, gamma).
"""

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
        """The learner that has all weight, or None."""
        return next((name for name, weight in self.weights if weight == 1), None)


def gamma_learner(config) -> str | None:
    """The robust learner whose weight is called gamma, if the run has one natural and one robust learner."""
    robust = [name for name, learner in config.base_learners.items() if learner.is_robust]
    return robust[0] if len(robust) == 1 and len(config.base_learners) == 2 else None


def parse_mixtures(text: str, learners, gamma_of: str | None, option: str = "--mixtures") -> list[Mixture]:
    """The points of a text, each once, in its order.

    Args:
        text: parts between semicolons: `0,0.3,1` values of gamma and `0:1:0.1` ranges of them, both ends included;
            `natural=0.2,linf=0.5,l2=0.3` one point, learners left out have weight 0; `grid:0.25` all points of the
            simplex whose weights are multiples of that.
        learners: names of the base learners, in the order of the configuration.
        gamma_of: the learner whose weight is gamma, or None.
        option: name of the text in messages.

    Raises:
        ConfigError: each mistake is one line.
    """
    learners, problems, found = tuple(learners), [], []
    if len(learners) < 2:
        raise ConfigError(f"{option}: expected a run of at least two base learners, this one has {', '.join(learners)}")
    for part in map(str.strip, text.split(";")):
        parse = _grid if part.startswith("grid:") else _point if "=" in part else _gammas
        try:
            weights = parse(part, learners, gamma_of)
        except ValueError as problem:
            problems.append(f"{option}: {problem}")
        else:
            found += [Mixture(tuple((name, Fraction(w.get(name, 0))) for name in learners)) for w in weights]
    if not problems and len(found) > MOST_MIXTURES:
        problems.append(f"{option}: expected at most {MOST_MIXTURES} mixtures, got {len(found)}")
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(found))


def _gammas(part, learners, gamma_of):
    if gamma_of is None:
        example = ",".join(f"{name}={int(i == 0)}" for i, name in enumerate(learners))
        raise ValueError(
            f"expected points such as {example} or grid:0.25, because gamma is for one natural and one robust "
            f"learner and this run has {', '.join(learners)}, got {part!r}"
        )
    gammas = []
    for word in map(str.strip, part.split(",")):
        start, *rest = (_weight(end, word) for end in word.split(":"))
        if rest and (len(rest) != 2 or rest[1] == 0 or rest[0] < start or (rest[0] - start) % rest[1]):
            raise ValueError(f"expected a range START:STOP:STEP such as 0:1:0.1 that ends at STOP, got {word!r}")
        count = int((rest[0] - start) / rest[1]) + 1 if rest else 1
        _check_count(count, word)
        gammas += [start + i * rest[1] if i else start for i in range(count)]
    (other,) = (name for name in learners if name != gamma_of)
    return [{gamma_of: gamma, other: 1 - gamma} for gamma in gammas]


def _point(part, learners, gamma_of):
    weights = {}
    for pair in map(str.strip, part.split(",")):
        name, equals, value = map(str.strip, pair.partition("="))
        if not equals or name not in learners:
            raise ValueError(f"expected LEARNER=WEIGHT with learners {', '.join(learners)}, got {pair!r}")
        if name in weights:
            raise ValueError(f"expected each learner once, got {name} twice in {part!r}")
        weights[name] = _weight(value, pair)
    if sum(weights.values()) != 1:
        raise ValueError(f"expected weights that sum to 1, got {fraction_text(sum(weights.values()))} for {part!r}")
    return [weights]


def _grid(part, learners, gamma_of):
    step = _weight(part.removeprefix("grid:"), part)
    if step.numerator != 1:
        raise ValueError(f"expected a grid whose step is 1 over a whole number, such as grid:0.25, got {part!r}")
    parts = step.denominator
    _check_count(comb(parts + len(learners) - 1, len(learners) - 1), part)
    points = [()]
    for _ in learners[1:]:
        points = [(*point, n) for point in points for n in range(parts - sum(point) + 1)]
    return [dict(zip(learners, (Fraction(n, parts) for n in (parts - sum(point), *point)))) for point in points]


def _check_count(count, part):
    if count > MOST_MIXTURES:
        raise ValueError(f"expected at most {MOST_MIXTURES} mixtures, got {count} from {part!r}")


def _weight(text, whole):
    try:
        value = parse_fraction(text)
    except ValueError:
        value = None
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"expected numbers from 0 to 1, got {whole!r}")
    return value


def mix(states: dict, mixture: Mixture, counters_of: str) -> dict:
    """The state dict of a mixture: parameters and BatchNorm statistics alike, one weighted sum each.

    Args:
        states: learner -> state dict, all of one architecture; not changed.
        mixture: the weights.
        counters_of: the learner whose integer buffers (BatchNorm's step counters) are copied, as for theta_g.
    """
    weights = [float(weight) for _, weight in mixture.weights]
    parts = [states[name] for name, _ in mixture.weights]
    return {
        key: weighted_sum([part[key] for part in parts], weights) if value.is_floating_point() else value.clone()
        for key, value in states[mixture.only or counters_of].items()
    }


def pareto(points) -> list[tuple]:
    """The points that no other one dominates in both coordinates, from left to right."""
    return sorted({p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)})
