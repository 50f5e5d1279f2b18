"""Files behind a path or a URI, local or on object storage, each written whole or not at all."""

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from genray.errors import RunFolderError, StorageError

_ASIDE = re.compile(r"\.tmp-[0-9a-f]{8}$")
_COPY_BYTES = 2**23
# By default pyarrow tries to connect for half a minute to S3, and for a quarter of an hour to Google Cloud Storage.
CONNECT_S, ANSWER_S, ATTEMPTS, GCS_RETRY_S = 2, 5, 3, 5
_BUCKETS = ("s3", "gcs", "abfs")
HUB = "hf://"
_SECRETS = (
    re.compile(r"(?<=://)[^@\s]*:[^@\s]*(?=@)"),  # key:secret@
    re.compile(r"(?i)(?<=[?&])([a-z_]*(?:secret|token|password|key|sas)[a-z_]*=)[^&\s'\"]*"),
)


def expand(path: Any) -> str:
    """Returns the path of a user as text: a URI unchanged, a local path with ~ expanded."""
    text = os.fspath(path)
    return text if "://" in text else os.path.expanduser(text)


def without_secrets(text: object) -> str:
    """Returns a URI, or a text with URIs, on one line and with credentials masked."""
    line = " ".join(str(text).split())
    for secret in _SECRETS:
        line = secret.sub(lambda match: f"{match[1] if match.re.groups else ''}***", line)
    return line


