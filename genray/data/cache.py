"""Files that a node makes once of a part of a data set, and maps into memory.

`pixels` holds its decoded images, `encoded` its image files as they are, `broken` neither. Each also says which images
cannot be decoded. The layout: a JSON header of 4096 bytes, the payload, arrays whose places the header states.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from filelock import FileLock

from genray.core.memory import bytes_text
from genray.data.catalogue import Part, row_name
from genray.data.reading import Reading
from genray.errors import DataError

Kind = Literal["pixels", "encoded", "broken"]
FOLDER = "~/.cache/genray/images"
_FORMAT = "genray images 1"
_HEADER_BYTES = 4096
_AT_ONCE = 1024  # images


class CacheFile:
    """A finished file, mapped into memory.

    Attributes:
        header: what it says of itself.
        payload: (bytes,) uint8.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self.header = json.loads(file.read(_HEADER_BYTES))
            if self.header["format"] != _FORMAT:
                raise ValueError(self.header["format"])
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.payload = np.frombuffer(self._map, np.uint8, self.header["bytes"], _HEADER_BYTES)

    def array(self, name: str) -> np.ndarray:
        dtype, shape, start = self.header["arrays"][name]
        return np.frombuffer(self._map, dtype, math.prod(shape), start).reshape(shape)

    @property
    def broken(self) -> list:
        """(index, file) of each image that cannot be decoded and is left out."""
        return json.loads(self.array("broken").tobytes())

    def forget(self):
        """Unmaps the pages that were read, which stay in the page cache: else they count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class PixelFile:
    """Images in a file that is being written, which are set and read like those of a uint8 tensor of this shape."""

    def __init__(self, file: IO, shape: tuple[int, ...]):
        self.file, self.shape, self._size = file, shape, math.prod(shape[1:])

    def __setitem__(self, where: slice, images: torch.Tensor):
        self.file.seek(_HEADER_BYTES + where.start * self._size)
        self.file.write(images.expand(-1, *self.shape[1:]).contiguous().numpy())

    def __getitem__(self, where: slice) -> torch.Tensor:
        self.file.seek(_HEADER_BYTES + where.start * self._size)
        found = bytearray(self.file.read((where.stop - where.start) * self._size))
        return torch.frombuffer(found, dtype=torch.uint8).view(-1, *self.shape[1:])


class Nowhere:
    """Takes images and keeps none."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __setitem__(self, where: slice, images: torch.Tensor):
        pass

    def __getitem__(self, where: slice) -> torch.Tensor:
        return torch.empty(where.stop - where.start, *self.shape[1:], dtype=torch.uint8)


@dataclass(frozen=True)
class Stored:
    """A part of a data set as it is stored, from which any node makes its cache files.

    Attributes:
        name: of the files, without the ending: what the configuration says of this part.
        part: "train", "test" or "extra".
        origin: the source in messages.
        root: folder or file of the source, as its file system names it; "" if it has none.
        folder: where the files are, on each node.
        reopen: opens the part in another process.
    """

    name: str
    part: str
    origin: str
    root: str
    folder: str
    reopen: Callable[[], Part]

    def open(self, kind: Kind, part: Part | None = None, reading: Reading | None = None, content="") -> CacheFile:
        """The file of this kind, which is made if this node has none.

        Args:
            part: the part, where it is open.
            reading: shows the progress of making it.
            content: of the same file on another node; "" if there is none.

        Raises:
            DataError: the file is of other data or damaged, or cannot be made.
        """
        path = Path(os.path.expanduser(self.folder)) / f"{self.name}.{kind}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # the processes of a node make it once
                if not path.exists():
                    self._make(path, kind, part or self.reopen(), reading or Reading())
        except OSError as error:
            raise DataError(f"data.cache: cannot write {path}: {error.strerror or error}") from error
        try:
            file = CacheFile(path)
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"data.cache: expected images that genray wrote, {path} is damaged; remove it") from None
        wanted, found = (content, file.header["content"]) if part is None else (part.mark(), file.header["source"])
        if wanted and wanted != found:
            raise DataError(
                f"data.cache: expected the {self.part} images of {self.origin} ({wanted}), {path} holds others "
                f"({found}); remove it, or name another folder"
            )
        return file

    def _make(self, path, kind, part, reading):
        free = shutil.disk_usage(path.parent).free
        if kind == "pixels" and part.nbytes > free:
            raise DataError(
                f"data.cache: the {self.part} images take {bytes_text(part.nbytes)}, expected at most the "
                f"{bytes_text(free)} that are free in {path.parent}"
            )
        with contextlib.ExitStack() as stack:

            def new_file():
                aside = Path(f"{path}.tmp{len(opened)}")
                stack.callback(aside.unlink, missing_ok=True)
                opened.append((aside, stack.enter_context(open(aside, "wb+"))))
                return opened[-1][1]

            opened: list = []
            write = {"pixels": _write_pixels, "encoded": _write_encoded, "broken": _write_broken}[kind]
            reading.begin(self.part, len(part.labels))
            fields, arrays = write(part, new_file)
            reading.end()
            aside, file = opened[-1]
            _finish(file, {"source": part.mark(), "origin": self.origin[:1000], **fields}, arrays)
            os.replace(aside, path)


