"""Pinning to (logical) GPUs, and clusters that are too small."""

import time

import pytest
import ray
from conftest import disconnect, wait_for
from ray.util.placement_group import placement_group, remove_placement_group

import genray
from genray.config import load_config
from genray.errors import PlacementError
from genray.recording import Progress
from genray.run.allocation import equal_workers, fit, gpus_each
from genray.run.setup import prepare
from genray.runtime.ray.actor_group import ActorGroup
from genray.runtime.ray.allocation import DeviceAllocator
from genray.runtime.ray.cluster import node_resources
from genray.runtime.ray.placement import make_placement, trial_bundles
from genray.tuning.checks import check_fits

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def gpus(request):
    """A Ray with (CPUs, GPUs); pytest puts the tests of one Ray one after another."""
    cpus, gpus = request.param
    disconnect()
    none_idle = {"prestart_worker_first_driver": False}  # most tests here only place, and need no process
    ray.init(
        "local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, log_to_driver=False, _system_config=none_idle
    )
    yield gpus
    ray.shutdown()


two_gpus = pytest.mark.parametrize("gpus", [(2, 2)], indirect=True)


def assert_all_free(expected):
    """Resources come back a moment after their actors are gone."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        free = {kind: ray.available_resources().get(kind, 0) for kind in expected}
        if free == expected:
            break
        time.sleep(0.1)
    assert free == expected


@two_gpus
def test_learners_hold_different_devices(gpus, small_run):
    setup = prepare(load_config(None, small_run))
    placement = make_placement(setup.plan, 1000, ray.available_resources())
    with ActorGroup(setup, placement, {}) as group:
        natural, linf = group.whereabouts["natural"], group.whereabouts["linf"]
    assert len(natural["gpu_ids"]) == len(linf["gpu_ids"]) == 1
    assert natural["gpu_ids"] != linf["gpu_ids"]
    assert natural["pid"] != linf["pid"]
    assert_all_free({"CPU": 2, "GPU": 2})


@two_gpus
def test_too_few_gpus_is_said_within_the_timeout(gpus, tmp_path, small_run):
    overrides = [*small_run, "base_learners.linf.workers=2", "device=cuda"]
    overrides += [f"base_learners.{name}.resources.num_gpus=1" for name in ("natural", "linf")]
    with pytest.raises(PlacementError, match=r"3 GPU wanted, 2 in the cluster.*linf 2 x 1 CPU 1 GPU"):
        genray.train(None, [*overrides, "runtime.startup_timeout_s=8"], storage=str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert_all_free({"CPU": 2, "GPU": 2})


@pytest.mark.parametrize("gpus", [(10, 1)], indirect=True)
def test_one_gpu_is_shared(gpus, small_run):
    setup = prepare(load_config(None, small_run))
    with ActorGroup(setup, make_placement(setup.plan, 1000, ray.available_resources()), {}) as group:
        ids = {name: where["gpu_ids"] for name, where in group.whereabouts.items()}
    assert ids == {"natural": ["0"], "linf": ["0"], "evaluator": ["0"]}
    assert_all_free({"CPU": 10, "GPU": 1})


# --- every fraction is placed by a real Ray --------------------------------------------------------------------------


def placed(bundles, seconds=20):
    """Whether Ray places them all at once; they are given back."""
    group = placement_group(bundles)
    try:
        return bool(ray.wait([group.ready()], timeout=seconds)[0])
    finally:
        remove_placement_group(group)
        free = {kind: ray.cluster_resources()[kind] for kind in ("CPU", "GPU")}
        wait_for(lambda: free.items() <= ray.available_resources().items(), "free devices")


@pytest.mark.parametrize("gpus", [(10, 1), (10, 3)], indirect=True)
def test_fractions_are_what_ray_places(gpus, small_run):
    for actors in range(1, 9):
        most = -(-actors // gpus)  # on one device, where all have as many as they can
        (fraction, *others) = gpus_each(["auto"] * actors, "auto", gpus)
        assert fraction == int(10_000 / most) / 10_000 and others == [fraction] * (actors - 1)
        assert placed([{"GPU": fraction}] * actors)
        number, each = equal_workers(node_resources(), actors, 100, "auto")
        assert (number, each) == (actors, {"num_cpus": 1, "num_gpus": fraction})
    for workers in (1, 2, 3, 7):
        setup = prepare(load_config(None, [*small_run, f"base_learners.linf.workers={workers}"]))
        found = make_placement(setup.plan, 1000, ray.available_resources())
        assert placed(found.bundles), found.bundles
        assert placed(trial_bundles(setup.plan, 1000, gpus)[0])
    for wanted in (["auto", 0.5, "auto"], [0.7, "auto", "auto", "auto"], ["auto", 0.0, 0.25, "auto", "auto"]):
        mixed = gpus_each(wanted, "auto", gpus)
        assert placed([{"GPU": amount} if amount else {"CPU": 1} for amount in mixed]), mixed


@two_gpus
def test_sums_are_not_room(gpus, small_run):
    """Three times 0.6 is less than two GPUs, and no two of them lie on one."""
    sixths, halves = [{"GPU": 0.6}] * 3, [{"GPU": 0.5}] * 4
    assert not fit(sixths, node_resources()) and not placed(sixths, seconds=2)
    assert fit(halves, node_resources()) and placed(halves)
    for number in (1, 2, 3):
        bundles = [{"CPU": 1, "GPU": 0.4}] * number
        assert fit(bundles, node_resources()) == placed(bundles, seconds=2), "as Ray, also where it is CPUs that lack"
    with pytest.raises(PlacementError, match=r"^trial a: wants 0 CPU, 1.8 GPU .* 1 nodes \(2 CPU, 2 GPU\)"):
        check_fits({"a": sixths}, {"a": [{}] * len(sixths)})  # Tune would wait for it for ever
    both = [f"base_learners.{name}.resources.num_gpus=0.6" for name in ("natural", "linf")]
    auto = prepare(load_config(None, [*small_run, *both, "base_learners.linf.workers=auto"]))
    found = DeviceAllocator(Progress()).workers(auto, {"CPU": 8, "GPU": 3})
    assert found == {"natural": 1, "linf": 1}, "the node has two GPUs, whatever is free elsewhere"
    setup = prepare(load_config(None, [*small_run, *both, "base_learners.linf.workers=2"]))
    crowded, roomy = (make_placement(setup.plan, 1000, {"CPU": 8, "GPU": gpus}) for gpus in (3, 4))
    assert crowded.evaluator.bundle == 0, "no device of its own is left, although 1.8 of 3 are taken"
    assert roomy.bundles[roomy.evaluator.bundle] == {"CPU": 1, "GPU": 1}


def test_workers_of_a_node_with_many_gpus_and_few_cpus_find_room():
    nodes = [{"CPU": 16.0}, {"CPU": 2.0, "GPU": 4.0}]
    assert equal_workers(nodes, 0, 100, "auto") == (4, {"num_cpus": 0.5, "num_gpus": 1})
    assert equal_workers(nodes, 0, 3, "auto") == (3, {"num_cpus": 0.5, "num_gpus": 1})
    assert equal_workers(nodes, 0, 100, "cpu") == (18, {"num_cpus": 1, "num_gpus": 0})
