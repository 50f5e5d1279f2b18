"""Several processes on one piece of work: which part of a batch each has, and what they tell each other.

A crew of one is the rule; its parts are whole and its sums are what they were. How a larger one talks is
`parallel/torch_groups.py`'s business: two operations are all that is needed.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """Examples [start, stop) of a batch of `total`."""

    start: int
    stop: int
    total: int

    def __len__(self):
        return self.stop - self.start

    @property
    def share(self) -> float:
        """Of the batch: what a mean over the part counts in the mean over the batch."""
        return len(self) / self.total

    def of(self, batch):
        """The part's rows of a tensor of the whole batch; None of None."""
        return batch if batch is None or len(self) == self.total else batch[self.start : self.stop]


class Crew:
    """Processes that work together, in step: each makes the same calls in the same order.

    This one is a crew of one; others override `sum_` and `broadcast_`.

    Attributes:
        rank: number of this process among them, from 0.
        size: how many they are.
    """

    rank, size = 0, 1

    def part(self, total: int) -> Part:
        """This process's part of a batch: sizes differ by one at most, and may be 0."""
        return Part(total * self.rank // self.size, total * (self.rank + 1) // self.size, total)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up everybody's tensor, in place; contiguous, of one shape and type, and no part of a graph.

        Every process gets the same bits.
        """
        return tensor

    def broadcast_(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrites everybody's tensor with that of rank `source`."""
        return tensor

    def whole(self, mine: torch.Tensor, part: Part, memory_format=torch.contiguous_format) -> torch.Tensor:
        """The whole batch from everybody's part, bit for bit but for the sign of zeros.

        Args:
            mine: (len(part), ...) without gradients.
            part: where it stands.
            memory_format: of the result, for images.
        """
        if self.size == 1:
            return mine
        # With one channel both formats are one order; the plain one's strides are those of the loader's images.
        if memory_format == torch.channels_last and mine.dim() == 4 and mine.shape[1] > 1:
            return self.whole(mine.permute(0, 2, 3, 1), part).permute(0, 3, 1, 2)
        batch = torch.zeros((part.total, *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
        batch[part.start : part.stop] = mine  # adding zeros changes nothing
        return self.sum_(batch)

    def __deepcopy__(self, memo):
        return self  # copies of a network stay with its crew


ALONE = Crew()
