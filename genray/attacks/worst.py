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
        with temporary_mode(model, training=self.mode == "train"), torch.no_grad():
            losses = torch.stack([cross_entropy(model(candidate), y) for candidate in images])
        return torch.stack(images)[losses.argmax(0), torch.arange(len(y), device=y.device)]
