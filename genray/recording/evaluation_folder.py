"""An evaluation's folder: every finished block at once, so that nothing finished is ever lost or done twice."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from genray import records
from genray.console import say
from genray.errors import RunFolderError, StorageError
from genray.evaluation.job import BlockResult, Task
from genray.evaluation.saved_images import FOLDER, Saved, of_parquet, to_parquet
from genray.recording.writer import Writer
from genray.storage import Storage

STORAGE_TIMEOUT_S = 300.0  # how long a finished evaluation waits for storage that fails
GRACE_S = 20.0  # and one that is stopped


def check_place(place: Any, resume: bool, overwrite: bool) -> Storage:
    """The folder of an evaluation, looked at before anything is computed.

    Raises:
        RunFolderError: it cannot be written, or an evaluation is there and neither `resume` nor `overwrite` is on.
    """
    storage = Storage(place)
    storage.check_writable()
    if storage.exists("request.json") and not resume and not overwrite:
        raise RunFolderError(
            f"{storage}: this evaluation is there; --resume goes on with it or shows it, --overwrite replaces it, and "
            "--output makes another"
        )
    return storage


class EvaluationFolder:
    """`request.json`, `blocks/<task>.json`, and at the end `results.json` and `results.parquet`; with images, also
    `images/<task>.parquet`.

    Files are written beside the evaluation (see `Writer`).

    Args:
        place: path, URI or `Storage` of the folder.
        identity: what is evaluated and how, as plain data; another evaluation cannot go on in the same folder.
        resume: go on with what is there.
        overwrite: replace what is there, as soon as the first block is done.
        with_images: a block without its images is not finished.

    Raises:
        RunFolderError: another evaluation is there, or one is there and neither `resume` nor `overwrite` is on.
    """

    def __init__(self, place: Any, identity: dict, resume: bool, overwrite: bool = False, with_images=False):
        self.storage = check_place(place, resume, overwrite)
        if resume and self.storage.exists("request.json"):
            self._check_same(identity)
        elif resume and self.storage.names("blocks"):
            raise RunFolderError(
                f"{self.storage}: expected request.json, which says what its blocks are of, it is gone"
            )
        self.identity, self.begun, self.replaces, self.with_images = identity, False, overwrite, with_images
        self.writer = Writer(say)

    def _check_same(self, identity):
        try:
            before = records.read(records.EvaluationRequest, self.storage, "request.json")
        except records.Damaged as error:
            raise RunFolderError(f"{self.storage}: {error}") from None
        # "images" says the same as the fingerprint, which older evaluations do not have.
        now, ignored = json.loads(json.dumps(identity)), ("hash", "fingerprint")
        different = records.first_difference(before, now, ignored=ignored)
        if different:
            raise RunFolderError(f"{self.storage}: cannot resume another evaluation: {different}")

    def finished(self, tasks: list[Task]) -> dict[Task, BlockResult]:
        """Results of those tasks that are done."""
        present = set() if self.replaces else {name.removesuffix(".json") for name in self.storage.names("blocks")}
        if present and self.with_images:
            there = {name.removesuffix(".parquet") for name in self.storage.names(FOLDER)}
            present = {key for key in present if key in there or key.startswith("none-")}
        found = {task: self._read(task) for task in tasks if task.key in present}
        return {task: result for task, result in found.items() if result is not None}

    def _read(self, task):
        """The result of a task; None if the file was damaged, and then the task is done again."""
        try:
            return BlockResult.of_record(json.loads(self.storage.read(f"blocks/{task.key}.json")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def write(self, task: Task, result: BlockResult):
        """Keeps a finished block; the first one is preceded by what is evaluated, and before that nothing is there."""
        if result.images is not None:
            self._put(f"{FOLDER}/{task.key}.parquet", to_parquet(result.images))
        self._put(f"blocks/{task.key}.json", json.dumps(result.record()).encode())

    def images(self, tasks: list[Task]) -> Iterator[tuple[Task, Saved]]:
        """Yields the images of tasks as they are read back, once everything is written.

        Raises:
            StorageError: a file cannot be written or read.
        """
        self.writer.flush(STORAGE_TIMEOUT_S)
        for task in tasks:
            yield task, of_parquet(self.storage.read(f"{FOLDER}/{task.key}.parquet"))

    def _put(self, name, content):
        def write():
            if not self.begun:
                self._begin()
            self.storage.write(name, content)

        self.writer.put(name, write)

    def _begin(self):
        for name in ("results.json", "results.parquet", "blocks", FOLDER) if self.replaces else ():
            if self.storage.exists(name):
                self.storage.delete(name)
        self.storage.remove_unfinished()  # of a process that was killed while it wrote
        self.storage.write("request.json", json.dumps(self.identity, indent=1).encode())
        self.begun = True

    def finish(self, record: dict, flags: bytes):
        """Writes the results, and waits until everything is written.

        Raises:
            StorageError: something is not after `STORAGE_TIMEOUT_S`; the message lists the files and why.
        """
        self._put("results.parquet", flags)
        self._put("results.json", (json.dumps(record, indent=1) + "\n").encode())
        self.writer.flush(STORAGE_TIMEOUT_S)

    def save(self):
        """An evaluation that ends early: waits for the blocks that are finished, at most `GRACE_S`."""
        try:
            self.writer.flush(GRACE_S)
        except StorageError as error:
            self.writer.say(f"warning: {error}")


def protocol_in(uri: str) -> dict:
    """What an evaluation that is in a folder measures; {} where there is none, or none that can be read."""
    storage = Storage(uri)
    try:
        if storage.exists("request.json"):
            return records.read(records.EvaluationRequest, storage, "request.json").get("protocol") or {}
    except records.Damaged:
        pass
    return {}


def fingerprint(tensors: dict) -> str:
    """A hash of named tensors' bytes, types and shapes: the same weights or images, or not."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if not hasattr(tensor, "detach"):  # a module's extra state
            digest.update(repr((name, tensor)).encode())
            continue
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
