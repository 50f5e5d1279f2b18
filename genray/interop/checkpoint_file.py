"""Reads a torch file of unknown origin: only tensors and plain containers; every other file is one line of error."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from genray.core.seal import SEAL_BYTES, check_seal, is_sealed
from genray.errors import CheckpointError, RunFolderError, one_line
from genray.interop.safetensors_file import is_safetensors, read_safetensors
from genray.storage import Storage

REASON_SHOWN = 120


@dataclass(frozen=True)
class ModelFile:
    """The content of a model file, tensors and plain containers only, and its name in messages."""

    content: object
    where: str


def read_file(source: Any) -> ModelFile:
    """Reads a model file.

    Args:
        source: path, URI or `Storage` of the file; a `ModelFile` is given back, a state dict in memory becomes one.

    Raises:
        CheckpointError: absent, empty, truncated or foreign, or with objects other than tensors; the message is one
            line and names the file.
    """
    if isinstance(source, ModelFile):
        return source
    if isinstance(source, Mapping):
        return ModelFile(source, "state dict")
    try:
        place = Storage(source)
        if not place.is_file():
            raise CheckpointError(f"{place}: {'cannot be read (is a folder)' if place.exists() else 'no such file'}")
        with place.fetch() as path:
            return ModelFile(_read(path, str(place)), str(place))
    except RunFolderError as error:
        raise CheckpointError(str(error)) from None


def _read(path, where):
    """The content of a torch or safetensors file, tensors and plain containers only, on the CPU."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror or error})") from None
    _refuse_foreign(where, head)
    if is_safetensors(head):
        return read_safetensors(path, where)
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, it then refuses: the error below says it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything, and all of it means the same to the user
        raise CheckpointError(f"{where}: {_reason(error, head)}") from error
    _check_whole(path, where)
    return content


class _Discarded:
    """Stands in for NumPy scalars, arrays and parsed arguments saved beside the weights (accuracies, mostly).

    They are not wanted, and NumPy's own constructors were not written for hostile input.
    """

    def __init__(self, *args):
        pass

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


_STAND_INS = [
    (_Discarded, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
    )
]


def _check_whole(path, where):
    """Files of genray end with a checksum; those of others, or saved anew by hand, have none."""
    with open(path, "rb") as file:
        file.seek(-min(SEAL_BYTES, path.stat().st_size), os.SEEK_END)
        if not is_sealed(file.read()):
            return
    try:
        check_seal(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{where}: is corrupt or truncated ({error})") from None


def _refuse_foreign(where: str, head: bytes) -> None:
    text = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{where}: the file is empty")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(f"{where}: is a web page (HTML), not a model file; the download went wrong")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{where}: is a Git LFS pointer, not the model file itself; run `git lfs pull`")


def _reason(error: Exception, head: bytes) -> str:
    text = one_line(error, 10_000)
    is_zip, is_pickle = head.startswith(b"PK"), head.startswith(b"\x80")
    named = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", text)
    # torch's reader stops at the first instruction that only objects or newer pickles need.
    if named or "TorchScript" in text or ("Weights only load failed" in text and (is_zip or is_pickle)):
        found = f" ({named[1]})" if named else " (or is damaged)"
        return f"contains code or objects other than tensors{found}, refused; save model.state_dict() instead"
    if is_zip or is_pickle:
        return f"is corrupt or truncated ({text[:REASON_SHOWN] or type(error).__name__})"
    return "is not a PyTorch model file"
