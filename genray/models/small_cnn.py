"""The four-convolution network of the MNIST experiments (TRADES), in its published layout at 28 x 28 x 1."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

HIDDEN_UNITS = 200
PADDED_BELOW = 28  # smaller images (8 x 8 digits) would shrink to nothing without padding


class SmallCNN(nn.Module):
    """conv w, conv w, pool, conv 2w, conv 2w, pool, fc 200, dropout, fc 200, fc K; all convolutions 3 x 3.

    Unpadded at 28 x 28 and above, as published; with padding 1 below. The last layer starts at zero, so a fresh
    network gives all-zero logits and no input gradient until its first step.

    Args:
        num_classes: K, the number of logits.
        in_channels: channels of an image.
        image_size: (H, W); it fixes the size of the first fully connected layer.
        width: channels of the first two convolutions.
        batch_norm: adds a BatchNorm after each convolution (not in the published layout).
        dropout: probability that a hidden unit is dropped in train mode, in [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        width: int = 32,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.normalize = nn.Identity()
        padding = 1 if min(image_size) < PADDED_BELOW else 0
        widths = (in_channels, width, width, 2 * width, 2 * width)
        self.feature_extractor = _features(widths, padding, batch_norm)
        height, width_px = (_pooled_size(side, padding) for side in image_size)
        self.classifier = nn.Sequential(
            OrderedDict(
                [
                    ("fc1", nn.Linear(widths[-1] * height * width_px, HIDDEN_UNITS)),
                    ("relu1", nn.ReLU()),
                    ("drop", nn.Dropout(dropout)),
                    ("fc2", nn.Linear(HIDDEN_UNITS, HIDDEN_UNITS)),
                    ("relu2", nn.ReLU()),
                    ("fc3", nn.Linear(HIDDEN_UNITS, num_classes)),
                ]
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        last = self.classifier[-1]
        nn.init.zeros_(last.get_parameter("weight"))
        nn.init.zeros_(last.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        features = self.feature_extractor(self.normalize(x))
        return self.classifier(torch.flatten(features, 1))


def _features(widths: tuple[int, ...], padding: int, batch_norm: bool) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, 5):
        layers[f"conv{i}"] = nn.Conv2d(widths[i - 1], widths[i], 3, padding=padding)
        if batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm2d(widths[i])
        layers[f"relu{i}"] = nn.ReLU()
        if i % 2 == 0:
            layers[f"maxpool{i // 2}"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


def _pooled_size(side: int, padding: int) -> int:
    """What two rounds of (conv, conv, pool) leave of one side of the image."""
    shrink = 4 - 4 * padding
    return ((side - shrink) // 2 - shrink) // 2
