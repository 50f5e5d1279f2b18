"""The one gradient loop behind every first-order attack, in training and in evaluation (methods D2)."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from genray.attacks.losses import AGAINST_CLEAN, loss_function
from genray.core.geometry import BALLS

GAUSSIAN_START = 0.001  # standard deviation of the `gaussian` start (TRADES, MART)


@dataclass(frozen=True)
class GradientAttack:
    """Projected gradient ascent on a per-example loss.

    Attributes:
        norm: "linf", "l2" or "l1".
        epsilon, step_size: on the [0, 1] pixel scale; a number, or (N, 1, 1, 1), one an example (`radii.py`).
        num_steps: K >= 1.
        start: "uniform" in the ball, "gaussian" or "zero".
        mode: the model's mode while attacked; "train" lets BatchNorm statistics move, as some papers' code does.
        loss: key of `LOSSES`, or a function (logits, target) -> (N,).
        sparsity: l1 only, share of the pixels one step moves.
        momentum: mu of the momentum iterative method (Dong et al. 1710.06081; methods D3); 0: plain gradients.
    """

    norm: str
    epsilon: float | torch.Tensor
    step_size: float | torch.Tensor
    num_steps: int
    start: str = "uniform"
    mode: str = "eval"
    loss: str | Callable = "cross_entropy"
    sparsity: float = 0.05
    momentum: float = 0.0

    @property
    def num_passes(self) -> int:
        """Forward and backward passes an example: one a step (and for `AGAINST_CLEAN` one forward pass besides)."""
        return self.num_steps

    def __call__(self, model, x, y, draw, target=None):
        """Adversarial images for a batch.

        Args:
            model: images (N, C, H, W) in [0, 1] -> logits (N, K). Its mode, parameters, gradients and, in mode
                "eval", buffers are as before on return.
            x: (N, C, H, W) in [0, 1].
            y: (N,) int64.
            draw: source of random numbers (`draws.py`).
            target: (N, ...) what the loss compares the logits with; None: the labels, or what `AGAINST_CLEAN` says.

        Returns:
            (N, C, H, W) in [0, 1] with ||x' - x|| <= epsilon.
        """
        ball, loss = BALLS[self.norm], loss_function(self.loss)
        # Chosen here, so that the loop of plain gradients is the same as if there were no momentum.
        step = MomentumStep(ball.step, self.momentum) if self.momentum else ball.step
        adversarial = starting_point(self, x, draw)
        with temporary_mode(model, training=self.mode == "train"):
            target = loss_target(self.loss, model, x, y, target)
            for _ in range(self.num_steps):
                gradient = input_gradient(model, adversarial, target, loss)
                stepped = adversarial + self.step_size * step(gradient, self.sparsity)
                adversarial = ball.project(x, stepped, self.epsilon)
        return adversarial


class MomentumStep:
    """The step along g <- mu g + gradient / mean|gradient| (methods D3), for one run of the loop.

    Args:
        step: of a `Ball`: (gradient (N, ...), sparsity) -> direction (N, ...).
        momentum: mu > 0.
    """

    def __init__(self, step, momentum: float):
        self.step, self.momentum, self.memory = step, momentum, 0.0

    def __call__(self, gradient, sparsity):
        mean = gradient.abs().mean(tuple(range(1, gradient.dim())), keepdim=True)
        # A zero gradient adds nothing: the example moves on by what it remembers.
        self.memory = self.momentum * self.memory + gradient / mean.where(mean > 0, torch.ones_like(mean))
        return self.step(self.memory, sparsity)


def starting_point(attack, x, draw):
    """Where an attack with `norm`, `epsilon` and `start` begins: (N, C, H, W) in the box."""
    if attack.start == "zero":
        return x.clone()
    if attack.start == "gaussian":
        return (x + GAUSSIAN_START * draw.normal(x)).clamp_(0, 1)
    return (x + BALLS[attack.norm].start(x, attack.epsilon, draw)).clamp_(0, 1)


def loss_target(loss, model, x, y, given=None):
    """What the loss of this name compares the logits with: `given`, or the labels, or the clean images' logits."""
    if given is not None:
        return given
    if loss not in AGAINST_CLEAN:
        return y
    with torch.no_grad():
        return model(x).clone()  # a compiled model overwrites what it gave at its next pass (CUDA graphs)


def input_gradient(model, x, target, loss):
    """Gradient of the summed per-example loss with respect to the images only; parameters get none.

    The sum, not the mean: steps are then independent of the batch size.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(model(x), target).sum(), x)
    return gradient


@contextmanager
def temporary_mode(model, *, training):
    """Sets every sub-module's mode and restores each one's own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
