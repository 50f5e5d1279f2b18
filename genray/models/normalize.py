"""Input normalisation as the first layer of a network, so that every image outside a model lies in [0, 1].

An attack's epsilon then always means pixels, whatever statistics the network was trained with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genray.errors import ConfigError

MEAN, STD = "normalize.mean", "normalize.std"  # what a plain state dict calls them
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)  # the pair that Rice et al., AT-AWP and TMLlib train with
NORMALIZATIONS = {
    "cifar10": (CIFAR10_MEAN, CIFAR10_STD),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),  # of Rice et al. and RobustBench, to 4 digits
}


class Normalize(nn.Module):
    """Per-channel (x - mean) / std.

    The statistics are buffers so that they follow the module from device to device, and non-persistent so that
    the network's state dict keeps the plain published keys.

    Args:
        mean: C numbers on the [0, 1] pixel scale.
        std: C positive numbers on the same scale.

    Raises:
        ConfigError: the lengths differ, or a number is not finite, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor):
        super().__init__()
        # On the CPU also where a network is built without memory (on "meta"): the numbers are looked at.
        mean = torch.as_tensor(mean, dtype=torch.float32, device="cpu").flatten()
        std = torch.as_tensor(std, dtype=torch.float32, device="cpu").flatten()
        if len(mean) != len(std) or len(mean) == 0:
            raise ConfigError(f"normalisation: expected as many means as stds, got {len(mean)} and {len(std)}")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            got = f"{mean.tolist()} and {std.tolist()}"
            raise ConfigError(f"normalisation: expected finite means and positive stds, got {got}")
        self.register_buffer("mean", mean.view(1, -1, 1, 1).clone(), persistent=False)
        self.register_buffer("std", std.view(1, -1, 1, 1).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> the same shape, normalised."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def set_normalization(model: nn.Module, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
    """Gives a network of this package its first layer; it moves to the device the weights are on."""
    model.normalize = Normalize(mean, std).to(next(model.parameters()).device)
