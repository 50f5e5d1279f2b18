"""A data set before its images are decoded: what metadata and the first image of each part tell."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from genray.data.reading import Reading


@dataclass(frozen=True, eq=False)
class Part:
    """Attributes:
    labels: (N,) int64, of all images that are taken.
    shape: (C, H, W) of the first image; others of a grey image's data set may have colours.
    read: decodes all images, (N, C, H, W) uint8.
    """

    labels: torch.Tensor
    shape: tuple[int, int, int]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return len(self.labels) * math.prod(self.shape)

    def decode(self, name: str, reading: Reading) -> torch.Tensor:
        """All images; `reading` shows how far that is, under this name."""
        reading.begin(name, len(self.labels))
        images = self.read()
        reading.end()
        return images

    def undecoded(self) -> torch.Tensor:
        """A tensor of the images' shape without pixels: it takes no memory."""
        return torch.empty((len(self.labels), *self.shape), dtype=torch.uint8, device="meta")


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
