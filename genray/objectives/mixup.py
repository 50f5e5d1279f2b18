"""Mixup (Zhang et al., 1710.09412): convex combinations of pairs of a batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Mix:
    """One combination: `weight` of each image and 1 - weight of its partner (one a batch)."""

    weight: float
    partner: torch.Tensor  # (N,) a permutation, of the whole batch where N examples are a part of it

    def images(self, x, whole):
        """Args:
        x, whole: the examples, and the batch that their partners are in.
        """
        return self.weight * x + (1 - self.weight) * whole[self.partner]


def mixup(step, alpha: float) -> Mix:
    """Draws weight ~ Beta(alpha, alpha) and a random permutation."""
    return Mix(float(step.numbers.beta(alpha, alpha)), step.draw.permutation(step.y))


def mixed_cross_entropy(logits, step, mix: Mix, label_smoothing: float = 0.0):
    """weight CE(z, y) + (1 - weight) CE(z, y of the partner)."""
    both = step.y, step.whole(step.y)[mix.partner]
    own, other = (F.cross_entropy(logits, labels, label_smoothing=label_smoothing) for labels in both)
    return mix.weight * own + (1 - mix.weight) * other
