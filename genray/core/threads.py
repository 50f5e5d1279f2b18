"""The number of torch's CPU threads for a computation."""

from contextlib import contextmanager

import torch

# Operations of a forward pass per thread, about 10 ms of a core. With less, threads mostly wait for each other, and if
# another process uses their core they take several times as long as a single thread (docs/performance.md).
FLOPS_A_THREAD = 1e9


def work_threads(flops: float, most: int) -> int:
    """Number of threads, from 1 to `most`, for passes of `flops` floating-point operations."""
    return max(1, int(min(most, flops / FLOPS_A_THREAD)))


@contextmanager
def threads_kept():
    """Restores torch's number of threads at the end of the `with` statement; yields that number."""
    before = torch.get_num_threads()
    try:
        yield before
    finally:
        torch.set_num_threads(before)
