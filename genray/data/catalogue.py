"""A data set before its images are decoded: what metadata and the first image of each part tell."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Broken = list[tuple[int, str]]  # index and file of each image that cannot be decoded
Allocate = Callable[[tuple[int, ...]], Any]  # (N, C, H, W) -> what takes slices of images: a tensor, or a file


class Encoded(Protocol):
    """Image files by their number; `local` is whether they are on this machine."""

    local: bool

    def __len__(self) -> int: ...
    def blob(self, index: int) -> bytes | None: ...
    def where(self, index: int) -> str: ...
    def digest(self, index: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Part:
    """Attributes:
    labels: (N,) int64, of all images that are taken.
    shape: (C, H, W) of the first image; others of a grey image's data set may have colours.
    read: decodes all images into what an allocator makes, None for a tensor, (M, C, H, W) uint8; also gives those that
        are left out.
    mark: stands for the images as they are stored now.
    files: the image files, where each is a file of its own.
    blobs: all image files in order, where they are not; None if images are not stored as such.
    places: (file, rows) of those, for messages.
    """

    labels: torch.Tensor
    shape: tuple[int, int, int]
    read: Callable[[Allocate | None], tuple[Any, Broken]]
    mark: Callable[[], str]
    files: Encoded | None = None
    blobs: Callable[[], Iterator[bytes | None]] | None = None
    places: Sequence[tuple[str, int]] = ()

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return len(self.labels) * math.prod(self.shape)

    def undecoded(self) -> torch.Tensor:
        """A tensor of the images' shape without pixels: it takes no memory."""
        return torch.empty((len(self.labels), *self.shape), dtype=torch.uint8, device="meta")


def row_name(places: Sequence[tuple[str, int]], index: int) -> str:
    """Where an image stands that is one of the rows of several files."""
    for path, rows in places:
        if index < rows:
            return f"{path}, row {index}"
        index -= rows
    raise IndexError(index)


def without(values: torch.Tensor, broken: Broken) -> torch.Tensor:
    """Labels or marks, without those of the images that are left out."""
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[[index for index, _ in broken]] = False
    return values[kept] if broken else values


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Attributes:
    parts: "train" and "test".
    class_names: K names.
    columns: `image_column` and `label_column` of Parquet files, as they were found.
    """

    parts: dict[str, Part]
    class_names: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
