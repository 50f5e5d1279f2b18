"""Images made on other networks and tried on the model (methods D): gradients that the model hides do not matter."""

from dataclasses import dataclass, field

import torch
from torch import nn

from genray.attacks.gradient import GradientAttack, temporary_mode

TRANSFER, TRANSFER_FROM = "transfer", "transfer_from="  # columns: networks that are given, or the network of a file
STEPS = 100


def is_transfer(name: str) -> bool:
    """Whether a column's images are made on other networks."""
    return name == TRANSFER or name.startswith(TRANSFER_FROM)


@dataclass
class TransferAttack:
    """PGD on each of some networks, one after another, on the images that the model still classifies correctly.

    The last image of a run counts, however wrong the network was before: what fools it by far is more likely to fool
    another one too.

    Attributes:
        networks: name -> network, images (N, C, H, W) in [0, 1] -> logits (N, K).
        norm, epsilon, step_size: as in `GradientAttack`.
    """

    networks: dict[str, nn.Module]
    norm: str
    epsilon: float
    step_size: float
    loss: str = field(default="cross-entropy of other networks", init=False)
    num_steps: int = field(default=STEPS, init=False)

    @property
    def num_passes(self) -> int:
        return self.num_steps * len(self.networks)

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"made on {', '.join(self.networks)}",)

    def __call__(self, model, x, y, draw):
        """As `GradientAttack.__call__`; where nothing fools the model, the images of the last network."""
        attack = GradientAttack(self.norm, self.epsilon, self.step_size, self.num_steps)
        found, left = x.clone(), torch.arange(len(x), device=x.device)
        for network in self.networks.values():
            if len(left) == 0:
                break
            found[left] = made = attack(network.to(x.device), x[left], y[left], draw.of(left.tolist()))
            with torch.no_grad(), temporary_mode(model, training=False):
                left = left[model(made).argmax(1) == y[left]]
        return found
