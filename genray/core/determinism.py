"""Bitwise reproducible kernels: the default on a CPU, a setting of torch on a GPU."""

import os
from contextlib import contextmanager

import torch


def use_deterministic_kernels():
    """Makes torch choose deterministic kernels for the rest of the process.

    An operation without a deterministic kernel still runs and is named in a warning. Compiled code and other GPU models
    may give other bits. Call it before the process uses cuBLAS, which reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory before it is written: filling it first would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = torch.backends.cudnn.benchmark = False


@contextmanager
def deterministic(wanted: bool):
    """Uses deterministic kernels inside the `with` statement if `wanted`, and restores torch's settings."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # as torch makes it
    benchmark = torch.backends.cudnn.benchmark
    use_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def full_precision():
    """Evaluation is float32 whatever training used: no TF32, no autocast."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
