"""Mixup (Zhang et al., 1710.09412): convex combinations of pairs of a batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Mix:
    """One combination: `share` of each image and 1 - share of its partner (one share a batch)."""

    share: float
    partner: torch.Tensor  # (N,) a permutation, of the whole batch where N examples are a part of it

    def images(self, x, whole):
        """Args:
        x, whole: the examples, and the batch that their partners are in.
        """
        return self.share * x + (1 - self.share) * whole[self.partner]


def mixup(step, alpha: float) -> Mix:
    """Draws share ~ Beta(alpha, alpha) and a random permutation."""
    return Mix(float(step.numbers.beta(alpha, alpha)), step.draw.permutation(step.y))


def mixed_cross_entropy(logits, step, mix: Mix, label_smoothing: float = 0.0):
    """share CE(z, y) + (1 - share) CE(z, y of the partner)."""
    both = step.y, step.whole(step.y)[mix.partner]
    own, other = (F.cross_entropy(logits, labels, label_smoothing=label_smoothing) for labels in both)
    return mix.share * own + (1 - mix.share) * other
