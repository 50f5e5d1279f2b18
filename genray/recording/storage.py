"""Files under one folder, local or on object storage, each written whole or not at all."""

import os
import re
import uuid
from pathlib import Path

from pyarrow import fs

from genray.errors import RunFolderError, StorageError

_ASIDE = re.compile(r"\.tmp-[0-9a-f]{8}$")


class Storage:
    """A folder behind a path or URI ("runs/digits", "file:///...", "s3://bucket/prefix", "gs://...").

    Args:
        uri: the folder; it need not exist.

    Raises:
        RunFolderError: the URI cannot be understood.
    """

    def __init__(self, uri: str):
        self.uri = str(uri)
        try:
            if "://" in self.uri:
                self.filesystem, self.root = fs.FileSystem.from_uri(self.uri)
            else:
                self.filesystem, self.root = fs.LocalFileSystem(), os.path.abspath(self.uri)
        except (ValueError, OSError, NotImplementedError) as error:
            raise RunFolderError(f"storage {self.uri!r}: {_short(error)}") from None

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder is there.

        Raises:
            RunFolderError: the storage does not answer.
        """
        try:
            return self.filesystem.get_file_info(self.path(name)).type != fs.FileType.NotFound
        except OSError as error:
            raise RunFolderError(f"{self.uri}: cannot be reached: {_short(error)}") from None

    def check_writable(self):
        """Whether the folder can be made and written to, without making it (local folders only).

        Raises:
            RunFolderError: what is in the way.
        """
        folder = Path(self.root)
        while self.is_local and not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if self.is_local and not folder.is_dir():
            raise RunFolderError(f"{self.root}: cannot be made: {folder} is not a folder")
        if self.is_local and not os.access(folder, os.W_OK | os.X_OK):
            raise RunFolderError(f"{self.root}: cannot be written: no permission in {folder}")

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder, sorted; none where it does not exist."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(f.base_name for f in self.filesystem.get_file_info(selector) if f.is_file)

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted; none where it does not exist."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(f.base_name for f in self.filesystem.get_file_info(selector) if f.type == fs.FileType.Directory)

    def write(self, name: str, data: bytes):
        """Writes a file atomically: aside, flushed to disk, then renamed (object stores are atomic by themselves).

        Raises:
            StorageError: the folder cannot be written to.
        """
        try:
            self.filesystem.create_dir(os.path.dirname(self.path(name)), recursive=True)
            if self.is_local:
                _write_aside(self.path(name), data)
            else:
                stream = self.filesystem.open_output_stream(self.path(name))
                stream.write(data)
                stream.close()  # what makes the object visible; not reached where writing failed
        except OSError as error:
            raise StorageError(f"{self.path(name)}: cannot be written: {_short(error)}") from None

    def remove_unfinished(self):
        """Removes what a process that was killed while writing has left (local folders only)."""
        for path in Path(self.root).rglob("*.tmp-*"):
            if _ASIDE.search(path.name):
                path.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return stream.read()
        except OSError as error:
            raise StorageError(f"{self.path(name)}: cannot be read: {_short(error)}") from None

    def delete(self, name: str):
        """Removes a file.

        Raises:
            StorageError: it cannot be removed.
        """
        try:
            self.filesystem.delete_file(self.path(name))
        except OSError as error:
            raise StorageError(f"{self.path(name)}: cannot be removed: {_short(error)}") from None


def _write_aside(path, data):
    aside = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        with open(aside, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except BaseException:
        if os.path.exists(aside):
            os.unlink(aside)
        raise


def _short(error):
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