class Storage:
    """A file or folder behind a path or URI; it need not exist.

    `storage / "name"` is what stands below it, `str(storage)` what messages show: the path or URI without credentials.

    Args:
        place: "runs/digits", "~/runs", "file:///...", "s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http",
            "gs://...", "hf://USER/NAME" or "hf://datasets/USER/NAME" of the Hugging Face Hub, any other URI that
            pyarrow knows, a tuple (pyarrow.fs.FileSystem, path in it), or a `Storage`.

    Attributes:
        uri: names the place, with ~ expanded and credentials where the user wrote them.
        filesystem, root: pyarrow's, and the path in it.

    Raises:
        RunFolderError: the URI cannot be understood, or nothing answers there.
    """

    uri: str
    filesystem: fs.FileSystem
    root: str

    def __init__(self, place: Any):
        if isinstance(place, Storage):
            self.uri, self.filesystem, self.root = place.uri, place.filesystem, place.root
            return
        if isinstance(place, tuple):
            self.filesystem, self.root = place[0], str(place[1])
            self.uri = self.root
            return
        self.uri = str(place)
        try:
            self.uri = expand(place)
            self.filesystem, self.root = _opened(self.uri)
        except Exception as error:  # file systems of fsspec raise many kinds
            raise RunFolderError(f"storage {str(self)!r}: {_short(error)}") from None

    def __str__(self):
        return without_secrets(self.uri)

    def __truediv__(self, name: str) -> "Storage":
        return self._at(self.path(name), lambda path: str(Path(path) / name), lambda path: f"{path}/{quote(name)}")

    def __fspath__(self):
        return self.absolute

    @property
    def parent(self) -> "Storage":
        """The folder above."""
        root = os.path.dirname(self.root) or self.root
        return self._at(root, lambda path: str(Path(path).parent), lambda path: path.rpartition("/")[0])

    def _at(self, root, of_path, of_uri):
        found = Storage(self)
        place, question, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        found.root = root
        found.uri = of_uri(place.rstrip("/")) + question + options if "://" in self.uri else of_path(self.uri)
        return found

    @property
    def name(self) -> str:
        """The last part of its path."""
        return os.path.basename(self.root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def absolute(self) -> str:
        """The absolute path, or the URI, valid in any process."""
        return self.root if self.is_local else self.uri

    def path(self, name: str = "") -> str:
        """Returns the path in the file system."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    # --- looking ------------------------------------------------------------------------------------------------

    def exists(self, name: str = "") -> bool:
        """Returns whether a file or folder exists.

        Raises:
            RunFolderError: the storage does not answer.
        """
        return self._type(name) != fs.FileType.NotFound

    def is_folder(self, name: str = "") -> bool:
        """Returns whether a folder exists; errors as of `exists`."""
        return self._type(name) == fs.FileType.Directory

    def is_file(self, name: str = "") -> bool:
        """Returns whether a file exists; errors as of `exists`."""
        return self._type(name) == fs.FileType.File

    def _type(self, name):
        return self._asked(self.filesystem.get_file_info, self.path(name)).type

    def _asked(self, question, about):
        try:
            return question(about)
        except Exception as error:
            raise RunFolderError(f"{self}: cannot be reached: {_short(error)}") from None

    def check_writable(self):
        """Checks that the folder can be created and written to, without creating it: permissions, or the bucket.

        Raises:
            RunFolderError: it cannot; the message names the reason.
        """
        if not self.is_local:
            bucket = self.root.partition("/")[0]
            if self.filesystem.type_name in _BUCKETS:
                if self._asked(self.filesystem.get_file_info, bucket).type == fs.FileType.NotFound:
                    raise RunFolderError(f"{self}: cannot be written: there is no bucket {bucket}")
            return
        folder = Path(self.root)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise RunFolderError(f"{self.root}: cannot be made: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RunFolderError(f"{self.root}: cannot be written: no permission in {folder}")

    def check_new(self, overwrite: bool):
        """Checks that a file can be written here, over another one only with `overwrite`.

        Raises:
            RunFolderError: it cannot; the message names the reason.
        """
        if self.is_folder():
            raise RunFolderError(f"{self}: expected the name of a file, got a folder")
        self.parent.check_writable()
        if self.exists() and not overwrite:
            raise RunFolderError(f"{self}: exists; choose another --output, or --overwrite")

    def entries(self, below: str = "", *, recursive: bool = False) -> list[fs.FileInfo]:
        """Returns the entries of the folder or its sub-folder `below`, sorted by path; an absent folder has none.

        Raises:
            RunFolderError: the storage does not answer.
        """
        selector = fs.FileSelector(self.path(below), allow_not_found=True, recursive=recursive)
        return sorted(self._asked(self.filesystem.get_file_info, selector), key=lambda info: info.path)

    def names(self, folder: str = "") -> list[str]:
        """Returns the sorted names of the files in a folder; an absent folder has none. Errors as of `entries`."""
        return sorted(info.base_name for info in self.entries(folder) if info.is_file)

    def folders(self) -> list[str]:
        """Returns the sorted names of the folders in the folder, as `names`."""
        return sorted(info.base_name for info in self.entries() if info.type == fs.FileType.Directory)

    # --- reading ------------------------------------------------------------------------------------------------

    def open(self, name: str = "") -> pa.NativeFile:
        """Opens a file for reading and seeking; the errors are pyarrow's."""
        return self.filesystem.open_input_file(self.path(name))

    def read(self, name: str = "") -> bytes:
        """Returns the bytes of a file.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            if self.is_local:
                return Path(self.path(name)).read_bytes()
            with self.open(name) as stream:  # not open_input_stream: it reads in small pieces, a request each
                return stream.read()
        except Exception as error:
            raise StorageError(f"{self._shown(name)}: cannot be read: {_short(error)}") from None

    @contextmanager
    def fetch(self) -> Iterator[Path]:
        """Yields the path of the file on this machine: a local file itself, any other as a temporary copy.

        Raises:
            StorageError: it cannot be read, or the temporary folder is full.
        """
        if self.is_local:
            yield Path(self.root)
            return
        with tempfile.TemporaryDirectory(prefix="genray-") as folder:
            copy = Path(folder) / (self.name or "file")
            try:
                with self.open() as source, open(copy, "wb") as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
            except Exception as error:
                raise StorageError(f"{self}: cannot be read: {_short(error)}") from None
            yield copy

    # --- writing ------------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes):
        """Writes a file atomically: to a temporary name, flushed, then renamed (object stores are atomic themselves).

        Raises:
            StorageError: the folder cannot be written to.
        """
        path = self.path(name)
        try:
            if self.filesystem.type_name != "s3":  # S3 has no folders: one made first is a request for each level
                self.filesystem.create_dir(os.path.dirname(path), recursive=True)
            if self.is_local:
                _write_aside(path, data)
            else:
                stream = self.filesystem.open_output_stream(path)
                stream.write(data)
                stream.close()  # what makes the object visible; not reached where writing failed
        except Exception as error:
            raise StorageError(f"{self._shown(name)}: cannot be written: {_short(error)}") from None

    def remove_unfinished(self):
        """Removes half-written files of killed processes (local folders only)."""
        for path in Path(self.root).rglob("*.tmp-*") if self.is_local else ():
            if _ASIDE.search(path.name):
                path.unlink(missing_ok=True)

    def delete(self, name: str):
        """Removes a file, or a folder with its content.

        Raises:
            StorageError: it cannot be removed.
        """
        try:
            remove = self.filesystem.delete_dir if self.is_folder(name) else self.filesystem.delete_file
            remove(self.path(name))
        except Exception as error:
            raise StorageError(f"{self._shown(name)}: cannot be removed: {_short(error)}") from None

    def _shown(self, name):
        return self.path(name) if self.is_local else str(self / name if name else self)


def _opened(uri):
    """(file system, path in it)"""
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    if uri.startswith(HUB):
        return fs.PyFileSystem(fs.FSSpecHandler(_hub())), uri.removeprefix(HUB).rstrip("/")
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_RETRY_S}"
    place, _, options = uri.partition("?")
    option, _, name = options.partition("/")
    if name and "_path" not in option.rpartition("&")[2]:
        raise ValueError(f"expected the path before the options: {place}/{name}?{option}")
    filesystem, root = fs.FileSystem.from_uri(uri)
    if filesystem.type_name == "s3":  # these have no place in a URI
        options = filesystem.__reduce__()[1][0]  # as it pickles itself
        options |= {"connect_timeout": CONNECT_S, "request_timeout": ANSWER_S}
        if "allow_delayed_open" in options:  # since pyarrow 19: one request for a small file instead of three
            options["allow_delayed_open"] = True
        filesystem = fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS))
    return filesystem, root.rstrip("/") or root


def _hub() -> Any:
    """The Hub's file system; its token comes from huggingface_hub's own file or `HF_TOKEN`."""
    try:
        import fsspec

        return fsspec.filesystem("hf")
    except ImportError:
        raise ValueError("huggingface_hub is not installed; pip install 'genray[hub]'") from None


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
    return without_secrets(getattr(error, "strerror", None) or error or type(error).__name__)[:200]