def _write_pixels(part, new_file):
    target, broken = part.read(lambda shape: PixelFile(new_file(), shape))
    count = len(part.labels) - len(broken)
    found = np.empty((count, 32), np.uint8)
    for start in range(0, count, _AT_ONCE):
        rows = target[start : min(start + _AT_ONCE, count)].flatten(1).numpy()
        found[start : start + len(rows)] = [np.frombuffer(hashlib.sha256(row).digest(), np.uint8) for row in rows]
    size = count * math.prod(target.shape[1:])
    return _fields(found, size, shape=target.shape[1:]), {"digests": found, "broken": _as_json(broken)}


def _write_encoded(part, new_file):
    file, ends, found = new_file(), [0], bytearray()
    file.seek(_HEADER_BYTES)
    for blob in part.blobs():
        file.write(blob or b"")
        ends.append(ends[-1] + len(blob or b""))
        found += hashlib.sha256(blob or b"").digest()
    table = np.frombuffer(found, np.uint8).reshape(-1, 32)
    arrays = {"digests": table, "broken": _as_json([]), "ends": np.array(ends), "places": _as_json(list(part.places))}
    return _fields(table, ends[-1]), arrays


def _write_broken(part, new_file):
    new_file()
    _, broken = part.read(Nowhere)
    table = _as_json(broken)
    return _fields(table, 0), {"broken": table}


def _fields(table, size, **fields):
    return {"bytes": size, "content": hashlib.sha256(table).hexdigest()[:16], **fields}


def _as_json(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _finish(file, header, arrays):
    """Writes the arrays behind the payload, then the header."""
    file.truncate(_HEADER_BYTES + header["bytes"])
    at = -(-(_HEADER_BYTES + header["bytes"]) // 64) * 64
    places = {}
    for name, array in arrays.items():
        file.seek(at)
        file.write(np.ascontiguousarray(array))
        places[name] = [str(array.dtype), array.shape, at]
        at += -(-array.nbytes // 64) * 64
    file.seek(0)
    file.write(json.dumps({"format": _FORMAT, **header, "arrays": places}).encode().ljust(_HEADER_BYTES))
    file.flush()
    os.fsync(file.fileno())


class EncodedFile:
    """Image files in one cache file."""

    local = True

    def __init__(self, stored: Stored, file: CacheFile):
        self._stored, self._file, self._ends = stored, file, file.array("ends")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __reduce__(self) -> Any:
        return _reopened, (self._stored, self._file.header["content"])

    def where(self, index: int) -> str:
        return row_name(json.loads(self._file.array("places").tobytes()), index)

    def blob(self, index: int) -> bytes:
        found = self._file.payload[self._ends[index] : self._ends[index + 1]].tobytes()
        self._file.forget()
        return found

    def digest(self, index: int) -> bytes:
        return self._file.array("digests")[index].tobytes()


def _reopened(stored, content):
    return EncodedFile(stored, stored.open("encoded", content=content))
