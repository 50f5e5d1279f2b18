"""Attacks on one's own models: the gradient loop, its losses and its random numbers."""

from collections.abc import Callable

from genray.attacks.adaptive import AdaptiveAttack
from genray.attacks.auto import MEMBERS, run_member
from genray.attacks.draws import ExampleDraw, StreamDraw
from genray.attacks.friendly import FriendlyAttack
from genray.attacks.gradient import GradientAttack, temporary_mode
from genray.attacks.own import OwnAttack, own_attack
from genray.core.user_code import is_own

__all__ = [
    "MEMBERS",
    "AdaptiveAttack",
    "ExampleDraw",
    "FriendlyAttack",
    "GradientAttack",
    "OwnAttack",
    "StreamDraw",
    "build_attack",
    "run_member",
    "temporary_mode",
]


def build_attack(
    config, loss: str | Callable = "cross_entropy", field: str = "attack"
) -> GradientAttack | AdaptiveAttack | OwnAttack:
    """The attack of an `AttackConfig` or `EvaluationAttackConfig` section (every one of its fields is used).

    Args:
        loss: key of `LOSSES`, or a function (logits, target) -> (N,): what it maximises.
        field: name of the section, for errors.
    """
    fields = {name: value for name, value in vars(config).items() if value is not None}
    fields |= {"epsilon": float(config.epsilon), "loss": loss}
    for of_a_step in ("scale", "radius_clip"):  # `Crafter` changes epsilon and step size by them
        fields.pop(of_a_step, None)
    algorithm = fields.pop("algorithm", "pgd")
    adaptive = algorithm == "apgd"
    if "step_size" in fields:
        fields["step_size"] = float(config.step_size)
    if is_own(algorithm):
        return own_attack(algorithm, f"{field}.algorithm", fields, fields.pop("options", None), strict=True)
    if fields.pop("tau", None) is not None:  # its value of the step comes with every call
        return FriendlyAttack(**fields)
    fields.pop("step_noise", None)
    return AdaptiveAttack(**fields) if adaptive else GradientAttack(**fields)
