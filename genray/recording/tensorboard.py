"""TensorBoard's event file of a run; tensorboardX's own writer blocks for good once its disk is full."""

import socket
import struct
import time
import uuid
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from genray.errors import StorageError
from genray.recording.trackers import scalars


class EventFile:
    """One event file beside `metrics.jsonl`, written whole after each epoch.

    Args:
        storage: of the run folder.
        writer: the `Writer` that does the writing.
        first_epoch: hides the records of earlier files from this epoch on (a run that went back or was resumed).
    """

    def __init__(self, storage, writer, first_epoch: int):
        self.storage, self.writer, self.content = storage, writer, b""
        unique = f"{time.time():.0f}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        self.name = f"tensorboard/events.out.tfevents.{unique}"
        self._append(file_version="brain.Event:2")
        self._append(step=first_epoch, session_log=SessionLog(status=SessionLog.SessionStatus.Value("START")))

    def add(self, record: dict):
        """Adds the record of an epoch."""
        for tag, value in scalars(record).items():
            self._append(step=record["epoch"], summary=scalar(tag, value))
        self.writer.put(self.name, self._write)

    def _append(self, **fields):
        """A TFRecord: length, its checksum, the event, its checksum."""
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self.content += length + next(sums) + data + next(sums)

    def _write(self):
        path, content = Path(self.storage.path(self.name)), self.content
        if not self.storage.is_local or not path.is_file():
            self.storage.write(self.name, content)
            return
        try:
            with open(path, "r+b") as stream:  # TensorBoard keeps it open: no new file in its place
                stream.write(content)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
