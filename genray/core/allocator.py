"""Settings of the C library's allocator that make training on CPU faster; they change no number."""

import ctypes
import sys

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory():
    """Tells glibc to reuse the memory of freed activations instead of giving it back to the system.

    By default every large tensor is a fresh mapping, whose pages the kernel clears and faults in again at each step:
    PGD on a narrow ResNet-18 is 1.4 times slower for it on one core. The process then stays at its peak size. Does
    nothing if the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 64 << 20)
