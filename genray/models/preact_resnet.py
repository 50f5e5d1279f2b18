"""PreActResNet-18: BatchNorm and activation before each convolution.

Published codes differ in three places. Of these only the BatchNorm before the classifier shows in a state dict.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from genray.models.activations import ACTIVATIONS


class PreActBlock(nn.Module):
    """conv(act(bn(conv(act(bn(x)))))) + shortcut; where the shape changes the shortcut is a bare conv 1 x 1.

    Args:
        in_channels, out_channels, stride: as in a convolution.
        activation: key of `ACTIVATIONS`.
        raw_shortcut: the shortcut's convolution takes x instead of act(bn(x)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str, raw_shortcut: bool):
        super().__init__()
        self.activation, self.raw_shortcut = ACTIVATIONS[activation], raw_shortcut
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw_shortcut else activated)
        out = self.conv1(activated)
        return self.conv2(self.activation(self.bn2(out))) + shortcut


class PreActResNet18(nn.Module):
    """Stem conv without bn, four stages of two blocks, widths w, 2w, 4w, 8w, strides 1, 2, 2, 2.

    Args:
        num_classes: K, the number of logits.
        in_channels: channels of an image.
        width: w, 64 as published.
        batch_norm_before_fc: True as in Rice et al., AWP, TMLlib and E-AT, which pool relu(bn(x)) of the last block's
            sum x; False as in Generalist, Wong et al. and Andriushchenko and Flammarion, which pool x.
        activation: key of `ACTIVATIONS`; "softplus" (log(1 + e^x)) is that of the blocks only, as in E-AT, which has a
            ReLU before pooling.
        raw_shortcut: True as in RobustBench's Wong2020Fast and Andriushchenko2020Understanding, see `PreActBlock`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int = 64,
        *,
        batch_norm_before_fc: bool,
        activation: str = "relu",
        raw_shortcut: bool = False,
    ):
        super().__init__()
        self.activation = ACTIVATIONS["relu" if activation == "softplus" else activation]
        block = partial(PreActBlock, activation=activation, raw_shortcut=raw_shortcut)
        self.normalize = nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(block, width, width, 1)
        self.layer2 = _stage(block, width, 2 * width, 2)
        self.layer3 = _stage(block, 2 * width, 4 * width, 2)
        self.layer4 = _stage(block, 4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width) if batch_norm_before_fc else None
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if self.bn is not None:
            out = self.activation(self.bn(out))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(block, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(in_channels, out_channels, stride), block(out_channels, out_channels, 1))
