"""Images beside those of `data.source`: labelled ones that are trained on, and any that a model is to label."""

import contextlib
import re
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from genray.config.schema import DataConfig
from genray.core.memory import check_memory
from genray.data.catalogue import Part, without
from genray.data.files import Folder, local_folder
from genray.data.home_choice import choose_home, make_home, stored_part
from genray.data.homes import Resident, join
from genray.data.npz import stored_arrays
from genray.data.parquet import ClassNames, find_columns, find_image_column, lone_shards, stored_images
from genray.data.reading import Reading
from genray.data.request import DataRequest
from genray.data.sources import DEFAULT_ROOT, image_files, open_torchvision, stored_array, stored_files
from genray.data.splits import Split
from genray.errors import DataError


def with_extra(train: Split, data: DataConfig, class_names, reading: Reading) -> Split:
    """The training images, followed by those of `data.extra` where there are any.

    Args:
        train: the training images, the validation part taken out. Where they are not decoded, others are not either.
        data: the section `data`.
        class_names: of the training images.
        reading: is told what is read.

    Raises:
        DataError: the extra images are absent, unreadable or do not fit the training images, or all of them do not fit
            into memory.
    """
    extra, shape = data.extra, train.shape
    if extra is None:
        return train
    path = extra.path or (data.path if data.source == "svhn" else None)
    size = (shape[1], shape[2]) if extra.resize else None
    columns = extra.image_column, extra.label_column
    request = DataRequest(extra.source, path, *columns, data.download, size, extra.examples, reading=reading)
    request = replace(request, skips=data.on_broken == "skip")
    with _named_after_the_section():
        part, pseudo = open_images(request, class_names)
        home, broken = _home(train, part, request, data, class_names)
    if home.shape != shape:
        raise DataError(
            f"data.extra: expected images of the training images' shape {shape} (C, H, W), came {home.shape}"
        )
    reading.leave_out_broken("extra", broken)
    labels, pseudo = without(part.labels, broken), without(pseudo, broken)
    labelled = torch.cat([torch.ones(len(train), dtype=torch.bool), ~pseudo]) if pseudo.any() else None
    return Split(join(train.home, home), torch.cat([train.labels, labels]), labelled)


def _home(train, part, request, data, class_names):
    """The home of the extra images, and those of them that are left out."""
    if train.home.device.type == "meta":
        return Resident(part.undecoded()), []
    has_files = part.files is not None or part.blobs is not None
    together = 2 * part.nbytes + train.home.nbytes  # both are copied into one tensor
    kind, note = choose_home(data.home, together, data.cache, has_files)
    if kind == "resident":
        check_memory(together, f"{len(part.labels)} extra beside {len(train)} images")
    kind = "mapped" if kind == "files" and not has_files else kind
    request.reading.say(note)
    stored = stored_part("extra", request, request.image_column, data.cache, partial(_reopened, class_names))
    return make_home(kind, part, request, stored)


def _reopened(class_names, request):
    return open_images(request, class_names)[0]


def open_images(request: DataRequest, class_names=None) -> tuple[Part, torch.Tensor]:
    """What `request` names, in stored order, before it is decoded.

    Args:
        request: of source npz, parquet, image_folder or svhn_extra; `train_examples` is how many to take.
        class_names: of the labels; None reads no labels, they are all 0.

    Returns:
        (images, pseudo): the `Part`, and (M,) bool, which labels are a model's.

    Raises:
        DataError: absent, unreadable, no image, or a label that is none of the classes.
    """
    read = {"npz": _npz, "parquet": _parquet, "image_folder": _image_folder, "svhn_extra": _svhn_extra}
    available, opened, labels, pseudo = read[request.source](request, class_names)
    if not available:
        raise DataError(f"data.path: expected at least 1 image, came 0 from source {request.source}")
    count = request.count("train", available)
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else labels[:count]
    wrong = ((labels < 0) | (labels >= len(class_names or "0"))).nonzero().flatten()
    if len(wrong):
        raise DataError(
            f"data.path: expected class labels from 0 to {len(class_names) - 1}, came {labels[wrong[0]]} of image "
            f"{wrong[0]}"
        )
    return Part(labels, *opened(count)), torch.zeros(count, dtype=torch.bool) if pseudo is None else pseudo[:count]


