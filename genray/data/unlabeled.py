"""Training images without labels: labels that are dropped, or images of another source whose labels are ignored."""

import contextlib
import zipfile
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from genray.config.schema import DataConfig
from genray.core import rng
from genray.data.files import Folder, local_folder, open_file
from genray.data.images import ImageStack
from genray.data.parquet import find_image_column, unlabeled_shards
from genray.data.request import one_line
from genray.data.sources import DEFAULT_ROOT, image_files, open_torchvision
from genray.data.splits import UNLABELED, Split
from genray.errors import DataError

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """What base learners train on.

    Attributes:
        split: the training `Split`; images without a label have the label UNLABELED.
        epoch_examples: images an epoch.
        dropped_labels: (M,) int64, the true labels of the unlabelled images in order, to count right pseudo-labels by;
            None where they are not known. No learner ever sees them.
    """

    split: Split
    epoch_examples: int
    dropped_labels: torch.Tensor | None = None


def with_unlabeled(train: Split, data: DataConfig) -> TrainingImages:
    """The training images as `data.unlabeled` asks for them.

    Args:
        train: the labelled training images, the validation part taken out.
        data: the section `data`.

    Raises:
        DataError: the unlabelled images are absent, unreadable or do not fit the training images.
    """
    options = data.unlabeled
    if options is None:
        return TrainingImages(train, len(train))
    if options.source == "fraction":
        dropped = dropped_labels(train.labels, options.fraction, options.class_balanced, options.seed)
        if not options.is_used:
            return TrainingImages(train.select((~dropped).nonzero().flatten()), len(train))
        split = Split(train.images, train.labels.masked_fill(dropped, UNLABELED), ~dropped)
        return TrainingImages(split, len(train), train.labels[dropped])
    if not options.is_used:
        return TrainingImages(train, len(train))
    images = load_unlabeled(data, train.images.shape[1:])
    unknown = torch.full((len(images),), UNLABELED)
    split = Split(
        torch.cat([train.images, images]),
        torch.cat([train.labels, unknown]),
        torch.cat([torch.ones(len(train), dtype=torch.bool), torch.zeros(len(images), dtype=torch.bool)]),
    )
    return TrainingImages(split, len(split) if options.batch_share is None else len(train))


def dropped_labels(labels: torch.Tensor, fraction: float, class_balanced: bool, seed: int) -> torch.Tensor:
    """A seeded choice of round(fraction * N) images whose labels are dropped.

    Args:
        labels: (N,) int64; looked at only for a class-balanced choice, which takes the same share of every class, up to
            one image.
        fraction: above 0, below 1.
        class_balanced, seed: how the choice is made.

    Returns:
        (N,) bool.

    Raises:
        DataError: no label would be dropped, or none kept (of a class, in a class-balanced choice).
    """
    size = len(labels)
    number = int(fraction * size + 0.5)
    if not 0 < number < size:
        raise DataError(
            f"data.unlabeled.fraction: expected to drop 1 to {size - 1} of {size} labels, came {fraction:g}, which "
            f"drops {number}"
        )
    dropped = torch.zeros(size, dtype=torch.bool)
    if not class_balanced:
        dropped[_permutation(size, seed)[:number]] = True
        return dropped
    classes, counts = labels.unique(return_counts=True)
    for label, count, quota in zip(classes.tolist(), counts.tolist(), _quotas(counts, number, seed)):
        if quota == count:
            raise DataError(
                f"data.unlabeled.fraction: expected to keep a label of every class, came {fraction:g}, which keeps "
                f"none of the {count} of class {label}"
            )
        members = (labels == label).nonzero().flatten()
        dropped[members[_permutation(count, seed, "members", label)[:quota]]] = True
    return dropped


