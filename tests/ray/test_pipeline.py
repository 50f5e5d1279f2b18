"""The driver's part of the Ray runtime, with learners that only pretend."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import ray
from conftest import wait_for

import genray
from genray.config import load_config
from genray.errors import LostError
from genray.run.setup import prepare
from genray.runtime.ray.driver import STATE_COPIES, ActorMonitor, Pipeline
from genray.runtime.ray.fetch import fetch

pytestmark = pytest.mark.ray


class SilentProgress:
    def steps(self, done):
        pass


@ray.remote(num_cpus=0)
class Standing:
    """A learner that stands at step 7 for ever."""

    def status(self):
        return 7


def standing_group():
    learners = {"natural": Standing.remote(), "linf": Standing.remote()}
    everyone = {f"base_learners.{name}": actor for name, actor in learners.items()}
    return SimpleNamespace(learners=learners, everyone=everyone, fetch=partial(fetch, timeout_s=60))


def test_a_stalled_learner_is_named(on_ray):
    watch = ActorMonitor(standing_group(), stall_timeout_s=600, progress=SilentProgress())
    wait_for(lambda: watch.look() or set(watch.steps.values()) == {7}, "the learners' first answers")
    watch.stall_timeout_s, began = 1.5, time.monotonic()
    stands = r"runtime.stall_timeout_s \(1.5 s\): base_learners.natural at step 7, base_learners.linf at step 7"
    with pytest.raises(LostError, match=f"evaluator: nothing moved for {stands}"):
        while time.monotonic() - began < 60:
            watch.look(["evaluator"])
            time.sleep(0.05)
    assert time.monotonic() - began < 60


def test_windows_ahead_fit_the_budget(small_run):
    """At least two windows are in flight; beyond that only what fits into runtime.max_ahead_gib."""
    submitted = {}
    for gib in (1e-6, 0.05, 100):
        setup = prepare(load_config(None, [*small_run, "training.epochs=60", f"runtime.max_ahead_gib={gib}"]))
        group = SimpleNamespace(learners={"natural": None, "linf": None})
        pipeline = Pipeline(setup, group, None, SilentProgress(), None)
        pipeline._submit = lambda window, nbytes: SimpleNamespace(window=window, nbytes=nbytes)
        pipeline._submit_ahead()
        submitted[gib] = len(pipeline.in_flight)
        if gib == 0.05:
            per_epoch_end = (4 + 2 * STATE_COPIES) * setup.weight_bytes
            assert sum(f.nbytes for f in pipeline.in_flight) <= 0.05 * 2**30
            assert sum(f.nbytes for f in pipeline.in_flight) + per_epoch_end > 0.05 * 2**30
    assert submitted[1e-6] == 2
    assert 2 < submitted[0.05] < submitted[100] == len(setup.plan.windows)


def test_learners_do_not_wait_for_each_other_before_redistribution(on_ray, small_run, tmp_path, monkeypatch):
    """The natural learner is an epoch ahead of a slow robust one, until theta_g is handed back."""
    seen = []
    look = ActorMonitor.look

    def recording_look(self, awaited):
        look(self, awaited)
        seen.append({who.removeprefix("base_learners."): step for who, step in self.steps.items()})

    monkeypatch.setattr(ActorMonitor, "look", recording_look)
    overrides = [
        *small_run,
        "training.epochs=4",
        "base_learners.linf.attack.num_steps=40",
        "global_learner.warmup_epochs=3",
        "global_learner.sync_unit=epoch_end",
        "global_learner.sync_every=1",
    ]
    genray.train(None, overrides, storage=str(tmp_path))
    steps_per_epoch, warmup_step = 7, 21
    ahead = [s["natural"] - s["linf"] for s in seen if s["linf"] < warmup_step]
    assert max(ahead) > steps_per_epoch
    # The natural learner may not pass the first redistribution (end of epoch 3) without the robust one.
    assert all(s["natural"] <= warmup_step for s in seen if s["linf"] < warmup_step)
    assert seen[-1] == {"natural": 28, "linf": 28}
