"""The device of these tests: a GPU; with GENRAY_TEST_DEVICE=cpu a CPU, where a test has a meaning there.

They need pytest and genray, but neither ray nor a network (the tests of both runtimes are skipped without ray).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "unit"), str(TESTS / "golden")]
WANTED = os.environ.get("GENRAY_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device():
    if WANTED == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device; GENRAY_TEST_DEVICE=cpu runs what has a meaning on a CPU")
    return WANTED


@pytest.fixture
def gpu(device):
    """A device that must be a GPU."""
    if device != "cuda":
        pytest.skip("has a meaning on a GPU only")
    return device


@pytest.fixture
def report(request):
    """Records a number of a test, for `benchmarks/gpu_check.py`."""

    def keep(name, value):
        request.node.user_properties.append((name, value))

    return keep
