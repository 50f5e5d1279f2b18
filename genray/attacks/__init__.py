"""Attacks on one's own models: the gradient loop, its losses and its random numbers."""

from genray.attacks.auto import MEMBERS, run_member
from genray.attacks.draws import ExampleDraw, StreamDraw
from genray.attacks.gradient import GradientAttack, temporary_mode

__all__ = [
    "MEMBERS",
    "ExampleDraw",
    "GradientAttack",
    "StreamDraw",
    "build_attack",
    "run_member",
    "temporary_mode",
]


def build_attack(config) -> GradientAttack:
    """The attack of an `AttackConfig` or `EvaluationAttackConfig` section (every one of its fields is used)."""
    fields = dict(vars(config))
    return GradientAttack(**fields | {"epsilon": float(config.epsilon), "step_size": float(config.step_size)})
