"""What a base learner minimises: one section an objective, with its published constants as defaults.

`attacks` says how many attacks make its training examples: "none", "one" (the learner's `attack`) or "several" (the
learner's `attacks`, one a norm); `needs_pseudo_labels`, that it is for data with pseudo-labels. Definitions: methods C;
code: `genray/objectives/`, one file a method.
"""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

from genray.config.model import Options, OwnName, Section, Text, choice, option, required
from genray.config.values import Pair, Real


class NaturalObjective(Section):
    """NT: cross-entropy on clean images, mixed up where asked."""

    name: Literal["natural"] = "natural"
    attacks: ClassVar[str] = "none"
    label_smoothing: Real = option(0.0, "fraction of the target spread over all classes", ge=0, lt=1, unit="fraction")
    mixup: Real = option(0.0, "alpha of mixup's Beta(alpha, alpha); 0: no mixup", ge=0, le=100)


class AdversarialObjective(Section):
    """PGD-AT: beta CE(x', y) + (1 - beta) CE(x, y). FAT is this with an attack that has `tau`."""

    name: Literal["adversarial"] = "adversarial"
    attacks: ClassVar[str] = "one"
    beta: Real = option(1.0, "weight of the adversarial loss; 1 is Madry's, 1/2 is half and half", ge=0, le=1)
    label_smoothing: Real = option(0.0, "fraction of the target spread over all classes", ge=0, lt=1, unit="fraction")


class AnchorTarget(Section):
    """The target network of objective anchor: a base learner's averaged weights, or a model file."""

    learner: Text | None = option(None, "another base learner; its averaged weights of the end of each epoch")
    model: Text | None = option(None, "a model file or a run folder of genray's, or its URI; any architecture")

    def problems(self) -> Iterable[str]:
        if self.learner and self.model:
            yield "model: has no effect with target.learner; expected one of them"
        elif not (self.learner or self.model):
            yield "learner: missing, expected another base learner (or a model file, as target.model)"


class AnchorObjective(Section):
    """Anchored training: the logits at x' are regressed on the logits of a target network at x."""

    name: Literal["anchor"] = "anchor"
    attacks: ClassVar[str] = "one"
    target: AnchorTarget = required("the network whose logits at the clean images are the target")
    loss: Literal["squared_error", "kl"] = option(
        "squared_error", "summed over the classes; or KL(target || learner) as in distillation (ARD, RSLAD)"
    )
    scale: Real = option(1.0, "factor of that loss", gt=0)
    temperature: Real = option(1.0, "both networks' logits are divided by it; kl is multiplied by its square", gt=0)
    cross_entropy: Real = option(0.0, "weight of CE(x', y); the anchor loss has the rest", ge=0, le=1)
    freeze_head: bool = option(False, "do not train the layer that computes the logits")

    def problems(self) -> Iterable[str]:
        if self.loss == "squared_error" and self.temperature != 1:
            yield "temperature: has no effect with loss squared_error, use scale"

    def attack_problems(self, attacks: Any) -> Iterator[str]:
        for name, attack in attacks.items():
            if attack.tau is not None:
                yield f"{name}.tau: has no effect with objective anchor, whose attack does not stop at wrong labels"


class TradesObjective(Section):
    """TRADES: CE(x, y) + beta KL(p(x) || p(x')), x' against the same KL."""

    name: Literal["trades"] = "trades"
    attacks: ClassVar[str] = "one"
    beta: Real = option(6.0, "weight of the KL term: lambda in the papers' tables, beta in the authors' code", ge=0)
    label_smoothing: Real = option(0.0, "fraction of the target spread over all classes", ge=0, lt=1, unit="fraction")

    def attack_problems(self, attacks: Any) -> Iterator[str]:
        for name, attack in attacks.items():
            if attack.start == "zero" or (attack.start is None and attack.algorithm == "apgd"):
                yield f"{name}.start: expected gaussian or uniform with objective trades, whose KL has no gradient at x"


class MartObjective(Section):
    """MART: boosted CE(x', y) + beta KL(p(x) || p(x')) (1 - p_y(x))."""

    name: Literal["mart"] = "mart"
    attacks: ClassVar[str] = "one"
    beta: Real = option(5.0, "weight of the misclassification-aware KL term", ge=0)


