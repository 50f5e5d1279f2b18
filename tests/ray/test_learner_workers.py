"""Learners with several workers and shared attacks, as whole runs on Ray; the arithmetic is in tests/unit."""

import os
import shutil
import signal

import pytest
import ray
import torch
from conftest import SMALL_RUN, run_outcome, wait_for

import genray
from genray.config import load_config
from genray.errors import NonFiniteError, PlacementError
from genray.parallel.torch_groups import ALL_LEARNERS, GroupSpec, group_specs_of, worker_ranks
from genray.run.allocation import allocate
from genray.run.setup import prepare
from genray.runtime.ray.actor_group import ActorGroup
from genray.runtime.ray.allocation import DeviceAllocator
from genray.runtime.ray.placement import make_placement, trial_bundles

pytestmark = pytest.mark.ray
L, N = "base_learners.linf", "base_learners.natural"
MODELS = ("model.pt", "model_last.pt", "learners/natural.pt", "learners/linf.pt")
SHARED = ["runtime.share_attack=true"]
# At a small rate and without attacks what rounding changes stays as small as it is.
TWO = [f"{N}.workers=2", f"{N}.lr=0.01", "global_learner.sync_unit=never"]


@pytest.fixture(scope="module", autouse=True)
def private_ray():
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def largest_difference(first, second, names=MODELS):
    def weights(folder, name):
        return torch.load(folder / "digits" / name, weights_only=True)["state_dict"]

    pairs = [(weights(first, name), weights(second, name)) for name in names]
    return max(float((a[key].double() - b[key].double()).abs().max()) for a, b in pairs for key in a)


def test_shared_attacks_give_the_weights_of_one_process(tmp_path, small_run):
    genray.train(None, small_run, runtime="local", storage=str(tmp_path / "local"))
    genray.train(None, [*small_run, *SHARED], storage=str(tmp_path / "shared"))
    assert largest_difference(tmp_path / "local", tmp_path / "shared") <= 1e-6
    metrics = [run_outcome(tmp_path / where / "digits")[0] for where in ("local", "shared")]
    assert [r["step"] for r in metrics[0]] == [r["step"] for r in metrics[1]]
    assert metrics[0][-1]["learners"]["linf"]["loss"] == pytest.approx(metrics[1][-1]["learners"]["linf"]["loss"])


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """Folders of a run of two workers, and of the same in one process."""
    storage = {where: tmp_path_factory.mktemp(where) for where in ("ray", "local")}
    genray.train(None, [*SMALL_RUN, *TWO, *SHARED], storage=str(storage["ray"]))
    genray.train(None, [*SMALL_RUN, *TWO, *SHARED], runtime="local", storage=str(storage["local"]))
    return storage


def test_a_killed_worker_changes_nothing(two_workers, tmp_path, monkeypatch):
    """The second worker is killed; it ends with the bits of the undisturbed run, those of one process but for
    rounding."""
    assert largest_difference(two_workers["ray"], two_workers["local"]) < 1e-5

    pids, killed, enter = [], [], ActorGroup.__enter__

    def watched(self):
        entered = enter(self)
        pids.append(self.whereabouts["natural (worker 2)"]["pid"])
        return entered

    monkeypatch.setattr(ActorGroup, "__enter__", watched)

    def kill(record):
        if record["epoch"] == 2 and not killed:
            killed.append(pids[-1])
            os.kill(pids[-1], signal.SIGKILL)

    genray.train(None, [*SMALL_RUN, *TWO, *SHARED], storage=str(tmp_path / "killed"), on_epoch=kill)
    assert len(killed) == 1 and len(set(pids)) == 2
    assert run_outcome(tmp_path / "killed" / "digits") == run_outcome(two_workers["ray"] / "digits")


def test_a_learner_that_fails_does_not_keep_the_others_waiting(tmp_path, small_run):
    with pytest.raises(NonFiniteError, match=f"{L}: .* at step"):
        genray.train(None, [*small_run, *SHARED, f"{L}.lr=1e20"], storage=str(tmp_path))  # not LostError: none stalled


def test_auto_measures_and_allocates(small_run):
    said = []

    class Told:
        def say(self, line):
            said.append(line)

    auto = [f"{name}.workers=auto" for name in (L, N)] + [f"{name}.resources.num_cpus=0.5" for name in (L, N)]
    setup = prepare(load_config(None, [*small_run, *auto, f"{L}.attack.num_steps=20"]))
    allocator = DeviceAllocator(Told())
    wait_for(lambda: ray.available_resources().get("CPU") == 4, "the end of the run before")
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
    assert trial_bundles(setup.plan, 1000, 0)[1:5] == [{"CPU": 1.0}] * 4
    auto = prepare(load_config(None, [*small_run, f"{L}.workers=auto"]))
    assert len(trial_bundles(auto.plan, 1000, 0)) == 1 + 2 + 1


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


def test_resumed_with_other_workers(two_workers, tmp_path):
    """Workers are a matter of where it runs: a run of two that share attacks goes on with one, alone."""
    folder = tmp_path / "parts" / "digits"
    shutil.copytree(two_workers["ray"] / "digits", folder)
    sorted((folder / "checkpoints").iterdir())[-1].unlink()
    later = MODELS[1:]
    for name in (*later, "results.json"):
        (folder / name).unlink()
    run = [*SMALL_RUN, *TWO, f"{N}.workers=1"]
    genray.train(None, run, storage=str(tmp_path / "parts"), resume=True)
    assert largest_difference(two_workers["local"], tmp_path / "parts", later) < 1e-5
