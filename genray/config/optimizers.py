"""The optimisers of base learners, one section each."""

from collections.abc import Iterable
from typing import Literal

from genray.config.model import Section, choice, option
from genray.config.values import Real


class CommonOptions(Section):
    weight_decay: Real = 0.0
    decay_norms_and_biases: bool = option(
        True, "whether weight_decay is for parameters of one dimension too: those of norms, and biases"
    )
    clip_norm: Real | None = option(
        None, "largest L2 norm of an update's whole gradient, which is rescaled to it; null: any", gt=0
    )

    def problems(self) -> Iterable[str]:
        if not self.decay_norms_and_biases and not self.weight_decay:
            yield "decay_norms_and_biases: has no effect without weight_decay"


class SGD(CommonOptions):
    name: Literal["sgd"] = "sgd"
    momentum: Real = option(0.9, "fraction of the last update that each update keeps; 0: none", ge=0, lt=1)
    nesterov: bool = option(False, "Nesterov's form of momentum, which looks one update ahead")
    weight_decay: Real = option(5e-4, "L2 penalty on the parameters", ge=0)


class Adam(CommonOptions):
    name: Literal["adam"] = "adam"
    beta1: Real = option(0.9, "decay of the running mean of the gradient", ge=0, lt=1)
    beta2: Real = option(0.999, "decay of the running mean of its square", ge=0, lt=1)
    weight_decay: Real = option(0.0, "L2 penalty (adam) or decoupled decay (adamw)", ge=0)


class AdamW(Adam):
    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]  # told apart by it
    weight_decay: Real = option(0.01, "decoupled decay", ge=0)


OPTIMIZERS = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
Optimizer = choice(*OPTIMIZERS.values())
