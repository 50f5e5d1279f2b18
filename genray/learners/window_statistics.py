"""What a learner counts while it runs a window."""

from dataclasses import dataclass

import torch

from genray.parallel.process_group import ProcessGroup


@dataclass(frozen=True)
class WindowStats:
    """What a learner did in a window; sums over its training images, on the inputs it trained on.

    Attributes:
        seconds: the window took, and of these
        attack_seconds: crafting adversarial images, and
        averaging_seconds: the learner's average and its share of theta_g; the rest are its optimiser steps.
        transfer_seconds: before the window, copying its share out of the device's memory and theta_g into it.
        waiting_seconds: since its last window, apart from that: for theta_g, for other learners, for its next call.
        radius_mean, radius_spread: with a radius per example, mean and standard deviation of a batch's radii.
    """

    start: int
    stop: int
    loss_sum: float
    num_correct: int
    num_examples: int
    learning_rate: float
    seconds: float
    attack_seconds: float = 0.0
    averaging_seconds: float = 0.0
    transfer_seconds: float = 0.0
    waiting_seconds: float = 0.0
    radius_mean: float | None = None
    radius_spread: float | None = None


class StatsAccumulator:
    """Losses and right answers of a window, kept on the device so that no step waits for it.

    Args:
        process_group: the processes that share the batches.
        device: where the numbers are.
    """

    def __init__(self, process_group: ProcessGroup, device):
        self.process_group = process_group
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.num_correct = torch.zeros((), device=device, dtype=torch.int64)
        self.num_examples, self.losses, self.shares = 0, [], []

    def add(self, loss, correct, shard):
        """A step's: the mean loss of a part of the batch and how many of it were right."""
        self.losses.append(loss)
        self.shares.append(shard.weight)
        self.loss_sum += loss.double() * len(shard)
        self.num_correct += correct
        self.num_examples += shard.total

    def settle(self):
        """Adds up what the processes counted, once a window: `losses` are then those of whole batches."""
        self.losses = torch.stack(self.losses) if self.losses else torch.zeros(0)
        if self.process_group.size > 1:
            self.losses = self.process_group.sum_(self.losses * torch.tensor(self.shares).to(self.losses))
            self.process_group.sum_(self.loss_sum)
            self.process_group.sum_(self.num_correct)
