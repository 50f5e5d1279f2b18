"""Which home the images of a part get, and how it is made."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from genray.core.memory import bytes_text, free_memory
from genray.data.cache import FOLDER, EncodedFile, Stored
from genray.data.catalogue import Broken, Part, without
from genray.data.homes import Files, Home, Mapped, Resident
from genray.data.reading import Reading
from genray.data.request import DataRequest
from genray.errors import DataError
from genray.storage import Storage, without_secrets

FILE_SOURCES = ("parquet", "image_folder")
_RESIDENT_SHARE = 0.5  # of free memory that `auto` fills with images; training needs some, too


def stored_part(
    name: str, request: DataRequest, column: str | None, folder: str | None, reopen: Callable[[DataRequest], Part]
) -> Stored:
    """A part as other processes open it again.

    Args:
        name: "train", "test" or "extra".
        request: what it was opened by.
        column: of Parquet files, with the images.
        folder: of the cache files; None for the usual one.
        reopen: opens the part by a request; it can be pickled.
    """
    place = Storage(request.path).absolute if isinstance(request.path, str | os.PathLike) else request.path
    place = None if isinstance(place, dict) else place  # arrays, which are always resident
    root = "" if place is None else Storage(place).root
    count = request.test_examples if name == "test" else request.train_examples
    key = hashlib.sha256(repr((place, column, request.image_size, count, request.skips)).encode()).hexdigest()[:12]
    again = replace(request, reading=Reading(), available={})
    origin = without_secrets(f"{request.source} {place or ''}".strip())
    return Stored(f"{request.source}-{name}-{key}", name, origin, root, folder or FOLDER, partial(reopen, again))


def make_home(kind: str, part: Part, request: DataRequest, stored: Stored) -> tuple[Home, Broken]:
    """The images of a part in a home of this kind, and those that are left out as broken.

    Raises:
        DataError: the source has no image files, an image cannot be decoded, or the cache file cannot be used.
    """
    if kind == "resident":
        request.reading.begin(stored.part, len(part.labels))
        images, broken = part.read(None)
        request.reading.end()
        return Resident(images), broken
    if kind == "mapped":
        file = stored.open("pixels", part, request.reading)
        return Mapped(stored, file), file.broken
    if part.files is None and part.blobs is None:
        raise DataError(f'data.home: expected resident or mapped, since "{request.source}" has no image files')
    files = part.files or EncodedFile(stored, stored.open("encoded", part, request.reading))
    broken = stored.open("broken", part, request.reading).broken if request.skips else []
    return Files(files, request.image_size, part.shape, without(torch.arange(len(files)), broken)), broken


def choose_home(home: str, nbytes: int, folder: str | None, has_files: bool) -> tuple[str, str]:
    """The kind of home, and a line about what `auto` chose where it is not `resident`.

    Args:
        home: `data.home`.
        nbytes: of the decoded images.
        folder: of cache files; None for the usual one.
        has_files: whether the source has image files.
    """
    free = free_memory()
    if home != "auto" or free is None or nbytes <= free * _RESIDENT_SHARE:
        return ("resident" if home == "auto" else home), ""
    place = Path(os.path.expanduser(folder or FOLDER)).absolute()
    on_disk = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    chosen = "files" if has_files and nbytes > on_disk else "mapped"
    where = f" to a file in {folder or FOLDER}" if chosen == "mapped" else ""
    why = f"the images take {bytes_text(nbytes)} and {bytes_text(free)} are free"
    return chosen, f"data.home: {chosen}{where}, since {why}"
