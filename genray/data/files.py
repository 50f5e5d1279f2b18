"""Folders of files that a user names as data: storage whose errors are of the data."""

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from genray.data.reading import Reading
from genray.errors import DataError, RunFolderError
from genray.storage import Storage, expand, without_secrets


class Folder(Storage):
    """A folder that exists, for listing and reading.

    Args:
        path: a local folder, a URI, or a tuple (pyarrow.fs.FileSystem, folder in it).

    Raises:
        DataError: unknown kind of URI, no such folder, or the storage refuses; names data.path.
    """

    def __init__(self, path: Any):
        with _as_data_error("data.path: expected a readable folder, came "):
            super().__init__(path)
            is_folder, there = self.is_folder(), self.exists()
        if not is_folder:
            what = "not a folder" if there else "no such folder"
            raise DataError(f"data.path: expected a readable folder, came {self}: {what}")

    def list(self, below: str = "", *, recursive: bool = False) -> list[pafs.FileInfo]:
        """What stands in the sub-folder `below`, sorted by path; nothing if there is no such sub-folder."""
        with _as_data_error("data.path: cannot list "):
            return self.entries(below, recursive=recursive)

    def walk(self, below: str, reading: Reading) -> Sequence[pafs.FileInfo]:
        """All that stands in the sub-folder `below` and further down, sorted by path.

        Left out is what is hidden (its name begins with a dot), and of a local folder links to nothing and folders that
        were walked before, which links may lead to.

        Raises:
            DataError: a name is no UTF-8, or a folder cannot be listed.
        """
        top, place = self.path(below), f"data.path: cannot list {self.path(below)}"
        if self.is_local:
            with readable(place):
                found = [*self._walk_local(top, reading)] if os.path.isdir(top) else []
            return sorted(found, key=lambda info: info.path)
        found = self.list(below, recursive=True)
        return [info for info in found if "/." not in info.path.removeprefix(top.rstrip("/"))]

    def _walk_local(self, top, reading):
        folders, walked = deque([top]), set()
        while folders:
            folder = folders.popleft()
            real = os.path.realpath(folder)
            if real in walked:
                reading.leave_out("link(s) to a folder that is read already")
                continue
            walked.add(real)
            if folder != top:
                yield self.filesystem.get_file_info(folder)
            for info in self.filesystem.get_file_info(_visible(folder)):
                if info.type == pafs.FileType.File:
                    yield info
                elif info.type != pafs.FileType.Directory:
                    reading.leave_out("dead link(s)" if os.path.islink(info.path) else "special file(s)")
                elif os.path.islink(info.path):  # last, so that a folder counts where it really is
                    folders.append(info.path)
                else:
                    folders.appendleft(info.path)

    def read(self, path: str = "") -> bytes:
        """All bytes of one file (a path as `list` gives it)."""
        with _as_data_error(""):
            return Storage((self.filesystem, path)).read()


@contextlib.contextmanager
def readable(problem: str):
    """Turns whatever goes wrong inside into a DataError: file systems raise what their libraries do, each its own
    (OSError, ArrowException, UnicodeDecodeError, ImportError, errors of HTTP and cloud clients).

    Args:
        problem: the message, before the reason.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{problem}: {without_secrets(str(error) or type(error).__name__)}") from error


def _visible(folder):
    """Paths of all that is in a local folder and not hidden."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            came = os.fsencode(name)
            raise DataError(f"{folder}: expected file names in UTF-8, came {came!r} (rename that file)") from None
    return [f"{folder}/{name}" for name in names]


def open_file(path: Any) -> pa.NativeFile:
    """One file, to read from and seek in; the errors in the file are pyarrow's."""
    with _as_data_error("data.path: expected a readable file, came "):
        place = Storage(path)
    return place.open()


def local_folder(path: Any, source: str) -> str:
    """The absolute path of a folder on this machine, for a source that reads from nowhere else.

    Raises:
        DataError: it is a URI.
    """
    path = expand(path)
    if "://" in path:
        raise DataError(f'data.path: the source "{source}" needs a local folder, came {without_secrets(path)}')
    return os.path.abspath(path)


@contextlib.contextmanager
def _as_data_error(words):
    try:
        yield
    except RunFolderError as error:
        raise DataError(f"{words}{str(error).removeprefix('storage ')}") from error
