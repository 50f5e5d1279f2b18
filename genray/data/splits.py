"""Labelled images, and the split that holds some of them out for validation."""

from dataclasses import dataclass, field
from typing import Any

import torch

from genray.core import rng
from genray.core.flat import from_array
from genray.data.homes import Home, Resident, Which
from genray.errors import DataError


@dataclass(frozen=True, eq=False, init=False)
class Split:
    """Labelled images.

    Attributes:
        home: where the images are; a tensor (N, C, H, W) uint8 is made a `Resident`.
        labels: (N,) int64, class numbers from 0, on the home's device.
        labelled: (N,) bool, whether a label is the data's own and no pseudo-label; None where all are.

    Raises:
        ValueError: dtypes or shapes differ from these.
    """

    home: Home
    labels: torch.Tensor
    labelled: torch.Tensor | None = None

    def __init__(self, images: Home | torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor | None = None):
        given = images if isinstance(images, torch.Tensor) else None
        for name, tensor, dtype, dims in (
            ("images", given, torch.uint8, 4),
            ("labels", labels, torch.int64, 1),
            ("labelled", labelled, torch.bool, 1),
        ):
            if tensor is None:
                continue
            if tensor.dtype != dtype or tensor.dim() != dims:
                raise ValueError(
                    f"{name}: expected {dtype} with {dims} dimensions, got {tensor.dtype} with {tensor.dim()}"
                )
            if len(tensor) != len(images):
                raise ValueError(f"{name}: expected one an image ({len(images)}), got {len(tensor)}")
        home = Resident(images) if isinstance(images, torch.Tensor) else images
        for name, value in (("home", home), ("labels", labels), ("labelled", labelled)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __reduce__(self) -> Any:
        """Labels as arrays, which a node's processes share in the object store."""
        labelled = None if self.labelled is None else self.labelled.numpy()
        return _of_arrays, (self.home, self.labels.numpy(), labelled)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.home.shape

    @property
    def images(self) -> torch.Tensor:
        """All images as one tensor, for few of them."""
        return self.home.take(slice(None))

    def take(self, which: Which = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (M, C, H, W) uint8 and labels (M,) of these examples, all by default; not to be written to."""
        return self.home.take(which), self.labels[which]

    def first(self, n: int, field: str = "num_examples") -> "Split":
        """The first n examples in stored order, sharing memory with this split.

        Raises:
            DataError: n is below 1 or above the number of examples; the message names `field`.
        """
        check_count(n, len(self), field)
        return self.select(slice(n))

    def select(self, which: Which) -> "Split":
        """The examples `which`, (M,) int64 or a slice, in that order."""
        return self._with(self.home.select(which), which)

    def keep(self, indices: torch.Tensor) -> "Split":
        """The examples at `indices`, (M,) int64 and rising, in the memory of this split, which is lost by that."""
        return self._with(self.home.keep(indices), indices)

    def to(self, device) -> "Split":
        """The same on a device, if its images can live there; sharing memory where it is there already.

        Raises:
            DataError: it does not fit there.
        """
        home = self.home.to(torch.device(device))
        labelled = None if self.labelled is None else self.labelled.to(home.device)
        return Split(home, self.labels.to(home.device), labelled)

    def _with(self, home, which):
        return Split(home, self.labels[which], None if self.labelled is None else self.labelled[which])


def _of_arrays(home, labels, labelled):
    return Split(home, from_array(labels), None if labelled is None else from_array(labelled))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: training and test examples with one image shape and one set of classes.

    Attributes:
        train, test: the two splits as the source stores them.
        class_names: K names; label k means class_names[k].
        source: the name of the source in `genray.data.datasets.SOURCES`.
        columns: `image_column` and `label_column` of Parquet files, as they were found; else empty.
        notes: what a user has to know of how the data was read, one line each.
        broken: part -> image files that are left out because they cannot be decoded.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str
    columns: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    broken: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K, at least 2."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.train.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.train.shape[1:]


def check_count(n: int, available: int, field: str) -> None:
    """Raises DataError naming `field` unless 1 <= n <= available."""
    if not 1 <= n <= available:
        raise DataError(f"{field}: expected 1 to {available} (the examples available), came {n}")


def validation_split(train: Split, num_examples: int, seed: int, *, in_place: bool = False) -> tuple[Split, Split]:
    """Holds class-balanced examples out of the training data, to choose checkpoints on.

    Every class that occurs gives num_examples // K examples, and a seeded choice of classes gives one more where K does
    not divide num_examples. The choice depends on the labels, num_examples and seed only.

    Args:
        train: the training examples.
        num_examples: size of the validation part; 0 gives an empty one.
        seed: fixes which examples are held out.
        in_place: the training part takes the memory of `train`, whose images are lost: no second copy is made.

    Returns:
        (train, validation), disjoint, together all of `train`, each in stored order. Neither is augmented.

    Raises:
        DataError: negative, or some class would have no example left for training; names data.validation_examples.
    """
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[balanced_choice(train.labels, num_examples, seed, field="data.validation_examples")] = True
    rest, validation = (~held_out).nonzero().flatten(), train.select(held_out.nonzero().flatten())
    return (train.keep(rest) if in_place else train.select(rest)), validation


def most_balanced(labels: torch.Tensor) -> int:
    """How many examples a balanced choice can have."""
    classes, counts = labels.unique(return_counts=True)
    return len(classes) * (int(counts.min()) - 1) if len(classes) else 0


def balanced_problem(labels: torch.Tensor, num_examples: int) -> str:
    """Why a balanced choice cannot have so many."""
    classes, counts = labels.unique(return_counts=True)
    smallest = int(counts.min()) if len(classes) else 0
    return (
        f"expected 0 to {most_balanced(labels)} (equally many of {len(classes)} classes, of which the smallest has "
        f"{smallest} training examples and keeps at least one), got {num_examples}"
    )


def balanced_choice(labels: torch.Tensor, num_examples: int, seed: int, *, field: str) -> torch.Tensor:
    """Indices, (num_examples,) int64, of a seeded choice with equally many examples of each class (or one more).

    Raises:
        DataError: impossible while leaving an example of each class; the message names `field`.
    """
    if not 0 <= num_examples <= most_balanced(labels):
        raise DataError(f"{field}: {balanced_problem(labels, num_examples)}")
    classes = labels.unique()
    share, rest = divmod(num_examples, max(len(classes), 1))
    one_more = set(_permutation(len(classes), seed, "classes")[:rest].tolist())
    chosen = []
    for place, label in enumerate(classes.tolist()):
        members = (labels == label).nonzero().flatten()
        quota = share + (place in one_more)
        chosen.append(members[_permutation(len(members), seed, "members", label)[:quota]])
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)


def _permutation(count: int, seed: int, *key: str | int) -> torch.Tensor:
    return torch.randperm(count, generator=rng.generator("cpu", seed, "balanced_choice", *key))
