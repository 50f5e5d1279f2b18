"""Where the random numbers of an attack come from."""

import copy

import torch

from genray.core.rng import generator
from genray.parallel.process_group import Shard


class StreamDraw:
    """Draws from one generator: for training, where the generator is keyed by (seed, learner, step).

    Args:
        stream: the generator.
        shard: of the batch, where several processes share it: each draws for the whole batch and takes its rows, so
            that all together use the numbers that one alone would.
    """

    def __init__(self, stream: torch.Generator, shard: Shard | None = None):
        self.stream, self.shard = stream, shard

    def uniform(self, like):
        """One number for each of `like`, whose rows are examples."""
        return self._rows(torch.rand, like)

    def normal(self, like):
        """The same, normally distributed."""
        return self._rows(torch.randn, like)

    def uniform_for_all(self, like):
        """One number for each of `like`, whatever part of the batch is at hand."""
        return torch.rand(like.shape, generator=self.stream, device=like.device, dtype=like.dtype)

    def permutation(self, like):
        """(N,) int64, for each example another one of the batch, in a random order of all."""
        total = self.shard.total if self.shard else len(like)
        return self._part_of(torch.randperm(total, generator=self.stream, device=like.device), like)

    def _rows(self, draw, like):
        total = self.shard.total if self.shard else len(like)
        shape = (total, *like.shape[1:])
        return self._part_of(draw(shape, generator=self.stream, device=like.device, dtype=like.dtype), like)

    def _part_of(self, rows, like):
        mine = self.shard.of(rows) if self.shard else rows
        if len(mine) != len(like):
            raise ValueError(f"draws for {len(mine)} examples wanted by {len(like)}")
        return mine


class ExampleDraw:
    """Draws for each example from its own generator: for evaluation, where a number must not change with the batch
    size, the sharding or the device.

    Args:
        seed: of the evaluation.
        attack: name of the attack (and restart).
        indices: index of each example of the batch in its data set.
    """

    def __init__(self, seed: int, attack: str, indices):
        self.streams = [generator("cpu", seed, "attack", attack, int(i)) for i in indices]

    def of(self, rows) -> "ExampleDraw":
        """The draws of some of the batch's examples; they go on from where these are."""
        part = copy.copy(self)
        part.streams = [self.streams[row] for row in rows]
        return part

    def uniform(self, like):
        return self._stack(torch.rand, like)

    def normal(self, like):
        return self._stack(torch.randn, like)

    def _stack(self, draw, like):
        rows = [draw(like.shape[1:], generator=stream, dtype=like.dtype) for stream in self.streams]
        return torch.stack(rows).to(like.device)
