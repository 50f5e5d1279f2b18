"""What an objective works on in one training step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from genray.attacks import StreamDraw


@dataclass
class TrainingStep:
    """One minibatch and what may be done with it.

    Attributes:
        model: images (N, C, H, W) in [0, 1] -> float32 logits (N, K), in train mode; gradients reach the weights.
        x: (N, C, H, W) in [0, 1].
        y: (N,) int64.
        craft: (attack's name) -> adversarial images (N, C, H, W) of the batch against the network of this step. Asked
            for a second time, it gives the same images again. To be called before `model`, which moves BatchNorm's
            statistics.
        make_draw: () -> `StreamDraw` of the objective's own random numbers on the device.
        make_numbers: () -> NumPy generator for what the host has to know (which norm, how much mixup).
        labelled: (N,) bool, whether a label is the data set's own and no pseudo-label; None where all are.
    """

    model: Callable
    x: torch.Tensor
    y: torch.Tensor
    craft: Callable
    make_draw: Callable = None
    make_numbers: Callable = None
    labelled: torch.Tensor | None = None

    @cached_property
    def draw(self) -> StreamDraw:
        return self.make_draw()

    @cached_property
    def numbers(self) -> np.random.Generator:
        return self.make_numbers()
