"""Processes that compute one batch together: each one's shard of the batch, and the operations between them.

By default the group has one process: its shard is the whole batch, and `sum_` and `broadcast_` change nothing.
`parallel/torch_groups.py` has the process groups of torch.distributed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """Examples [start, stop) of a batch of `total`."""

    start: int
    stop: int
    total: int

    def __len__(self):
        return self.stop - self.start

    @property
    def weight(self) -> float:
        """Fraction of the batch in this shard: the weight of the shard's mean in the batch mean."""
        return len(self) / self.total

    def of(self, batch):
        """The shard's rows of a tensor of the whole batch; None if `batch` is None."""
        return batch if batch is None or len(self) == self.total else batch[self.start : self.stop]


class ProcessGroup:
    """Processes that run in lockstep: each makes the same calls in the same order.

    This one has a single process; subclasses override `sum_`, `begin_sum` and `broadcast_`.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank, size = 0, 1

    def shard(self, total: int) -> Shard:
        """This process's shard of a batch of `total`; sizes differ by at most one and may be 0."""
        return Shard(total * self.rank // self.size, total * (self.rank + 1) // self.size, total)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces the tensor by the sum over all processes, with the same bits in each.

        It must be contiguous, of the same shape and type in every process, and not part of an autograd graph.
        """
        return tensor

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Begins `sum_`; the tensor must not be used before the function that it returns has returned."""
        return lambda: None

    def broadcast_(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrites the tensor in every process with that of rank `source`."""
        return tensor

    def whole(self, mine: torch.Tensor, shard: Shard, memory_format=torch.contiguous_format) -> torch.Tensor:
        """Gathers the whole batch from all shards, bit for bit except for the sign of zeros.

        Args:
            mine: (len(shard), ...), without gradients.
            shard: the rows of the batch that `mine` holds.
            memory_format: of the result, for images.
        """
        if self.size == 1:
            return mine
        # With one channel both formats are one order; the plain one's strides are those of the loader's images.
        if memory_format == torch.channels_last and mine.dim() == 4 and mine.shape[1] > 1:
            return self.whole(mine.permute(0, 2, 3, 1), shard).permute(0, 3, 1, 2)
        batch = torch.zeros((shard.total, *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
        batch[shard.start : shard.stop] = mine  # adding zeros changes nothing
        return self.sum_(batch)

    def __deepcopy__(self, memo):
        return self  # copies of a network keep its process group


ALONE = ProcessGroup()
