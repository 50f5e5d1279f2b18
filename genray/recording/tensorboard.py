"""TensorBoard's event files. Written by hand: the usual writer blocks for good once its disk is full."""

import socket
import time
import uuid
from pathlib import Path

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from genray.errors import StorageError


class EventFile:
    """One event file beside `metrics.jsonl`: appended to on a local disk, else uploaded as a whole.

    Args:
        storage: of the run folder.
        writer: the `Writer` that does the writing.
        first_epoch: hides what earlier files say from this epoch on (a run that went back or was resumed).
    """

    def __init__(self, storage, writer, first_epoch: int):
        self.storage, self.writer, self.written = storage, writer, 0
        self.name = self.key = _new_name()
        start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
        self.content = _framed(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.content += _framed(Event(wall_time=time.time(), step=first_epoch, session_log=start))

    def add(self, record: dict):
        """One epoch's record."""
        for tag, value in _scalars(record):
            self.content += _framed(Event(wall_time=time.time(), step=record["epoch"], summary=scalar(tag, value)))
        self.writer.put(self.key, self._write)

    def _write(self):
        content = self.content
        if self.written and self._append(content):
            return
        if self.written and self.storage.is_local:
            self.name = _new_name()  # TensorBoard may still follow the one that was removed
        self.storage.write(self.name, content)
        self.written = len(content)

    def _append(self, content):
        """Adds what is new; False where that cannot be done: on object storage, or the file is not there any more."""
        path = Path(self.storage.path(self.name))
        if not self.storage.is_local or not path.is_file() or path.stat().st_size < self.written:
            return False
        try:
            with open(path, "r+b") as stream:  # TensorBoard keeps it open: no new file in its place
                stream.seek(self.written)
                stream.write(content[self.written :])
                stream.truncate()
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
        self.written = len(content)
        return True


def _new_name():
    unique = f"{time.time():.0f}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
    return f"tensorboard/events.out.tfevents.{unique}"


def _scalars(record):
    for name, rate in (record["global"] or {}).items():
        yield f"global/{name}", rate
    for name, weight in record["mixing_weights"].items():
        yield f"mixing_weight/{name}", weight
    for learner, values in record["learners"].items():
        for name, value in values.items():
            yield f"{learner}/{name}", value


def _framed(event) -> bytes:
    """TFRecord: length, its checksum, the event, its checksum."""
    data = event.SerializeToString()
    length = len(data).to_bytes(8, "little")
    return length + _masked(length) + data + _masked(data)


def _masked(data):
    value = crc32c(data)
    return (((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")
