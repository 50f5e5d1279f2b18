"""Learners with several workers and shared attacks, as whole runs on Ray; the arithmetic is in tests/unit."""

import os
import signal

import pytest
from conftest import SMALL_RUN, actors, run_outcome
from test_kills import largest_difference

import genray
from genray.config import load_config
from genray.errors import NonFiniteError, PlacementError
from genray.parallel.torch_groups import ALL_LEARNERS, GroupSpec, group_specs_of, worker_ranks
from genray.run.allocation import allocate
from genray.run.setup import prepare
from genray.runtime.ray.allocation import DeviceAllocator
from genray.runtime.ray.placement import make_placement, trial_bundles

pytestmark = pytest.mark.ray
L, N = "base_learners.linf", "base_learners.natural"
SHARED = ["runtime.share_attack=true"]
# At a small rate and without attacks what rounding changes stays as small as it is.
TWO = [f"{N}.workers=2", f"{N}.lr=0.01", "global_learner.sync_unit=never"]


def test_a_killed_worker_changes_nothing(on_ray, tmp_path):
    """One of three processes of two learners is killed: the run ends with the bits of the undisturbed run, those of one
    process but for rounding. And a run of two workers that share attacks goes on with one, alone."""
    ours, alone, killed = (tmp_path / name / "digits" for name in ("ray", "local", "killed"))
    run = [*SMALL_RUN, *TWO, *SHARED]
    genray.train(None, run, storage=str(ours.parent))
    genray.train(None, run, runtime="local", storage=str(alone.parent))
    assert largest_difference(ours, alone) < 1e-5
    found = []

    def kill(record):
        if record["epoch"] == 2 and not found:
            found.extend(actors(b"ray::BaseLearner"))
            os.kill(found[-1], signal.SIGKILL)

    genray.train(None, run, storage=str(killed.parent), on_epoch=kill)
    assert len(found) == 3
    assert run_outcome(killed) == run_outcome(ours)

    sorted((killed / "checkpoints").iterdir())[-1].unlink()
    later = ("model_last.pt", "learners/natural.pt", "learners/linf.pt")
    for name in (*later, "results.json"):
        (killed / name).unlink()
    run = [*SMALL_RUN, *TWO, f"{N}.workers=1"]
    genray.train(None, run, runtime="local", storage=str(killed.parent), resume=True)
    assert largest_difference(alone, killed, later) < 1e-5


def test_a_learner_that_fails_does_not_keep_the_others_waiting(on_ray, tmp_path, small_run):
    with pytest.raises(NonFiniteError, match=f"{L}: .* at step"):
        genray.train(None, [*small_run, *SHARED, f"{L}.lr=1e20"], storage=str(tmp_path))  # not LostError: none stalled


def test_auto_measures_and_allocates(on_ray, small_run):
    said = []

    class Told:
        def say(self, line):
            said.append(line)

    auto = [f"{name}.workers=auto" for name in (L, N)] + [f"{name}.resources.num_cpus=0.5" for name in (L, N)]
    setup = prepare(load_config(None, [*small_run, *auto, f"{L}.attack.num_steps=20"]))
    allocator = DeviceAllocator(Told())
    found = allocator.workers(setup, {"CPU": 4})
    assert found == allocate(allocator.seconds, 8) and found["linf"] > found["natural"]
    assert len(said) == 2 and "linf: " in said[1] and "idle" in said[0]
    before = allocator.seconds
    assert allocator.workers(setup, {"CPU": 1}) == {"natural": 1, "linf": 1} and allocator.seconds is before


# --- where they go ---------------------------------------------------------------------------------------------------


def test_every_worker_has_a_bundle(small_run):
    setup = prepare(load_config(None, [*small_run, f"{L}.workers=3"]))
    placement = make_placement(setup.plan, 1000, {"CPU": 8, "GPU": 4})
    assert placement.bundles[:4] == [{"CPU": 1.0, "GPU": 1.0}] * 4
    assert {name: [p.bundle for p in places] for name, places in placement.learners.items()} == {
        "natural": [0],
        "linf": [1, 2, 3],
    }
    assert placement.evaluator.bundle == 0 and placement.learners["natural"][0].num_gpus == 0.9
    shared = make_placement(setup.plan, 1000, {"CPU": 8, "GPU": 2})
    assert {p.num_gpus for p in shared.learners["linf"]} == {0.5}
    assert trial_bundles(setup.plan, 1000, 0)[0][1:5] == [{"CPU": 1.0}] * 4
    auto = prepare(load_config(None, [*small_run, f"{L}.workers=auto"]))
    assert len(trial_bundles(auto.plan, 1000, 0)[0]) == 1 + 2 + 1


def test_who_talks_to_whom():
    def where(*gpus, device="cuda:0", node="a"):
        return [{"node": node, "gpu_ids": [gpu], "device": device} for gpu in gpus]

    apart = worker_ranks({"natural": 1, "linf": 2}, share_attack=False)
    assert [(s.learner, s.rank, s.global_rank) for s in apart] == [("natural", 0, 0), ("linf", 0, 1), ("linf", 1, 2)]
    assert group_specs_of(apart, where("0", "1", "2")) == {"linf": GroupSpec((1, 2), "nccl")}
    assert group_specs_of(apart, where("0", "1", "1")) == {"linf": GroupSpec((1, 2), "gloo")}  # two on one GPU
    assert group_specs_of(apart, where("0", "1") + where("1", node="b")) == {"linf": GroupSpec((1, 2), "nccl")}
    assert group_specs_of(apart, where(*"012", device="cpu"))["linf"].backend == "gloo"
    assert group_specs_of(worker_ranks({"natural": 1, "linf": 1}, share_attack=False), where("0", "1")) == {}
    shared = worker_ranks({"natural": 1, "linf": 2}, share_attack=True)
    assert group_specs_of(shared, where(*"012"))[ALL_LEARNERS] == GroupSpec((0, 1, 2), "nccl")
    assert shared[0].owners == {"natural": 0, "linf": 1}
    with pytest.raises(PlacementError, match="runtime.share_attack: expected devices of one kind, got cpu and cuda"):
        group_specs_of(shared, where("0", device="cpu") + where("1", "2"))
    with pytest.raises(PlacementError, match="base_learners.linf.workers: expected devices of one kind"):
        group_specs_of(apart, where("0", "1") + where("2", device="cpu"))
