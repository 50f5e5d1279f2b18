"""Whether the same operations give the same bits again: on a CPU they do, on a GPU only if torch is told to."""

import os
from contextlib import contextmanager

import torch


def use_deterministic_kernels():
    """From here on, torch chooses kernels whose results repeat bit by bit on the same kind of device, if it has them.

    An operation without such a kernel runs all the same and is named in a warning. Compiled, or on another kind of
    GPU, the bits may be others. To be called before the process uses cuBLAS, which reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory before it is written: filling it first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = torch.backends.cudnn.benchmark = False


@contextmanager
def deterministic(wanted: bool):
    """The same inside, if it is wanted; torch's settings are put back afterwards."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    use_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = fill, benchmark
