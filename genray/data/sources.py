"""The sources that are not Parquet: scikit-learn's digits, torchvision's data sets and folders of image files."""

import contextlib
import hashlib
import os
import socket
import sys

import numpy as np
import torch
from filelock import FileLock

from genray.data.catalogue import Catalogue, Part
from genray.data.files import Folder, local_folder
from genray.data.images import ImageStack, resize_images, shape_of
from genray.data.reading import Reading
from genray.data.request import PARTS, DataRequest, resolve_classes
from genray.data.splits import Split, balanced_choice
from genray.errors import DataError, one_line

DEFAULT_ROOT = "~/.cache/genray"
_DIGITS_TEST_EXAMPLES, _DIGITS_SEED = 360, 0
_NO_ANSWER_S = 30  # a download server that stays silent this long counts as absent
_DOWNLOAD_S = 1800  # and one process waits this long for another one's download
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_FILES_AT_ONCE = 1024  # bounds the memory that encoded images take beside the decoded ones


def load_digits(request: DataRequest) -> Catalogue:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, split 1,437 / 360 with 36 test images a class."""
    from sklearn import datasets

    request.refuse("path", "image_column", "label_column")
    digits = datasets.load_digits()
    images = torch.from_numpy((digits.images * 255 / 16).round().astype(np.uint8)[:, None])
    every = Split(images, torch.from_numpy(digits.target.astype(np.int64)))
    is_test = torch.zeros(len(every), dtype=torch.bool)
    is_test[balanced_choice(every.labels, _DIGITS_TEST_EXAMPLES, _DIGITS_SEED, field="digits test split")] = True
    parts = {"train": every.select((~is_test).nonzero().flatten()), "test": every.select(is_test.nonzero().flatten())}
    return from_arrays(request, {part: (s.images.numpy(), s.labels.numpy()) for part, s in parts.items()}, None)


def load_torchvision(request: DataRequest) -> Catalogue:
    """CIFAR-10, CIFAR-100, MNIST or SVHN through torchvision, in the order in which it stores them."""
    request.refuse("image_column", "label_column")
    root = local_folder(request.path if request.path is not None else DEFAULT_ROOT, request.source)
    parts = {}
    for part in PARTS:
        dataset = open_torchvision(request.source, root, part, request.download)
        parts[part] = (_channels_first(dataset), np.asarray(getattr(dataset, _LABELS[request.source])))
    # Only CIFAR's names say more than the number.
    names = dataset.classes if request.source in ("cifar10", "cifar100") else None
    return from_arrays(request, parts, names)


def load_image_folder(request: DataRequest) -> Catalogue:
    """<path>/train/<class>/*.png and <path>/test/<class>/*.png (or val/), classes in order of their names.

    Stored order takes the first file of each class, then the second of each, and so on, so that the first n examples
    are balanced; files count by name within a class, also those in folders further down. Hidden files and folders are
    no part of the data, and a folder that links lead to twice is read once.
    """
    request.refuse("image_column", "label_column")
    folder, reading = Folder(request.require_path()), request.reading
    files = {"train": _class_files(folder, "train", reading)}
    there = [info.base_name for info in folder.list() if not info.is_file and not info.base_name.startswith(".")]
    held = "test" if "test" in there else "val"
    files["test"] = _class_files(folder, held, reading)
    for other in there:
        if other not in ("train", held):
            reading.leave_out(f"folder {other}")
    names = sorted(files["train"])
    for part in PARTS:
        if not files[part]:
            raise DataError(
                f"data.path: expected folders {part}/<class>{' or val/<class>' * (part == 'test')} with image "
                f"files in {folder.root}, came none"
            )
        for name, paths in files[part].items():
            if not paths or name not in names:
                what = "no image files" if not paths else "a class that train does not have"
                raise DataError(
                    f"{folder.root}: {part} class folder {name!r}: expected images of a training class, came {what}"
                )
    ordered = {part: _interleaved(files[part], names) for part in PARTS}
    labels = {part: ordered[part][0] for part in PARTS}
    resolve_classes(labels, names, lambda part, index: ordered[part][1][index][0])
    parts = {}
    for part in PARTS:
        chosen = ordered[part][1][: request.count(part, len(labels[part]))]
        parts[part] = Part(labels[part][: len(chosen)].clone(), *stored_files(folder, chosen, request))
    return Catalogue(parts, tuple(names))


class FolderFiles:
    """Image files of a folder.

    Args:
        found: (path, size, time of the last change) of each.
    """

    def __init__(self, folder: Folder, found: list[tuple[str, int, int]]):
        self.folder, self.local = folder, folder.is_local
        self._top = f"{folder.root.rstrip('/')}/"
        # One array, not a list of strings: decoding processes share its memory, and it takes a third of a list's.
        self._names = np.array([path.removeprefix(self._top).encode() for path, *_ in found], np.bytes_)
        self._sizes = np.array([size for _, size, _ in found], np.int64)
        mark = hashlib.sha256()
        for path, size, changed in found:
            mark.update(f"{path.removeprefix(self._top)} {size} {changed}\n".encode())
        self.mark = mark.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        return self._top + self._names[index].decode()

    def blob(self, index: int) -> bytes:
        return self.folder.read(self.where(index))

    def digest(self, index: int) -> bytes:
        """Of name and size."""
        return hashlib.sha256(self._names[index] + b" %d" % self._sizes[index]).digest()


def stored_files(folder: Folder, found: list[tuple[str, int, int]], request: DataRequest):
    """What a `Part` of these files has behind its labels."""
    files = FolderFiles(folder, found)

    def read(target=None):
        stack = ImageStack(len(files), request.image_size, request.reading, target, skip=request.skips)
        for start in range(0, len(files), _FILES_AT_ONCE):
            blobs = [files.blob(index) for index in range(start, min(start + _FILES_AT_ONCE, len(files)))]
            stack.append(blobs, lambda index, start=start: files.where(start + index))
        return stack.finish(), stack.broken

    singly = ((files.where(index), files.blob(index)) for index in range(len(files)))
    return shape_of(singly, request.image_size, request.skips), read, lambda: files.mark, files


def from_arrays(request: DataRequest, parts: dict, names) -> Catalogue:
    """ImageData from whole arrays: part -> ((N, C, H, W) uint8, (N,) integers)."""
    labels = {part: torch.from_numpy(parts[part][1].astype(np.int64)) for part in PARTS}
    names = resolve_classes(labels, names, lambda part, index: f"{request.source} {part} example {index}")
    found = {}
    for part in PARTS:
        taken = labels[part][: request.count(part, len(labels[part]))].clone()
        shape = (parts[part][0].shape[1], *(request.image_size or parts[part][0].shape[2:]))
        found[part] = Part(taken, shape, *stored_array(parts[part][0][: len(taken)], request.image_size))
    return Catalogue(found, names)


def stored_array(images: np.ndarray, image_size=None):
    """(read, mark) of a `Part` whose images are in memory already, (N, C, H, W) uint8."""

    def read(target=None):
        found = images if image_size is None else resize_images(images, image_size)
        if target is None:
            return torch.from_numpy(np.ascontiguousarray(found)), []
        copy = target(found.shape)
        for start in range(0, len(found), _FILES_AT_ONCE):
            some = slice(start, min(start + _FILES_AT_ONCE, len(found)))
            copy[some] = torch.from_numpy(np.ascontiguousarray(found[some]))
        return copy, []

    return read, lambda: hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()[:16]


_CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "svhn": "SVHN"}
_LABELS = {"cifar10": "targets", "cifar100": "targets", "mnist": "targets", "svhn": "labels"}


def open_torchvision(source: str, root: str, part: str, download: bool):
    """torchvision's data set from `root`, downloaded there first where absent and allowed."""
    from torchvision import datasets

    which = {"split": part} if source == "svhn" else {"train": part == "train"}

    def opened(**options):
        return getattr(datasets, _CLASSES[source])(root, **which, **options)

    advice = 'put its files there, set data.path to a folder that has them, or use data.source "parquet"'
    try:
        return opened()
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        if not download:
            raise DataError(
                f"data.path: expected {source} as torchvision stores it in {root}, came: "
                f"{one_line(error, 10_000).split('. ')[0]}; {advice}; or allow data.download"
            ) from error
    try:
        os.makedirs(root, exist_ok=True)
        # Several actors on one machine may want the same files: one downloads, the others wait and find them.
        with FileLock(os.path.join(root, f".{source}.lock"), timeout=_DOWNLOAD_S), _quiet_network():
            return opened(download=True)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"data.path: {source} is not in {root} and its download failed ({one_line(error)}); {advice}"
        ) from error


@contextlib.contextmanager
def _quiet_network():
    """No endless wait for a silent server, and torchvision's prints kept out of our standard output."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NO_ANSWER_S)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _channels_first(dataset) -> np.ndarray:
    """torchvision's (N, H, W), (N, H, W, C) or (N, C, H, W) images as (N, C, H, W)."""
    images = np.asarray(dataset.data)
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] == 3 else images.transpose(0, 3, 1, 2)


def _class_files(folder: Folder, part: str, reading: Reading) -> dict[str, list[tuple[str, int, int]]]:
    """Class name -> its image files in order, as of `FolderFiles`; a class without any has an empty list."""
    files, prefix = {}, f"{folder.root.rstrip('/')}/{part}/"
    for info in folder.walk(part, reading):
        name, _, below = info.path.removeprefix(prefix).partition("/")
        if not below and info.is_file:
            reading.leave_out("file(s) outside the class folders")
            continue
        paths = files.setdefault(name, [])
        if info.is_file and _is_image(info, reading):
            paths.append((info.path, info.size, info.mtime_ns))
    return files


def image_files(folder: Folder, below: str, reading: Reading) -> list[tuple[str, int, int]]:
    """All image files in a sub-folder and below it, sorted by path, as of `FolderFiles`."""
    return [
        (info.path, info.size, info.mtime_ns)
        for info in folder.walk(below, reading)
        if info.is_file and _is_image(info, reading)
    ]


def _is_image(info, reading) -> bool:
    """Whether a file is read; one that is not is counted."""
    ending = os.path.splitext(info.base_name)[1].lower()
    if ending not in _IMAGE_ENDINGS:
        reading.leave_out(f"{ending} file(s)" if ending else "file(s) without an ending")
    return ending in _IMAGE_ENDINGS


def _interleaved(files: dict[str, list], names: list[str]) -> tuple[torch.Tensor, list[tuple[str, int, int]]]:
    """(labels, files), the first file of each class first."""
    own = [files.get(name, []) for name in names]
    label = np.repeat(np.arange(len(names)), list(map(len, own)))
    rank = np.concatenate([np.arange(len(paths)) for paths in own])
    every, order = [file for paths in own for file in paths], np.lexsort((label, rank))
    return torch.from_numpy(label[order]), [every[i] for i in order]
