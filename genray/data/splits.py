"""Examples in memory, and the split that holds some of them out for validation."""

from dataclasses import dataclass, field

import torch

from genray.core import rng
from genray.core.memory import check_memory, free_on
from genray.errors import DataError

_MOVED_AT_ONCE = 4096  # examples


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, class numbers from 0.
        labelled: (N,) bool, whether a label is the data's own and no pseudo-label; None where all are.

    Raises:
        ValueError: dtypes or shapes differ from these.
    """

    images: torch.Tensor
    labels: torch.Tensor
    labelled: torch.Tensor | None = None

    def __post_init__(self):
        for name, tensor, dtype, dims in (
            ("images", self.images, torch.uint8, 4),
            ("labels", self.labels, torch.int64, 1),
            ("labelled", self.labelled, torch.bool, 1),
        ):
            if tensor is None and name == "labelled":
                continue
            if tensor.dtype != dtype or tensor.dim() != dims:
                raise ValueError(
                    f"{name}: expected {dtype} with {dims} dimensions, got {tensor.dtype} with {tensor.dim()}"
                )
        for name in ("labels", "labelled"):
            tensor = getattr(self, name)
            if tensor is not None and self.images.shape[0] != tensor.shape[0]:
                raise ValueError(f"{name}: expected one an image ({self.images.shape[0]}), got {tensor.shape[0]}")

    def __len__(self) -> int:
        return self.labels.shape[0]

    def first(self, n: int, field: str = "num_examples") -> "Split":
        """The first n examples in stored order, sharing memory with this split.

        Raises:
            DataError: n is below 1 or above the number of examples; the message names `field`.
        """
        check_count(n, len(self), field)
        return self._part(slice(n))

    def select(self, indices: torch.Tensor) -> "Split":
        """A copy of the examples at `indices`, (M,) int64, in that order."""
        return self._part(indices)

    def keep(self, indices: torch.Tensor) -> "Split":
        """The examples at `indices`, (M,) int64 and rising, in the memory of this split, which is lost by that."""
        for start in range(0, len(indices), _MOVED_AT_ONCE):
            some = indices[start : start + _MOVED_AT_ONCE]
            self.images[start : start + len(some)] = self.images[some]
        labelled = None if self.labelled is None else self.labelled[indices]
        return Split(self.images[: len(indices)], self.labels[indices], labelled)

    def to(self, device) -> "Split":
        """The same on a device; sharing memory where it is there already.

        Raises:
            DataError: it does not fit there.
        """
        device = torch.device(device)
        if device.type != self.images.device.type:
            check_memory(self.images.nbytes, f"{len(self)} images on {device}", free_on(device))
        parts = (self.images, self.labels, self.labelled)
        return Split(*(None if part is None else part.to(device) for part in parts))

    def _part(self, which) -> "Split":
        labelled = None if self.labelled is None else self.labelled[which]
        return Split(self.images[which], self.labels[which], labelled)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: training and test examples with one image shape and one set of classes.

    Attributes:
        train, test: the two splits as the source stores them.
        class_names: K names; label k means class_names[k].
        source: the name of the source in `genray.data.datasets.SOURCES`.
        columns: `image_column` and `label_column` of Parquet files, as they were found; else empty.
        notes: what a user has to know of how the data was read, one line each.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str
    columns: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K, at least 2."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        height, width = self.train.images.shape[2:]
        return height, width


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