def _quotas(counts, number, seed) -> list[int]:
    """Each class's part of `number`: rounded down, then one more for those with the largest remainders; a draw decides
    between equal ones."""
    total = int(counts.sum())
    quotas = [number * count // total for count in counts.tolist()]
    remainders = [number * count % total for count in counts.tolist()]
    lot = _permutation(len(quotas), seed, "classes").tolist()
    for place in sorted(range(len(quotas)), key=lambda k: (-remainders[k], lot[k]))[: number - sum(quotas)]:
        quotas[place] += 1
    return quotas


def _permutation(count, seed, *key):
    return torch.randperm(count, generator=rng.generator("cpu", seed, "dropped labels", *key))


# --- images of another source -----------------------------------------------------------------------------------------


def load_unlabeled(data: DataConfig, shape) -> torch.Tensor:
    """Images of `data.unlabeled`, (M, C, H, W) uint8, in stored order.

    Args:
        data: the section `data`.
        shape: (C, H, W) of the training images.

    Raises:
        DataError: absent, unreadable, too few, or of another shape; names data.unlabeled.
    """
    options = data.unlabeled
    load = {"svhn_extra": _svhn_extra, "parquet": _parquet, "image_folder": _image_folder, "npz": _npz}[options.source]
    with _named_after_the_section():
        images = load(data, tuple(shape[1:]) if options.resize else None)
    if tuple(images.shape[1:]) != tuple(shape):
        raise DataError(
            f"data.unlabeled: expected images of the training images' shape {tuple(shape)} (C, H, W), came "
            f"{tuple(images.shape[1:])}"
        )
    return images


@contextlib.contextmanager
def _named_after_the_section():
    """What is shared with `data.source` names its fields in messages."""
    try:
        yield
    except DataError as error:
        text = str(error).replace("data.image_size to resize", "data.unlabeled.resize: true to resize")
        for field in ("path", "image_column"):
            text = text.replace(f"data.{field}", f"data.unlabeled.{field}")
        raise DataError(text) from error


def _count(options, available) -> int:
    if available == 0:
        raise DataError(f"data.unlabeled: expected at least 1 image, came 0 from source {options.source}")
    if options.examples is not None and options.examples > available:
        raise DataError(
            f"data.unlabeled.examples: expected 1 to {available} (the images available), came {options.examples}"
        )
    return options.examples or available


def _svhn_extra(data, image_size):
    """The 531,131 images that SVHN's authors call easier; beside `data.path` where the run trains on SVHN."""
    path = data.unlabeled.path or (data.path if data.source == "svhn" else None)
    images = open_torchvision("svhn", local_folder(path or DEFAULT_ROOT, "svhn_extra"), "extra", data.download).data
    return torch.from_numpy(np.ascontiguousarray(images[: _count(data.unlabeled, len(images))]))


def _parquet(data, image_size):
    """The Parquet files of a folder (or of its sub-folder `data`), in order of their names; of a data set with splits,
    those of train."""
    options = data.unlabeled
    shards = unlabeled_shards(Folder(options.path))
    column = find_image_column(shards[0].schema, options.image_column)
    count = _count(options, sum(shard.num_rows for shard in shards))
    stack, missing = ImageStack(count, image_size), count
    for shard in shards:
        shard.read_images(column, min(missing, shard.num_rows), stack)
        missing -= min(missing, shard.num_rows)
    return stack.finish()


def _image_folder(data, image_size):
    """All image files below a folder (below its sub-folder `train` where it has one), in order of their paths."""
    folder = Folder(data.unlabeled.path)
    paths = image_files(folder, "train") or image_files(folder)
    paths = paths[: _count(data.unlabeled, len(paths))]
    stack = ImageStack(len(paths), image_size)
    for start in range(0, len(paths), ROWS_AT_ONCE):
        some = paths[start : start + ROWS_AT_ONCE]
        stack.append([folder.read(path) for path in some], some.__getitem__)
    return stack.finish()


def _npz(data, image_size):
    """The one array of uint8 images in a NumPy file, (M, H, W), (M, H, W, C) or (M, C, H, W)."""
    options = data.unlabeled
    try:
        with open_file(options.path) as file, np.load(file, allow_pickle=False) as content:
            found = [array for array in _arrays(content) if array.dtype == np.uint8 and array.ndim in (3, 4)]
            if len(found) != 1:
                raise DataError(
                    f"{options.path}: expected one array of uint8 images, came {len(found)} among "
                    f"{', '.join(content.files) or 'none'}"
                )
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise DataError(f"data.path: expected a readable .npz file, came {options.path}: {one_line(error)}") from error
    images = found[0][: _count(options, len(found[0]))]
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images))


def _arrays(content):
    """The members; one that holds Python objects is refused by NumPy, and is no image."""
    for key in content.files:
        with contextlib.suppress(ValueError):
            yield content[key]
