"""Pinning to (logical) GPUs, and clusters that are too small."""

import time

import pytest
import ray

import genray
from genray.config import load_config
from genray.errors import PlacementError
from genray.learners.setup import prepare
from genray.runtime.group import ActorGroup
from genray.runtime.placement import make_placement

pytestmark = pytest.mark.ray


@pytest.fixture
def two_gpus():
    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def assert_all_free(expected):
    """Resources come back a moment after their actors are gone."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        free = {kind: ray.available_resources().get(kind, 0) for kind in expected}
        if free == expected:
            break
        time.sleep(0.1)
    assert free == expected


def test_learners_hold_different_devices(two_gpus, small_run):
    setup = prepare(load_config(None, small_run))
    placement = make_placement(setup.plan, 1000, ray.available_resources())
    with ActorGroup(setup, placement, {}) as group:
        natural, linf = group.whereabouts["natural"], group.whereabouts["linf"]
    assert len(natural["gpu_ids"]) == len(linf["gpu_ids"]) == 1
    assert natural["gpu_ids"] != linf["gpu_ids"]
    assert natural["pid"] != linf["pid"]
    assert_all_free({"CPU": 2, "GPU": 2})


def test_too_few_gpus_is_said_within_the_timeout(two_gpus, tmp_path, small_run):
    overrides = [*small_run, "base_learners.linf.resources.num_gpus=2", "base_learners.natural.resources.num_gpus=1"]
    began = time.monotonic()
    with pytest.raises(PlacementError, match=r"3 GPU wanted, 2 in the cluster.*linf 1 CPU 2 GPU"):
        genray.train(None, [*overrides, "runtime.startup_timeout_s=8"], storage=str(tmp_path))
    assert time.monotonic() - began < 15
    assert not list(tmp_path.iterdir())
    assert_all_free({"CPU": 2, "GPU": 2})


def test_one_gpu_is_shared(small_run):
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        setup = prepare(load_config(None, small_run))
        placement = make_placement(setup.plan, 1000, ray.available_resources())
        with ActorGroup(setup, placement, {}) as group:
            ids = {name: where["gpu_ids"] for name, where in group.whereabouts.items()}
        assert ids == {"natural": ["0"], "linf": ["0"], "evaluator": ["0"]}
    finally:
        ray.shutdown()
