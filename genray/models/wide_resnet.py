"""Wide ResNets of the adversarial-training literature (TRADES layout, without its unused `sub_block1`)."""

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from genray.models.activations import ACTIVATIONS

STEM_CHANNELS = 16


class WideBlock(nn.Module):
    """Pre-activation block. Where widths differ, bn-act comes *before* the shortcut; else the shortcut is raw."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None  # the published key, hence the odd case
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = self.activation(self.bn2(self.conv1(activated)))
        return self.conv2(out) + shortcut


class Group(nn.Module):
    """`num_blocks` blocks; the first changes width and stride. It exists for the `.layer.` in the published keys."""

    def __init__(self, num_blocks: int, in_channels: int, out_channels: int, stride: int, activation: str):
        super().__init__()
        block = partial(WideBlock, activation=activation)
        first = block(in_channels, out_channels, stride)
        self.layer = nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Stem conv of 16 channels, three groups of widths 16k, 32k, 64k and strides 1, 2, 2, then bn, act, pool, fc.

    Args:
        num_classes: K, the number of logits.
        in_channels: channels of an image.
        width: k, the widen factor, 10 as published. At k = 1 the first group has no shortcut conv.
        blocks_per_group: 4 in WRN-28, 5 in WRN-34 and in the network that papers call WRN-32-10.
        activation: key of `ACTIVATIONS`; "relu" in the TRADES layout.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int = 10,
        *,
        blocks_per_group: int,
        activation: str = "relu",
    ):
        super().__init__()
        self.activation, group = ACTIVATIONS[activation], partial(Group, blocks_per_group, activation=activation)
        self.normalize = nn.Identity()
        channels = [STEM_CHANNELS, *(STEM_CHANNELS * width * factor for factor in (1, 2, 4))]
        self.conv1 = nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False)
        self.block1 = group(channels[0], channels[1], 1)
        self.block2 = group(channels[1], channels[2], 2)
        self.block3 = group(channels[2], channels[3], 2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        self._initialise()

    def _initialise(self) -> None:
        # BatchNorm starts at 1 / 0 by torch's default, which is the published initialisation too.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = self.activation(self.bn1(out))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
