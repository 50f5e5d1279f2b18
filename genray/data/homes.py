"""Where the images of a split are: in memory, in a mapped file, or in encoded files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from genray.core.flat import from_array
from genray.core.memory import check_memory, free_on
from genray.data.fingerprint import digests

Which = slice | torch.Tensor  # consecutive examples, or (M,) int64
_AT_ONCE = 4096  # images


class Home(ABC):
    """Images of one shape, in an order.

    Attributes:
        shape: (C, H, W).
        device: where `take` wants the places and puts the images.
        nbytes: of the images that are in memory.
    """

    shape: tuple[int, int, int]
    device = torch.device("cpu")
    nbytes = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, which: Which) -> torch.Tensor:
        """(M, C, H, W) uint8, the images at these places; not to be written to."""

    @abstractmethod
    def select(self, which: Which) -> "Home":
        """A home of these images alone; a slice of it shares memory with this one."""

    def keep(self, indices: torch.Tensor) -> "Home":
        """As `select` for rising indices; this home may lose its images by that."""
        return self.select(indices)

    def to(self, device: torch.device) -> "Home":
        """The same on a device, if that is where such images live.

        Raises:
            DataError: it does not fit there.
        """
        return self

    def digests(self) -> Iterator[bytes]:
        """32 bytes for each image, which tell it from others."""
        for start in range(0, len(self), _AT_ONCE):
            yield from digests(self.take(slice(start, start + _AT_ONCE)))


class Resident(Home):
    """Images in one tensor on a device.

    Args:
        images: (N, C, H, W) uint8.
    """

    def __init__(self, images: torch.Tensor):
        self.images, self.device, self.nbytes = images, images.device, images.nbytes
        self.shape = tuple(images.shape[1:])  # type: ignore[assignment]

    def __len__(self):
        return len(self.images)

    def __reduce__(self) -> Any:
        """As an array, which a node's processes share in the object store."""
        return _of_array, (self.images.numpy(),)

    def take(self, which):
        return self.images[which]

    def select(self, which):
        return Resident(self.images[which])

    def keep(self, indices):
        """Moves the images, so that there is no second copy."""
        for start in range(0, len(indices), _AT_ONCE):
            some = indices[start : start + _AT_ONCE]
            self.images[start : start + len(some)] = self.images[some]
        return Resident(self.images[: len(indices)])

    def to(self, device):
        if device.type != self.device.type:
            check_memory(self.nbytes, f"{len(self)} images on {device}", free_on(device))
        return Resident(self.images.to(device))


def _of_array(array):
    return Resident(from_array(array))
