"""How many of torch's CPU threads a piece of work is worth."""

from contextlib import contextmanager

import torch

# Of a forward pass, for each thread: about 10 ms of a core. Threads of smaller passes mostly wait for each other, and
# where another process holds their core they burn several times the time of a single one (docs/performance.md).
FLOPS_A_THREAD = 1e9


def work_threads(flops: float, most: int) -> int:
    """Threads for passes of `flops` floating-point operations, 1 to `most`: as many as the work is worth."""
    return max(1, int(min(most, flops / FLOPS_A_THREAD)))


@contextmanager
def threads_kept():
    """Inside, `torch.set_num_threads` may be called; afterwards there are as many as before, which is what it gives."""
    before = torch.get_num_threads()
    try:
        yield before
    finally:
        torch.set_num_threads(before)
