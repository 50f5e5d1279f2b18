"""A checksum at the end of a file, so that no damaged one is ever taken for whole.

Neither torch nor zip readers mind what stands behind the archive, and torch does not check the sums inside it: without
the seal a flipped bit would be loaded as a weight.
"""

import hashlib

_HEAD = b"\nsha256:"
SEAL_BYTES = len(_HEAD) + 64


def seal(data: bytes) -> bytes:
    """`data` with its SHA-256 behind it."""
    return data + _HEAD + hashlib.sha256(data).hexdigest().encode()


def is_sealed(data: bytes) -> bool:
    """Whether there is a seal at all, broken or not; the last bytes of a file are enough."""
    return data[-SEAL_BYTES:-64] == _HEAD


def unseal(data: bytes) -> memoryview:
    """What was sealed, without a copy.

    Raises:
        ValueError: the seal is absent (the file was cut off) or broken (it was changed).
    """
    if not is_sealed(data):
        raise ValueError("its checksum is missing: the file was cut off or never finished")
    content = memoryview(data)[:-SEAL_BYTES]
    if hashlib.sha256(content).hexdigest().encode() != data[-64:]:
        raise ValueError("its checksum does not fit: the file is damaged")
    return content
