"""PreActResNet-18: BatchNorm and ReLU before each convolution. Two variants are in use, see `batch_norm_before_fc`."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """conv(relu(bn(conv(relu(bn(x)))))) + shortcut.

    Where the shape changes the shortcut is a bare conv 1 x 1 on the *activated* input, elsewhere the raw input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActResNet18(nn.Module):
    """Stem conv without bn, four stages of two blocks, widths w, 2w, 4w, 8w, strides 1, 2, 2, 2.

    Args:
        num_classes: K, the number of logits.
        in_channels: channels of an image.
        width: w, 64 as published.
        batch_norm_before_fc: True as in Rice et al., AWP and TMLlib; False as in the Generalist code, which
            pools the raw sum of the last block.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 64, *, batch_norm_before_fc: bool):
        super().__init__()
        self.normalize = nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width) if batch_norm_before_fc else None
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if self.bn is not None:
            out = F.relu(self.bn(out))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(PreActBlock(in_channels, out_channels, stride), PreActBlock(out_channels, out_channels, 1))
