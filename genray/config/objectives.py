"""What a base learner minimises: one section an objective, with its published constants as defaults.

`attacks` says how many attacks make its training examples: "none", "one" (the learner's `attack`) or "several" (the
learner's `attacks`, one a norm). Definitions: methods C; code: `genray/objectives/`, one file a method.
"""

from dataclasses import dataclass

from genray.config.fields import option


@dataclass(frozen=True, kw_only=True)
class NaturalObjective:
    """NT: cross-entropy on clean images, mixed up where asked."""

    attacks = "none"
    label_smoothing: float = option(0.0, "share of the target spread over all classes", ge=0, lt=1)
    mixup: float = option(0.0, "alpha of mixup's Beta(alpha, alpha); 0: no mixup", ge=0, le=100)


@dataclass(frozen=True, kw_only=True)
class AdversarialObjective:
    """PGD-AT: beta CE(x', y) + (1 - beta) CE(x, y). FAT is this with an attack that has `tau`."""

    attacks = "one"
    beta: float = option(1.0, "weight of the adversarial loss; 1 is Madry's, 1/2 is half and half", ge=0, le=1)
    label_smoothing: float = option(0.0, "share of the target spread over all classes", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class TradesObjective:
    """TRADES: CE(x, y) + beta KL(p(x) || p(x')), x' against the same KL."""

    attacks = "one"
    beta: float = option(6.0, "weight of the KL term: lambda in the papers' tables, beta in the authors' code", ge=0)
    label_smoothing: float = option(0.0, "share of the target spread over all classes", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class MartObjective:
    """MART: boosted CE(x', y) + beta KL(p(x) || p(x')) (1 - p_y(x))."""

    attacks = "one"
    beta: float = option(5.0, "weight of the misclassification-aware KL term", ge=0)


@dataclass(frozen=True, kw_only=True)
class IatObjective:
    """IAT: mixup of the clean and of the adversarial batch, half and half."""

    attacks = "one"
    alpha: float = option(1.0, "of mixup's Beta(alpha, alpha)", gt=0, le=100)


@dataclass(frozen=True, kw_only=True)
class MaxObjective:
    """MAX: each example by the norm that hurts it most."""

    attacks = "several"


@dataclass(frozen=True, kw_only=True)
class AverageObjective:
    """AVG: mean of the adversarial losses of all norms."""

    attacks = "several"


@dataclass(frozen=True, kw_only=True)
class StochasticObjective:
    """SAT: one norm a batch, drawn uniformly."""

    attacks = "several"


OBJECTIVES = {
    "natural": NaturalObjective,
    "adversarial": AdversarialObjective,
    "trades": TradesObjective,
    "mart": MartObjective,
    "iat": IatObjective,
    "max": MaxObjective,
    "avg": AverageObjective,
    "sat": StochasticObjective,
}