@contextlib.contextmanager
def _named_after_the_section():
    """What is shared with `data.source` names its fields in messages."""
    try:
        yield
    except DataError as error:
        text = str(error).replace("data.image_size to resize", "data.extra.resize: true to resize")
        text = text.replace("data.train_examples", "data.examples")
        raise DataError(re.sub(r"data\.(path|image_column|label_column|examples)", r"data.extra.\1", text)) from error


def _npz(request, class_names):
    """The one array of uint8 images in a NumPy file, and `label` and `pseudo` beside it."""
    available, shape, read, mark, others = stored_arrays(request.require_path())
    labels = others.get("label")
    if class_names and (labels is None or labels.shape != (available,) or labels.dtype.kind not in "iu"):
        came = "none" if labels is None else f"{labels.shape} {labels.dtype}"
        raise DataError(f"{request.path}: expected an array label of {available} whole numbers, came {came}")
    labels = torch.from_numpy(labels.astype(np.int64)) if class_names else None
    pseudo = others.get("pseudo", np.zeros(1, bool))
    if pseudo.dtype.kind not in "biu" or pseudo.shape not in ((), (1,), (available,)):
        came = f"{pseudo.shape} {pseudo.dtype}"
        raise DataError(f"{request.path}: expected an array pseudo of {available} truth values, came {came}")
    pseudo = torch.from_numpy(np.broadcast_to(pseudo.astype(bool), available).copy())
    return available, lambda count: (shape, partial(read, count), mark), labels, pseudo


def _parquet(request, class_names):
    """A Parquet file, or those of a folder (or of its sub-folder `data`) in order of their names; of a data set with
    splits, those of train."""
    shards, labels = lone_shards(request.require_path()), None
    if class_names:
        image, label = find_columns(shards[0].schema, request.image_column, request.label_column)
        names = ClassNames("the training images", list(class_names))
        labels = torch.cat([shard.labels(label, names) for shard in shards])
    else:
        image = find_image_column(shards[0].schema, request.image_column)
    pseudo = torch.cat([shard.marks("pseudo") for shard in shards])
    return len(pseudo), lambda count: stored_images(shards, image, count, request), labels, pseudo


def _image_folder(request, class_names):
    """All image files below a folder (below its sub-folder `train` where it has one), in order of their paths; labelled
    ones in a folder a class."""
    folder, labels = Folder(request.require_path()), None
    below = "train" if any(info.base_name == "train" and not info.is_file for info in folder.list()) else ""
    paths = image_files(folder, below, request.reading)
    if class_names:
        number = {name: k for k, name in enumerate(class_names)}
        own = [path.removeprefix(folder.path(below)).lstrip("/").partition("/")[0] for path, *_ in paths]
        stranger = next((path for (path, *_), name in zip(paths, own) if name not in number), None)
        if stranger:
            some = ", ".join(class_names[:10]) + ", ..." * (len(class_names) > 10)
            raise DataError(f"{stranger}: expected to lie in a folder that is called like a class ({some})")
        labels = torch.tensor([number[name] for name in own])
    return len(paths), lambda count: stored_files(folder, paths[:count], request), labels, None


def _svhn_extra(request, class_names):
    """The 531,131 images that SVHN's authors call easier."""
    root = local_folder(request.path or DEFAULT_ROOT, "svhn_extra")
    data = open_torchvision("svhn", root, "extra", request.download)

    def opened(count):
        return data.data.shape[1:], *stored_array(data.data[:count])

    return len(data.data), opened, torch.from_numpy(data.labels.astype(np.int64)) if class_names else None, None
