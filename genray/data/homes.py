"""Where the images of a split are: in memory, in a mapped file, or in encoded files."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from genray.core.flat import from_array
from genray.core.memory import check_memory, free_on
from genray.data.cache import CacheFile, Stored
from genray.data.catalogue import Encoded
from genray.data.fingerprint import digests
from genray.data.images import ImageStack, shape_of
from genray.data.reading import Reading
from genray.errors import DataError

Which = slice | torch.Tensor  # consecutive examples, or (M,) int64
_AT_ONCE = 4096  # images


class Home(ABC):
    """Images of one shape, in an order.

    Attributes:
        shape: (C, H, W).
        device: where `take` wants the places and puts the images.
        nbytes: of the images that are in memory.
    decodes: whether `take` decodes image files, which is worth processes of its own.
    local: whether all that it reads is on this machine.
    """

    shape: tuple[int, int, int]
    device = torch.device("cpu")
    nbytes = 0
    decodes = False
    local = True

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

    def with_channels(self, channels: int) -> "Home":
        """The same, with grey images as colours if `channels` is 3."""
        if channels == self.shape[0]:
            return self
        other = copy.copy(self)
        other.shape = (channels, *self.shape[1:])
        return other

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

    def with_channels(self, channels):
        wanted = (-1, channels, -1, -1)
        return self if channels == self.shape[0] else Resident(self.images.expand(wanted).contiguous())

    def to(self, device):
        if device.type != self.device.type:
            check_memory(self.nbytes, f"{len(self)} images on {device}", free_on(device))
        return Resident(self.images.to(device))


def _of_array(array):
    return Resident(from_array(array))


class _Rows(Home):
    """Images that are not in memory; `rows`, (N,) int64, are their places in what holds them."""

    rows: torch.Tensor

    def __len__(self):
        return len(self.rows)

    def select(self, which):
        other = copy.copy(self)
        other.rows = self.rows[which]
        return other


class Mapped(_Rows):
    """Images in a cache file that is mapped into memory.

    Args:
        stored: what the file is made from.
        file: of the kind `pixels`.
    """

    def __init__(self, stored: Stored, file: CacheFile):
        self.stored, self.file, self.shape = stored, file, tuple(file.header["shape"])
        self._pixels = file.payload.reshape(-1, *self.shape)
        self.rows = torch.arange(len(self._pixels))

    def __reduce__(self) -> Any:
        """The place of the file, which another node makes for itself."""
        return _of_stored, (self.stored, self.file.header["content"], self.shape, self.rows.numpy())

    def take(self, which):
        images = torch.from_numpy(self._pixels[self.rows[which].numpy()])
        self.file.forget()
        return images.expand(-1, *self.shape).contiguous()  # grey images among colours

    def digests(self):
        if self.shape != tuple(self.file.header["shape"]):
            yield from super().digests()
            return
        found = self.file.array("digests")
        for start in range(0, len(self), _AT_ONCE):
            yield from map(bytes, found[self.rows[start : start + _AT_ONCE].numpy()])
            self.file.forget()


def _of_stored(stored, content, shape, rows):
    home = Mapped(stored, stored.open("pixels", content=content))
    home.shape, home.rows = shape, from_array(rows)
    return home


class Files(_Rows):
    """Images in encoded files, which are decoded when they are taken.

    Args:
        files: the files.
        image_size: (H, W) to resize all images to; None if they must agree in size.
        shape: (C, H, W) of the images.
        rows: places of the images in `files`.
    """

    decodes = True

    def __init__(self, files: Encoded, image_size: tuple[int, int] | None, shape, rows: torch.Tensor):
        self.files, self.image_size, self.shape, self.rows, self.local = files, image_size, shape, rows, files.local

    def take(self, which):
        places = self.rows[which].tolist()
        if not places:
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        # A decoding process is one of several already.
        stack = ImageStack(len(places), self.image_size, Reading(), threads=get_worker_info() is None)
        stack.append([self.files.blob(place) for place in places], lambda index: self.files.where(places[index]))
        images = stack.finish()
        channels, *size = images.shape[1:]
        if tuple(size) != self.shape[1:]:
            raise DataError(
                f"{self.files.where(places[0])}: expected {self.shape[1]}x{self.shape[2]} pixels (H x W) like the "
                f"first image, came {size[0]}x{size[1]}; set data.image_size to resize all images"
            )
        if channels > self.shape[0]:
            where = next(name for place in places if self._is_coloured(name := self.files.where(place), place))
            raise DataError(f"{where}: expected a grey image like the first, came colours; set data.home to mapped")
        return images.expand(-1, *self.shape).contiguous()

    def _is_coloured(self, name, place):
        return shape_of([(name, self.files.blob(place))], None, False)[0] == 3

    def digests(self):
        yield from map(self.files.digest, self.rows.tolist())


class Joined(_Rows):
    """The images of several homes, one home after another; those of a device stay on the CPU."""

    def __init__(self, homes: Sequence[Home]):
        self.homes, self.shape = homes, homes[0].shape
        self.decodes = any(home.decodes for home in homes)
        self.local = all(home.local for home in homes)
        self.nbytes = sum(home.nbytes for home in homes)
        self.rows = torch.arange(sum(map(len, homes)))

    def take(self, which):
        places, start = self.rows[which], 0
        images = torch.empty(len(places), *self.shape, dtype=torch.uint8)
        for home in self.homes:
            here = (places >= start) & (places < start + len(home))
            images[here] = home.take(places[here] - start)
            start += len(home)
        return images

    def digests(self):
        if torch.equal(self.rows, torch.arange(sum(map(len, self.homes)))):
            for home in self.homes:  # a mapped one has them in its file
                yield from home.digests()
        else:
            yield from super().digests()


def join(first: Home, second: Home) -> Home:
    """The images of both; in one tensor if both are in memory."""
    if isinstance(first, Resident) and isinstance(second, Resident):
        return Resident(torch.cat([first.images, second.images]))
    return Joined([first, second])
