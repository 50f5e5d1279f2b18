"""The input of an objective in one training step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from genray.attacks import StreamDraw
from genray.core.mixed_labels import MixedLabels
from genray.parallel.process_group import ALONE, ProcessGroup, Shard


@dataclass
class TrainingStep:
    """One minibatch, or this process's shard of it, and the operations that an objective may use.

    Attributes:
        model: images (N, C, H, W) in [0, 1] -> float32 logits (N, K), in train mode; gradients reach the weights.
        x: (N, C, H, W) in [0, 1].
        y: (N,) int64.
        craft: (name of an attack) -> adversarial images (N, C, H, W) against the network of this step; a second call
            returns the same images. Call it before `model`, which updates BatchNorm's statistics.
        make_draw: () -> `StreamDraw` of the objective's own random numbers on the device.
        make_numbers: () -> NumPy generator for random choices on the host (which norm, the mixup coefficient).
        labelled: (N,) bool, False for pseudo-labels; None if all labels are true ones.
        target: (N, K) logits of the learner's target network at x, for objectives that use one.
        process_group, shard: the processes that share the batch, and the examples that this one has; None: all.
        memory_format: of images.
        mixed: the labels of images with CutMix; None without.
    """

    model: Callable
    x: torch.Tensor
    y: torch.Tensor
    craft: Callable
    make_draw: Callable = None
    make_numbers: Callable = None
    labelled: torch.Tensor | None = None
    target: torch.Tensor | None = None
    process_group: ProcessGroup = ALONE
    shard: Shard | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    mixed: MixedLabels | None = None

    def cross_entropy(self, logits: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy with the labels, or with those that CutMix has mixed."""
        if self.mixed is None:
            return F.cross_entropy(logits, self.y, label_smoothing=label_smoothing)
        return self.mixed.cross_entropy(logits, label_smoothing).mean()

    @property
    def weight(self) -> float:
        """The weight of the mean over these examples in the mean over the batch."""
        return self.shard.weight if self.shard else 1.0

    @property
    def size(self) -> int:
        """Number of examples of the whole batch."""
        return self.shard.total if self.shard else len(self.y)

    def total(self, number: torch.Tensor) -> torch.Tensor:
        """The sum of `number` over all processes, without a gradient; `number` may be overwritten."""
        return self.process_group.sum_(number)

    def whole(self, mine: torch.Tensor) -> torch.Tensor:
        """The tensor of the whole batch, gathered from all shards, without a gradient."""
        return self.process_group.whole(mine, self.shard, self.memory_format)

    @cached_property
    def draw(self) -> StreamDraw:
        return self.make_draw()

    @cached_property
    def numbers(self) -> np.random.Generator:
        return self.make_numbers()
