"""Images in NumPy's .npz files: the shape from the header alone, then the pixels."""

import contextlib
import zipfile
from collections.abc import Callable

import numpy as np
import torch

from genray.data.files import open_file, readable
from genray.errors import DataError

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def stored_array(path: str) -> tuple[int, tuple[int, int, int], Callable[[int], torch.Tensor]]:
    """The one array of uint8 images in a file, (M, H, W), (M, H, W, C) or (M, C, H, W).

    Returns:
        M, (C, H, W), and a function that reads the first so many images, (count, C, H, W) uint8.

    Raises:
        DataError: unreadable, or there is not one such array.
    """
    with _opened(path) as archive:
        headers = {name: _header(archive, name) for name in archive.namelist()}
    found = {name: shape for name, (shape, dtype) in headers.items() if dtype == np.uint8 and len(shape) in (3, 4)}
    if len(found) != 1:
        names = ", ".join(name.removesuffix(".npy") for name in headers) or "none"
        raise DataError(f"{path}: expected one array of uint8 images, came {len(found)} among {names}")
    ((name, shape),) = found.items()
    last = len(shape) == 4 and shape[1] not in (1, 3)
    axes = (0, 3, 1, 2) if last else (0, 1, 2, 3)
    shape = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])

    def read(count):
        with _opened(path) as archive, archive.open(name) as member:
            images = np.lib.format.read_array(member, allow_pickle=False)
        images = images[:count].reshape(-1, *shape[1:]).transpose(axes)
        return torch.from_numpy(np.ascontiguousarray(images))

    return shape[0], tuple(shape[axis] for axis in axes[1:]), read


@contextlib.contextmanager
def _opened(path):
    with readable(f"data.path: expected a readable .npz file, came {path}"):
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            yield archive


def _header(archive, name):
    """(shape, dtype) of an array, from its first bytes; ((), None) for a member that is none."""
    with archive.open(name) as member, contextlib.suppress(ValueError, KeyError):
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(member)](member)
        return shape, dtype
    return (), None
