"""A checksum at the end of a file, so that no damaged one is ever taken for whole.

Readers of torch files and zip archives ignore bytes behind the archive, and torch does not check the sums inside it:
without the seal a flipped bit would be loaded as a weight.
"""

import hashlib
import io

_HEAD = b"\nsha256:"
SEAL_BYTES = len(_HEAD) + 64


def seal(buffer: io.BytesIO) -> bytes:
    """The content of `buffer` with its SHA-256 behind it, without a copy; the seal is written to the buffer too."""
    with buffer.getbuffer() as content:
        digest = hashlib.sha256(content).hexdigest()
    buffer.seek(0, io.SEEK_END)
    buffer.write(_HEAD + digest.encode())
    return buffer.getvalue()  # the buffer's own bytes: nothing is copied until it is written to again


def is_sealed(data: bytes) -> bool:
    """Whether there is a seal at all, broken or not; the last bytes of a file are enough."""
    return data[-SEAL_BYTES:-64] == _HEAD


def check_seal(data: bytes):
    """Whether sealed bytes are what was sealed.

    Raises:
        ValueError: the seal is absent (the file was cut off) or broken (it was changed).
    """
    if not is_sealed(data):
        raise ValueError("its checksum is missing: the file was cut off or never finished")
    if hashlib.sha256(memoryview(data)[:-SEAL_BYTES]).hexdigest().encode() != data[-64:]:
        raise ValueError("its checksum does not fit: the file is damaged")
