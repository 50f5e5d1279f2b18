"""Keyed random generators: the one place where genray's randomness begins.

Every random number in genray comes from a generator keyed by (seed, learner, purpose, step), never from global
state. The same key gives the same numbers in any process and in any order, so any window of training can be
replayed anywhere after a crash.
"""

import hashlib
from numbers import Integral

import numpy as np
import torch


def key_seed(seed: int, *parts: str | int) -> int:
    """A stable seed for one purpose, derived from the run's seed.

    The parts are hashed (BLAKE2b) in an unambiguous encoding: each carries its type and length, so ("ab", "c"),
    ("a", "bc") and ("abc",) differ, and so do 1 and "1". Python's own hash() is salted per process and unfit here.

    Args:
        seed: the run's seed, any integer.
        *parts: names and numbers that make the key, e.g. ("linf", "augmentation", step).

    Returns:
        An integer in [0, 2**63). Torch's CPU generator uses the low 32 bits only, its CUDA generator all of them.

    Raises:
        TypeError: the seed is no integer, or a part is neither str nor int (bool counts as neither).
    """
    if not _is_int(seed):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        digest.update(_encode(part))
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(device: str | torch.device, seed: int, *parts: str | int) -> torch.Generator:
    """A fresh generator on `device`, seeded with `key_seed(seed, *parts)`.

    The same key gives the same numbers on every device of one type; CPU and CUDA generators differ from each other.
    """
    return torch.Generator(device=device).manual_seed(key_seed(seed, *parts))


def host_generator(seed: int, *parts: str | int) -> np.random.Generator:
    """A fresh NumPy generator, seeded with `key_seed(seed, *parts)`, for random choices on the host."""
    return np.random.default_rng(key_seed(seed, *parts))


def _is_int(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _encode(part) -> bytes:
    if _is_int(part):
        kind, body = b"i", str(int(part)).encode()
    elif isinstance(part, str):
        kind, body = b"s", part.encode()
    else:
        raise TypeError(f"key part: expected a str or an int, got {part!r}")
    return kind + len(body).to_bytes(8, "big") + body
