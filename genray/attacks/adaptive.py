"""APGD as an attack for training: no step size to choose (Croce & Hein, 2003.01690, 2103.01208; methods D4)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from genray.attacks.gradient import loss_target, starting_point, temporary_mode
from genray.attacks.losses import loss_function
from genray.attacks.native.ascent import ApgdRun, L1ApgdRun
from genray.attacks.native.outcome import AttackBatch


@dataclass(frozen=True)
class AdaptiveAttack:
    """One run of APGD; the image of the largest loss of all its steps, the start included, is returned.

    The step size starts at 2 epsilon (l1: epsilon) and adapts to each example. The last image has no gradient taken,
    so the cost is num_steps passes and one forward pass. Nobody leaves early, so that no step waits for the device
    (but for l1's projection).

    Attributes:
        norm, epsilon, num_steps, start, mode, loss: as of `GradientAttack`; E-AT starts at the image itself.
        sparsity: l1 only, share of the pixels that the first step moves.
    """

    norm: str
    epsilon: float | torch.Tensor
    num_steps: int
    start: str = "zero"
    mode: str = "eval"
    loss: str | Callable = "cross_entropy"
    sparsity: float = 0.05

    @torch.no_grad()
    def __call__(self, model, x, y, draw, target=None):
        """As `GradientAttack.__call__`."""
        batch, start = AttackBatch(x, y, self.norm, None), starting_point(self, x, draw)
        radius = self.epsilon.flatten(1).to(x.dtype) if isinstance(self.epsilon, torch.Tensor) else self.epsilon
        everyone = torch.arange(len(y), device=y.device)
        with temporary_mode(model, training=self.mode == "train"):
            target = loss_target(self.loss, model, x, y, target)
            ascent_run = self._apgd_run(batch, everyone, target, self._loss, model)
            ascent_run.ascend(batch.layout.rows(start), radius, self.num_steps, exits=False)
        # l1's steps end in the box but for rounding.
        return batch.layout.images(ascent_run.best_point.clamp(0, 1))

    def _apgd_run(self, *args):
        return L1ApgdRun(*args, first_sparsity=self.sparsity) if self.norm == "l1" else ApgdRun(*args)

    def _loss(self, logits, labels, target):
        return loss_function(self.loss)(logits, target)
