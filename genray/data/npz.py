"""Images in NumPy's .npz files: the shape from the header alone, then the pixels, some at a time."""

import contextlib
import hashlib
import math
import zipfile
from collections.abc import Callable

import numpy as np
import torch

from genray.data.files import open_file, readable
from genray.data.images import allocate
from genray.errors import DataError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_AT_ONCE = 4096  # images


def stored_arrays(path: str) -> tuple[int, tuple[int, int, int], Callable, Callable[[], str], dict]:
    """The one array of uint8 images in a file, (M, H, W), (M, H, W, C) or (M, C, H, W), and what stands beside it.

    Returns:
        M, (C, H, W), a function that reads the first so many images as `Part.read` does, `Part.mark`, and name -> array
        of those that have one dimension at most, or are called label or pseudo.

    Raises:
        DataError: unreadable, or there is not one such array.
    """
    with _opened(path) as archive:
        sums = repr([(info.filename, info.CRC) for info in archive.infolist()])
        headers = {name.removesuffix(".npy"): _header(archive, name) for name in archive.namelist()}
        flat = [name for name, (shape, *_) in headers.items() if shape is not None]
        flat = [name for name in flat if len(headers[name][0]) < 2 or name in ("label", "pseudo")]
        others = {name: _array(archive, name) for name in flat}
    found = [name for name, (shape, _, dtype) in headers.items() if dtype == np.uint8 and len(shape) in (3, 4)]
    if len(found) != 1:
        names = ", ".join(headers) or "none"
        raise DataError(f"{path}: expected one array of uint8 images, came {len(found)} among {names}")
    (name,) = found
    shape, in_columns, _ = headers[name]
    last = len(shape) == 4 and shape[1] not in (1, 3)
    axes = (0, 3, 1, 2) if last else (0, 1, 2, 3)
    shape = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])

    def read(count, target=None):
        images = (target or allocate)((count, *(shape[axis] for axis in axes[1:])))
        with _opened(path) as archive, archive.open(f"{name}.npy") as member:
            whole = _array(archive, name).reshape(shape) if in_columns else None
            _header_of(member)
            for start in range(0, count, _AT_ONCE):
                size = min(_AT_ONCE, count - start)
                rows = member.read(size * math.prod(shape[1:])) if whole is None else whole[start : start + size]
                some = np.frombuffer(rows, np.uint8).reshape(size, *shape[1:]) if whole is None else rows
                images[start : start + size] = torch.from_numpy(some.transpose(axes).copy())
        return images, []

    def mark():
        return hashlib.sha256(sums.encode()).hexdigest()[:16]

    return shape[0], tuple(shape[axis] for axis in axes[1:]), read, mark, others


@contextlib.contextmanager
def _opened(path):
    with readable(f"data.path: expected a readable .npz file, came {path}"):
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            yield archive


def _array(archive, name):
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _header(archive, name):
    """(shape, whether in column order, dtype) of an array; (None, None, None) for a member that is none."""
    with archive.open(name) as member, contextlib.suppress(ValueError, KeyError):
        return _header_of(member)
    return None, None, None


def _header_of(member):
    return _HEADERS[np.lib.format.read_magic(member)](member)
