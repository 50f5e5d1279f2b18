"""A checksum at the end of a file, so that a damaged file is detected.

torch.load and zip readers ignore bytes after the archive, and torch does not verify the checksums inside it: without
the seal a flipped bit would be loaded as a weight.
"""

import hashlib
import io

_HEAD = b"\nsha256:"
SEAL_BYTES = len(_HEAD) + 64


def seal(buffer: io.BytesIO) -> bytes:
    """Appends the SHA-256 of its content to `buffer` and returns all bytes, without a copy."""
    with buffer.getbuffer() as content:
        digest = hashlib.sha256(content).hexdigest()
    buffer.seek(0, io.SEEK_END)
    buffer.write(_HEAD + digest.encode())
    return buffer.getvalue()  # the buffer's own bytes: nothing is copied until it is written to again


def is_sealed(data: bytes) -> bool:
    """Whether the bytes end with a seal, valid or not; the last `SEAL_BYTES` of a file are enough."""
    return data[-SEAL_BYTES:-64] == _HEAD


def check_seal(data: bytes):
    """Verifies the seal.

    Raises:
        ValueError: the seal is absent (the file was cut off) or broken (it was changed).
    """
    if not is_sealed(data):
        raise ValueError("its checksum is missing: the file was cut off or never finished")
    if hashlib.sha256(memoryview(data)[:-SEAL_BYTES]).hexdigest().encode() != data[-64:]:
        raise ValueError("its checksum does not fit: the file is damaged")
