"""Training images without labels: labels that are dropped, or images of another source whose labels are ignored."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from genray.config.schema import DataConfig
from genray.core import rng
from genray.core.memory import check_memory
from genray.data.catalogue import Part
from genray.data.files import Folder, local_folder
from genray.data.npz import stored_array
from genray.data.parquet import find_image_column, stored_images, unlabeled_shards
from genray.data.reading import Reading
from genray.data.request import DataRequest
from genray.data.sources import DEFAULT_ROOT, image_files, open_torchvision, stored_files
from genray.data.splits import UNLABELED, Split
from genray.errors import DataError


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


def with_unlabeled(train: Split, data: DataConfig, reading: Reading | None = None) -> TrainingImages:
    """The training images as `data.unlabeled` asks for them.

    Args:
        train: the labelled training images, the validation part taken out.
        data: the section `data`.
        reading: is told what is read. Where `train` is not decoded, other images are not either.

    Raises:
        DataError: the unlabelled images are absent, unreadable or do not fit the training images, or all of them do not
            fit into memory.
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
    images = load_unlabeled(data, train.images, reading or Reading())
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


def load_unlabeled(data: DataConfig, train: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Images of `data.unlabeled`, (M, C, H, W) uint8, in stored order.

    Args:
        data: the section `data`.
        train: the training images, (N, C, H, W); where they are not decoded, these are not either.
        reading: is told what is read.

    Raises:
        DataError: absent, unreadable, too few, too many for the memory, or of another shape; names data.unlabeled.
    """
    options, shape = data.unlabeled, tuple(train.shape[1:])
    find = {"svhn_extra": _svhn_extra, "parquet": _parquet, "image_folder": _image_folder, "npz": _npz}[options.source]
    request = DataRequest(
        options.source, options.path, image_size=shape[1:] if options.resize else None, reading=reading
    )
    with _named_after_the_section():
        part = find(data, request)
        if not train.is_meta:  # beside the training images that are there, both are copied into one tensor
            check_memory(2 * part.nbytes + train.nbytes, f"{len(part.labels)} unlabelled beside {len(train)} images")
        images = part.undecoded() if train.is_meta else part.decode("unlabelled", reading)
    if tuple(images.shape[1:]) != shape:
        raise DataError(
            f"data.unlabeled: expected images of the training images' shape {shape} (C, H, W), came "
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


def _part(count, shape, read):
    return Part(torch.full((count,), UNLABELED), shape, read)


def _svhn_extra(data, request):
    """The 531,131 images that SVHN's authors call easier; beside `data.path` where the run trains on SVHN."""
    path = request.path or (data.path if data.source == "svhn" else None)
    images = open_torchvision("svhn", local_folder(path or DEFAULT_ROOT, "svhn_extra"), "extra", data.download).data
    count = _count(data.unlabeled, len(images))
    return _part(count, images.shape[1:], lambda: torch.from_numpy(np.ascontiguousarray(images[:count])))


def _parquet(data, request):
    """The Parquet files of a folder (or of its sub-folder `data`), in order of their names; of a data set with splits,
    those of train."""
    shards = unlabeled_shards(Folder(request.path))
    column = find_image_column(shards[0].schema, data.unlabeled.image_column)
    count = _count(data.unlabeled, sum(shard.num_rows for shard in shards))
    return _part(count, *stored_images(shards, column, count, request))


def _image_folder(data, request):
    """All image files below a folder (below its sub-folder `train` where it has one), in order of their paths."""
    folder = Folder(request.path)
    below = "train" if any(info.base_name == "train" and not info.is_file for info in folder.list()) else ""
    paths = image_files(folder, below, request.reading)
    paths = paths[: _count(data.unlabeled, len(paths))]
    return _part(len(paths), *stored_files(folder, paths, request))


def _npz(data, request):
    """The one array of uint8 images in a NumPy file."""
    available, shape, read = stored_array(request.path)
    count = _count(data.unlabeled, available)
    return _part(count, shape, lambda: read(count))
