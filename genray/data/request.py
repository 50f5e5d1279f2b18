"""What every data source is asked for and the checks that all of them share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from genray.data.reading import Reading
from genray.data.splits import check_count
from genray.errors import DataError

PARTS = ("train", "test")


@dataclass(frozen=True)
class DataRequest:
    """The arguments of `load_image_data`, documented there.

    Attributes:
        reading: is told what is read.
        skips: whether images that cannot be decoded are left out.
        refuses: whether more examples than there are are an error; else all are taken, and somebody else compares.
        available: "train" and "test" -> examples that are there in all, once they are counted.
    """

    source: str
    path: Any = None
    image_column: str | None = None
    label_column: str | None = None
    download: bool = True
    image_size: tuple[int, int] | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    reading: Reading = field(default_factory=Reading)
    refuses: bool = True
    skips: bool = False
    available: dict = field(default_factory=dict)

    def count(self, part: str, available: int) -> int:
        """How many examples of `part` ("train" or "test") to take; DataError names data.<part>_examples."""
        wanted = {"train": self.train_examples, "test": self.test_examples}[part]
        self.available[part] = available
        if wanted is None:
            return available
        if self.refuses:
            check_count(wanted, available, f"data.{part}_examples")
        return min(wanted, available)

    def require_path(self) -> Any:
        """The path, or DataError where the source cannot do without one."""
        if self.path is None:
            raise DataError(f'data.path: the source "{self.source}" needs a folder or URI, came nothing')
        return self.path

    def refuse(self, *fields: str) -> None:
        """DataError if a field is given that this source has no use for: an option without effect misleads."""
        for name in fields:
            if getattr(self, name) is not None:
                raise DataError(
                    f'data.{name}: expected nothing, since the source "{self.source}" does not use it; '
                    f"came {getattr(self, name)!r}"
                )


def resolve_classes(
    labels: dict[str, torch.Tensor], names: Sequence[str] | None, locate: Callable[[str, int], str]
) -> tuple[str, ...]:
    """Checks every label and returns the class names.

    Args:
        labels: "train" and "test" -> (N,) int64, all that the source holds, before any limit.
        names: class names if the source knows them; otherwise "0".."K-1", K counted from the training labels.
        locate: (part, index) -> where that label stands, for messages.

    Raises:
        DataError: an empty part, fewer than two classes, a label outside 0..K-1, or (without names) a class in between
            that never occurs.
    """
    for part in PARTS:
        if len(labels[part]) == 0:
            raise DataError(f"{part} data: expected at least 1 example, came 0")
    present = labels["train"].unique().tolist()
    num_classes = len(names) if names is not None else len(present)
    if num_classes < 2:
        raise DataError(f"class labels: expected at least 2 classes, came {num_classes}")
    for part in PARTS:
        wrong = ((labels[part] < 0) | (labels[part] >= num_classes)).nonzero().flatten()
        if len(wrong):
            index = int(wrong[0])
            raise DataError(
                f"{locate(part, index)}: expected a class label from 0 to {num_classes - 1} "
                f"({num_classes} classes in the training data), came {int(labels[part][index])}"
            )
    return tuple(names) if names is not None else tuple(str(k) for k in range(num_classes))
