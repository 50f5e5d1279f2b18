"""Which examples an epoch takes and in which order, as a pure function of the epoch's number."""

from collections.abc import Callable

import torch

from genray.config.unlabeled import share_of


class Shuffled:
    """Every example once an epoch.

    Args:
        size: how many there are.
        draw: (key parts) -> CPU generator.
    """

    def __init__(self, size: int, draw: Callable):
        self.num_examples, self._draw = size, draw

    def __call__(self, epoch: int) -> torch.Tensor:
        """(num_examples,) int64, indices of the examples."""
        return torch.randperm(self.num_examples, generator=self._draw("order", epoch))


class Shares:
    """Epochs of a given length whose batches all have the same share of pseudo-labelled examples.

    Labelled and pseudo-labelled examples are two endless streams, each one shuffled pass after another; a batch takes
    its share of the one and fills up from the other (Carmon et al., 1905.13736, where both halves are of equal size).

    Args:
        labelled: (N,) bool.
        share: of pseudo-labelled examples in a batch; a batch of b takes share * b of them, rounded (halves up).
        num_examples: length of an epoch; the last batch may be short.
        batch_size: examples a batch.
        draw: (key parts) -> CPU generator.
    """

    def __init__(self, labelled: torch.Tensor, share: float, num_examples: int, batch_size: int, draw: Callable):
        self.num_examples, self._draw = num_examples, draw
        self._members = {"labelled": labelled.nonzero().flatten(), "pseudo-labelled": (~labelled).nonzero().flatten()}
        place = torch.arange(num_examples)
        start = place // batch_size * batch_size
        quotas = {size: share_of(share, size) for size in {batch_size, num_examples % batch_size}}
        sizes = torch.clamp(num_examples - start, max=batch_size)
        quota = torch.zeros_like(sizes)
        for size, number in quotas.items():
            quota[sizes == size] = number
        self._is_pseudo = place - start < quota

    def __call__(self, epoch: int) -> torch.Tensor:
        """(num_examples,) int64, indices of the examples."""
        order = torch.empty(self.num_examples, dtype=torch.int64)
        for kind, here in (("labelled", ~self._is_pseudo), ("pseudo-labelled", self._is_pseudo)):
            count = int(here.sum())
            order[here] = self._stream(kind, epoch * count, count)
        return order

    def _stream(self, kind, start, count):
        """Examples [start, start + count) of a stream."""
        members = self._members[kind]
        if not count:
            return members[:0]
        passes = range(start // len(members), (start + count - 1) // len(members) + 1)
        orders = [torch.randperm(len(members), generator=self._draw("order", kind, number)) for number in passes]
        skip = start - passes[0] * len(members)
        return members[torch.cat(orders)[skip : skip + count]]
