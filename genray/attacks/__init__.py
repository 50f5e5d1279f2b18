"""Attacks on one's own models: the gradient loop, its losses and its random numbers."""

from genray.attacks.auto import MEMBERS, run_member
from genray.attacks.draws import ExampleDraw, StreamDraw
from genray.attacks.friendly import FriendlyAttack
from genray.attacks.gradient import GradientAttack, temporary_mode

__all__ = [
    "MEMBERS",
    "ExampleDraw",
    "FriendlyAttack",
    "GradientAttack",
    "StreamDraw",
    "build_attack",
    "run_member",
    "temporary_mode",
]


def build_attack(config, loss: str = "cross_entropy") -> GradientAttack:
    """The attack of an `AttackConfig` or `EvaluationAttackConfig` section (every one of its fields is used).

    Args:
        loss: key of `LOSSES`, what it maximises.
    """
    fields = vars(config) | {"epsilon": float(config.epsilon), "step_size": float(config.step_size), "loss": loss}
    if fields.pop("tau", None) is not None:  # its value of the step comes with every call
        return FriendlyAttack(**fields)
    fields.pop("step_noise", None)
    return GradientAttack(**fields)
