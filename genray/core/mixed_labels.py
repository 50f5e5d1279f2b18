"""Labels of images that are put together from two of a batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class MixedLabels:
    """own, other: (N,) int64; weight: (N,), of `own`, the rest is that of `other`."""

    own: torch.Tensor
    other: torch.Tensor
    weight: torch.Tensor

    def __getitem__(self, rows) -> "MixedLabels":
        return MixedLabels(self.own[rows], self.other[rows], self.weight[rows])

    def cross_entropy(self, logits, label_smoothing: float = 0.0):
        """(N,) weight CE(z, own) + (1 - weight) CE(z, other)."""
        both = (self.own, self.other)
        own, other = (F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing) for y in both)
        return self.weight * own + (1 - self.weight) * other
