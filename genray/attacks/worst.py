"""The worst of several attacks, example by example."""

from dataclasses import dataclass

import torch

from genray.attacks.gradient import GradientAttack, temporary_mode
from genray.attacks.losses import cross_entropy


@dataclass(frozen=True)
class WorstAttack:
    """Runs every attack and keeps for each example the image with the largest cross-entropy (methods C10, MAX).

    Attributes:
        attacks: at least one, all of one mode; on a tie the earlier one's image is kept.
    """

    attacks: tuple[GradientAttack, ...]

    @property
    def mode(self) -> str:
        return self.attacks[0].mode

    def __call__(self, model, x, y, draw):
        """As `GradientAttack.__call__`; each image lies in the ball of the attack that made it."""
        images = [attack(model, x, y, draw) for attack in self.attacks]
        if len(images) == 1:
            return images[0]
        with temporary_mode(model, training=self.mode == "train"):
            return worst_of(model, images, y)[0]


@torch.no_grad()
def worst_of(model, candidates, y):
    """For each example the candidate with the largest cross-entropy; on a tie the earlier one.

    Args:
        model: in the mode it is to be judged in.
        candidates: at least one batch of images (N, C, H, W).

    Returns:
        The images (N, C, H, W), in the memory format of the candidates, and their losses (N,).
    """
    images, losses = candidates[0], cross_entropy(model(candidates[0]), y)
    for others in candidates[1:]:
        theirs = cross_entropy(model(others), y)
        images = torch.where((theirs > losses)[:, None, None, None], others, images)
        losses = torch.maximum(theirs, losses)
    return images, losses
