"""Attacks of the user's: a class that is made with the settings of the ball and called as our own attacks are."""

from dataclasses import dataclass
from typing import Any

import torch

from genray.attacks.gradient import temporary_mode
from genray.core.geometry import BALLS
from genray.core.user_code import call, errors_as, find, taken
from genray.errors import ConfigError

LENGTH_SLACK = 1e-6  # relative, for the float32 rounding of x' - x; plus one rounding of a pixel a coordinate


@dataclass(frozen=True)
class OwnAttack:
    """A user's attack whose images are checked at every call.

    Attributes:
        name: `package.module:CLASS`.
        inner: (model, x, y, draw) -> adversarial images.
        norm, epsilon: of the ball.
        mode: the model's mode while attacked.
    """

    name: str
    inner: Any
    norm: str
    epsilon: float
    mode: str = "eval"

    def __call__(self, model, x, y, draw, target=None):
        """As `GradientAttack.__call__`; the user's attack does not get `target`.

        Raises:
            ConfigError: it fails, or returns something else than images in the ball and in [0, 1].
        """
        with errors_as(f"attack {self.name} failed", torch.OutOfMemoryError):
            with temporary_mode(model, training=self.mode == "train"):
                found = self.inner(model, x, y, draw)
        if not isinstance(found, torch.Tensor) or found.shape != x.shape or found.dtype != x.dtype:
            got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise ConfigError(f"attack {self.name}: expected images of shape {tuple(x.shape)} {x.dtype}, got {got}")
        found = found.detach()
        if problems := check_points(x, found, self.norm, self.epsilon)[1]:
            raise ConfigError(f"attack {self.name}: {problems[0]}")
        return found


def own_attack(name: str, field: str, settings: dict, options: dict | None = None, strict: bool = False) -> OwnAttack:
    """The user's attack of a name.

    Args:
        name: `package.module:CLASS`.
        field: that names it.
        settings: fields of `GradientAttack`; the class gets those that it has parameters for.
        options: further keyword arguments.
        strict: refuse a step size, start or sparsity that the class has no parameter for.

    Raises:
        ConfigError: nobody but a file named it, it cannot be made, or with `strict`, a setting would have no effect.
    """
    kind = find(name, field)
    with errors_as(f"{field}: {name} cannot be made"):
        unused = {"step_size", "start", "sparsity"} & settings.keys() - taken(kind, settings)
        inner = call(kind, settings, options or {})
    if unused and strict:
        raise ConfigError(f"{field}: {name} takes no {', '.join(sorted(unused))}; remove it")
    if not callable(inner):
        raise ConfigError(f"{field}: expected {name} to be called with (model, x, y, draw), it cannot be called")
    return OwnAttack(name, inner, settings["norm"], settings["epsilon"], settings.get("mode", "eval"))


def check_points(x, adversarial, norm: str, epsilon: float) -> tuple[float, list[str]]:
    """Whether returned points are legal images of the ball.

    Returns:
        (longest, problems): the largest norm as a fraction of epsilon, and the errors, one sentence each.
    """
    if len(x) == 0:
        return 0.0, []
    problems = []
    if not bool(adversarial.isfinite().all()):
        return float("inf"), ["points with NaN or infinite pixels"]
    if adversarial.min() < 0 or adversarial.max() > 1:
        problems.append("points outside [0, 1]")
    longest = float(lengths(x, adversarial, norm).max()) / epsilon
    if longest > most_length(x, norm, epsilon):
        problems.append(f"points outside the ball: norm {longest:.6f} epsilon")
    return longest, problems


def lengths(x, adversarial, norm: str) -> torch.Tensor:
    """(N,) float64, the norm of each perturbation."""
    return BALLS[norm].length((adversarial - x).double()).flatten()


def most_length(x, norm: str, epsilon: float) -> float:
    """The largest norm that counts as inside the ball, as a fraction of epsilon: 1 and the rounding of float32."""
    rounding = 2**-24 * {"linf": 1, "l2": x[0].numel() ** 0.5, "l1": x[0].numel()}[norm] / epsilon
    return 1 + LENGTH_SLACK + rounding
