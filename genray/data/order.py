"""Which examples an epoch takes and in which order, as a pure function of the epoch's number."""

from collections.abc import Callable

import torch

from genray.config.extra import share_of

_KEPT_ORDERS = 2  # epochs


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
    """Epochs over the first `own` examples whose batches all have the same share of the other, extra ones.

    Each group is an endless stream, one shuffled pass after another; a batch takes its share of the extra examples and
    fills up from the own ones (Carmon et al., 1905.13736, where both halves are of equal size).

    Args:
        own: length of an epoch; its last batch may be short.
        size: examples of both groups together.
        share: of extra examples in a batch; a batch of b takes share * b of them, rounded (halves up).
        batch_size: examples a batch.
        draw: (key parts) -> CPU generator.
    """

    def __init__(self, own: int, size: int, share: float, batch_size: int, draw: Callable):
        self.num_examples, self._draw = own, draw
        place = torch.arange(own)
        full, rest = divmod(own, batch_size)
        quotas = [share_of(share, batch_size)] * full + [share_of(share, rest)]
        self._is_extra = place % batch_size < torch.tensor(quotas)[place // batch_size]
        self._groups = ("own", ~self._is_extra, 0, own), ("extra", self._is_extra, own, size - own)

    def __call__(self, epoch: int) -> torch.Tensor:
        """(num_examples,) int64, indices of the examples."""
        order = torch.empty(self.num_examples, dtype=torch.int64)
        for name, here, first, size in self._groups:
            count = int(here.sum())
            if count:
                order[here] = first + self._stream(name, size, epoch * count, count)
        return order

    def _stream(self, name, size, start, count):
        """Places [start, start + count) of a group's stream."""
        passes = range(start // size, (start + count - 1) // size + 1)
        orders = [torch.randperm(size, generator=self._draw("order", name, number)) for number in passes]
        return torch.cat(orders)[start - passes[0] * size :][:count]


class Batches:
    """The places of the examples of each step.

    Args:
        order: of an epoch's examples.
        batch_size: examples a batch.
        drop_last: whether the short last batch of an epoch is left out.
        device: of the places.
    """

    def __init__(self, order: Shuffled | Shares, batch_size: int, drop_last: bool, device: torch.device):
        self.order, self._batch_size, self._device = order, batch_size, device
        full, rest = divmod(order.num_examples, batch_size)
        self.steps_per_epoch = full if drop_last or rest == 0 else full + 1
        self._kept: dict[int, torch.Tensor] = {}  # the batches that are decoded ahead may be of the next epoch

    def __call__(self, step: int) -> torch.Tensor:
        """(B,) int64.

        Raises:
            ValueError: negative step.
        """
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._kept:
            places = self.order(epoch)
            if self._device.type == "cuda":  # pinned memory lets the copy run without waiting
                places = places.pin_memory()
            if len(self._kept) == _KEPT_ORDERS:
                del self._kept[next(iter(self._kept))]
            self._kept[epoch] = places.to(self._device, non_blocking=True)
        return self._kept[epoch][position * self._batch_size :][: self._batch_size]