class IatObjective(Section):
    """IAT: mixup of the clean and of the adversarial batch, half and half."""

    name: Literal["iat"] = "iat"
    attacks: ClassVar[str] = "one"
    alpha: Real = option(1.0, "of mixup's Beta(alpha, alpha)", gt=0, le=100)


class RstObjective(Section):
    """RST: (1 - beta) L_nat + beta L_rob, each a weighted mean over labelled and pseudo-labelled images."""

    name: Literal["rst"] = "rst"
    attacks: ClassVar[str] = "one"
    needs_pseudo_labels: ClassVar[bool] = True
    beta: Real = option(0.5, "weight of the robust loss", ge=0, le=1)
    natural_weight: Real = option(
        0.9, "u_nat: a pseudo-labelled image in L_nat; a labelled one has the rest", ge=0, le=1
    )
    robust_weight: Real = option(0.5, "u_rob: the same in L_rob", ge=0, le=1)


class MaxObjective(Section):
    """MAX: each example by the norm that hurts it most."""

    name: Literal["max"] = "max"
    attacks: ClassVar[str] = "several"


class AverageObjective(Section):
    """AVG: mean of the adversarial losses of all norms."""

    name: Literal["avg"] = "avg"
    attacks: ClassVar[str] = "several"


class StochasticObjective(Section):
    """SAT: one norm a batch, drawn uniformly."""

    name: Literal["sat"] = "sat"
    attacks: ClassVar[str] = "several"


class MsdObjective(Section):
    """MSD: one attack that takes at each step the norm that raises the loss most.

    Published settings (CIFAR-10): 50 steps of linf 0.003 (0.005 in the code), l2 0.05 and l1 1 (0.05 * 20 / k in each
    of k pixels: step_size is the length of the whole step, in l1 as in the other norms). MNIST: 100 of 0.01, 0.1, 1.
    """

    name: Literal["msd"] = "msd"
    attacks: ClassVar[str] = "several"
    l1_pixels: Pair = option(
        (5, 20),
        "l1: fewest and most pixels that a step moves, k drawn for each step; each moves step_size / k",
        ge=1,
        unit="pixels",
    )

    def problems(self) -> Iterable[str]:
        if self.l1_pixels[0] > self.l1_pixels[1]:
            yield f"l1_pixels: expected [fewest, most], got {list(self.l1_pixels)}"

    def attack_problems(self, attacks: Any) -> Iterator[str]:
        if len({attack.num_steps for attack in attacks.values()}) > 1:
            yield "attacks: expected one num_steps for all of them with objective msd, which takes their steps together"
        if self.l1_pixels != MsdObjective().l1_pixels and all(attack.norm != "l1" for attack in attacks.values()):
            yield "objective.l1_pixels: has no effect without an l1 attack"
        for name, attack in attacks.items():
            if attack.algorithm != "pgd":
                yield f"attacks.{name}.algorithm: expected pgd with objective msd, got {attack.algorithm}"
            if attack.start not in (None, "zero"):
                yield f"attacks.{name}.start: expected zero with objective msd, got {attack.start}"
            if attack.sparsity is not None:
                yield f"attacks.{name}.sparsity: has no effect with objective msd; it is for objective.l1_pixels to say"


class EatObjective(Section):
    """E-AT: one norm a batch, drawn by how often the network has failed under it so far."""

    name: Literal["e_at"] = "e_at"
    attacks: ClassVar[str] = "several"


class OwnObjective(Section):
    """A class of your own, from `genray.objectives.Objective` ([own](own.md)). It says which attacks it needs."""

    name: OwnName = required("of the class")
    attacks: ClassVar[str | None] = None
    options: Options | None = option(None, "keyword arguments of the class")


OBJECTIVES = {
    "natural": NaturalObjective,
    "adversarial": AdversarialObjective,
    "anchor": AnchorObjective,
    "trades": TradesObjective,
    "mart": MartObjective,
    "iat": IatObjective,
    "rst": RstObjective,
    "max": MaxObjective,
    "avg": AverageObjective,
    "sat": StochasticObjective,
    "msd": MsdObjective,
    "e_at": EatObjective,
}
Objective = choice(*OBJECTIVES.values(), own=OwnObjective)
