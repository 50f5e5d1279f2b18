"""Early-stopped PGD: the friendly adversarial examples of FAT (Zhang et al., ICML 2020; methods C5)."""

from dataclasses import dataclass
from typing import Any

import torch

from genray.attacks.gradient import GradientAttack, loss_target, starting_point, temporary_mode
from genray.attacks.losses import loss_function
from genray.core import waiting
from genray.core.geometry import BALLS


@dataclass(frozen=True)
class FriendlyAttack(GradientAttack):
    """PGD that lets an example go once it has been misclassified `tau` times before.

    Each example carries a counter that starts at tau. Before every step: if it is misclassified and the counter is 0,
    the point of now is its adversarial example; if it is misclassified otherwise, the counter falls by one. What is
    left after the last step is taken as it is. tau = num_steps is plain PGD, tau = 0 takes the first misclassified.

    Attributes:
        step_noise: omega, standard deviation of the noise added to every step.
    """

    step_noise: float = 0.0

    def __call__(self, model, x, y, draw, tau: int = 0):
        """As `GradientAttack.__call__`; `tau` >= 0 is where the counters start."""
        adversarial = starting_point(self, x, draw)
        with temporary_mode(model, training=self.mode == "train"):
            target = loss_target(self.loss, model, x, y)
            # In train mode BatchNorm's statistics are those of the examples that go on.
            leaves = self.mode == "train" or waiting.reads_are_free(x)
            return (self._fewer_each_step if leaves else self._all_steps)(model, x, y, draw, tau, adversarial, target)

    def _fewer_each_step(self, model, x, y, draw, tau, adversarial, target):
        """Who stopped costs no more passes."""
        ball, at, counters = BALLS[self.norm], torch.arange(len(x), device=x.device), torch.full_like(y, tau)
        for _ in range(self.num_steps):
            noise: Any = self.step_noise * draw.normal(x)[at] if self.step_noise else 0.0
            gradient, logits = _gradient_and_logits(model, adversarial[at], target[at], loss_function(self.loss))
            wrong = logits.argmax(1) != y[at]
            going = ~wrong | (counters[at] > 0)
            counters[at] -= wrong.to(counters.dtype)
            if tau < self.num_steps:  # otherwise nobody can stop
                at, gradient = at[going], gradient[going]
                noise = noise[going] if self.step_noise else noise
                if len(at) == 0:
                    break
            stepped = adversarial[at] + _of(self.step_size, at) * ball.step(gradient, self.sparsity) + noise
            adversarial[at] = ball.project(x[at], stepped, _of(self.epsilon, at))
        return adversarial

    def _all_steps(self, model, x, y, draw, tau, adversarial, target):
        """The same images from all steps of all examples: nothing waits to learn how many stopped."""
        ball, counters = BALLS[self.norm], torch.full_like(y, tau)
        going = torch.ones_like(y, dtype=torch.bool)
        for _ in range(self.num_steps):
            noise: Any = self.step_noise * draw.normal(x) if self.step_noise else 0.0
            gradient, logits = _gradient_and_logits(model, adversarial, target, loss_function(self.loss))
            wrong = logits.argmax(1) != y
            going = going & (~wrong | (counters > 0))
            counters = counters - wrong.to(counters.dtype)
            stepped = adversarial + self.step_size * ball.step(gradient, self.sparsity) + noise
            projected = ball.project(x, stepped, self.epsilon)
            adversarial = torch.where(going[:, None, None, None], projected, adversarial)
        return adversarial


def _of(value, at):
    """The rows of a value that differs by example."""
    return value[at] if isinstance(value, torch.Tensor) else value


def _gradient_and_logits(model, x, target, loss):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        (gradient,) = torch.autograd.grad(loss(logits, target).sum(), x)
    return gradient, logits.detach()
