"""ResNet-18 for small images: 3 x 3 stem, no max-pool, BatchNorm after each convolution."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from genray.models.activations import ACTIVATIONS


class BasicBlock(nn.Module):
    """act(bn(conv(act(bn(conv(x))))) + shortcut(x)); the shortcut is conv 1 x 1 + bn where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.activation(out + self.shortcut(x))


class ResNet18(nn.Module):
    """Four stages of two basic blocks, widths w, 2w, 4w, 8w, strides 1, 2, 2, 2; torch's default initialisation.

    Args:
        num_classes: K, the number of logits.
        in_channels: channels of an image.
        width: w, 64 as published.
        activation: key of `ACTIVATIONS`, "relu" as published.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 64, activation: str = "relu"):
        super().__init__()
        self.activation, block = ACTIVATIONS[activation], partial(BasicBlock, activation=activation)
        self.normalize = nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(block, width, width, 1)
        self.layer2 = _stage(block, width, 2 * width, 2)
        self.layer3 = _stage(block, 2 * width, 4 * width, 2)
        self.layer4 = _stage(block, 4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        out = self.activation(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        # Global pooling: the published average over 4 x 4 at 32 x 32, and any other image size besides.
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(block, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(in_channels, out_channels, stride), block(out_channels, out_channels, 1))
