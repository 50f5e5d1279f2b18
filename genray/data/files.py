"""Folders of files that a user names as data: storage whose errors are of the data."""

import contextlib
import os
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

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

    def read(self, path: str) -> bytes:
        """All bytes of one file (a path as `list` gives it)."""
        with _as_data_error(""):
            return Storage((self.filesystem, path)).read()


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
