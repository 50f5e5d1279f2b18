"""Settings of torch that decide the bits: reproducible kernels, and the precision of float32 operations."""

import os
from contextlib import contextmanager
from typing import Any

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
def float32_precision(kind: str):
    """How float32 matrix products and convolutions are computed inside the `with` statement.

    Args:
        kind: "fp32" computes in float32; "tf32" lets a GPU round their inputs to 10 bits of mantissa, which is torch's
            default for convolutions. A CPU always computes in float32 here, whatever the caller has set.
    """
    backends, value = torch.backends, {"fp32": "ieee", "tf32": "tf32"}[kind]
    cudnn: Any = backends.cudnn  # torch makes the parts of these two when it is imported
    mkldnn: Any = backends.mkldnn
    wanted = {
        backends.cuda.matmul: value,
        cudnn.conv: value,
        cudnn.rnn: value,
        mkldnn.matmul: "ieee",
        mkldnn.conv: "ieee",
    }
    before = {backend: backend.fp32_precision for backend in wanted}
    legacy = [_read(torch.get_float32_matmul_precision), _read(lambda: cudnn.allow_tf32)]
    try:
        # torch's older switches first: where they say otherwise, reading them is an error (torch.compile may).
        _set_legacy("high" if kind == "tf32" else "highest", kind == "tf32")
        for backend, precision in wanted.items():
            backend.fp32_precision = precision
        yield
    finally:
        _set_legacy(*legacy)
        for backend, precision in before.items():
            backend.fp32_precision = precision


def _read(switch):
    """Its value; None where the caller has set the newer switches against it."""
    try:
        return switch()
    except RuntimeError:
        return None


def _set_legacy(matmul, convolution):
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if convolution is not None:
        torch.backends.cudnn.allow_tf32 = convolution


@contextmanager
def full_precision():
    """Evaluation is float32 whatever training used: no TF32, no autocast."""
    with float32_precision("fp32"), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield
