"""What an objective works on in one training step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from genray.attacks import StreamDraw
from genray.parallel.process_group import ALONE, ProcessGroup, Shard


@dataclass
class TrainingStep:
    """One minibatch, or this process's part of it, and what may be done with it.

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
        process_group, shard: the processes that share the batch, and which examples of it are here; None: all of them.
        memory_format: of images.
    """

    model: Callable
    x: torch.Tensor
    y: torch.Tensor
    craft: Callable
    make_draw: Callable = None
    make_numbers: Callable = None
    labelled: torch.Tensor | None = None
    process_group: ProcessGroup = ALONE
    shard: Shard | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def share(self) -> float:
        """What a mean over these examples counts in the mean over the batch."""
        return self.shard.weight if self.shard else 1.0

    @property
    def size(self) -> int:
        """Examples of the whole batch."""
        return self.shard.total if self.shard else len(self.y)

    def total(self, number: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's `number`, which may be overwritten; no gradient reaches it."""
        return self.process_group.sum_(number)

    def whole(self, mine: torch.Tensor) -> torch.Tensor:
        """The tensor of the whole batch from everybody's shard; no gradient reaches it."""
        return self.process_group.whole(mine, self.shard, self.memory_format)

    @cached_property
    def draw(self) -> StreamDraw:
        return self.make_draw()

    @cached_property
    def numbers(self) -> np.random.Generator:
        return self.make_numbers()
