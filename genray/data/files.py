"""Folders of files on any file system that pyarrow knows: local, s3://, gs://, hdfs://, file:///, or a given one."""

import os
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from genray.data.request import expand, one_line
from genray.errors import DataError


class Folder:
    """A folder that exists, for listing and reading.

    Args:
        path: a local folder, a URI, or a tuple (pyarrow.fs.FileSystem, folder in it).

    Raises:
        DataError: unknown kind of URI, no such folder, or the storage refuses; names data.path.
    """

    def __init__(self, path: Any):
        try:
            self.filesystem, self.root = _resolve(path)
            kind = self.filesystem.get_file_info(self.root).type
        except (OSError, pa.ArrowException, ValueError, TypeError) as error:
            raise DataError(f"data.path: expected a readable folder, came {_shown(path)}: {one_line(error)}") from error
        if kind != pafs.FileType.Directory:
            what = "no such folder" if kind == pafs.FileType.NotFound else "not a folder"
            raise DataError(f"data.path: expected a readable folder, came {_shown(path)}: {what}")

    def list(self, below: str = "", *, recursive: bool = False) -> list[pafs.FileInfo]:
        """What stands in the sub-folder `below`, sorted by path; nothing if there is no such sub-folder."""
        base = f"{self.root.rstrip('/')}/{below}" if below else self.root
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=recursive)
        try:
            return sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"data.path: cannot list {base}: {one_line(error)}") from error

    def read(self, path: str) -> bytes:
        """All bytes of one file (a path as `list` gives it)."""
        try:
            with self.filesystem.open_input_file(path) as file:
                return file.read()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def open_file(path: Any) -> pa.NativeFile:
    """One file, to read from and seek in; the errors are pyarrow's."""
    filesystem, place = _resolve(path)
    return filesystem.open_input_file(place)


def _resolve(path: Any) -> tuple[pafs.FileSystem, str]:
    if isinstance(path, tuple):
        filesystem, root = path
        return filesystem, str(root)
    if "://" in str(path):
        return pafs.FileSystem.from_uri(str(path))
    return pafs.LocalFileSystem(), expand(path)


def _shown(path: Any) -> str:
    return str(path[1]) if isinstance(path, tuple) else os.fspath(path)
