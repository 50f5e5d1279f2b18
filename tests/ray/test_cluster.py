"""Joining a running cluster and leaving it clean; that a run which ends or fails does so is checked by `on_ray`."""

import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import ray
import torch
from conftest import ROOT, left, wait_for

from genray.errors import ConfigError, LearnerError, NonFiniteError, PlacementError

pytestmark = pytest.mark.ray


def test_leaves_clean_when_stopped(on_ray, tmp_path, small_run):
    """By SIGTERM, for which Ray has a handler of its own; Ctrl-C in tests/unit/test_command.py."""
    line = [sys.executable, "-m", "genray.train", "--address", on_ray.address, "--storage", str(tmp_path), *small_run]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*line, "training.epochs=5000"], cwd=ROOT, **pipes)
    # The first checkpoint, not the first metrics: those are written before it.
    wait_for(lambda: list(tmp_path.glob("digits/checkpoints/state-*.pt")), "a checkpoint", process)
    process.terminate()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 143, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert list(tmp_path.glob("digits/checkpoints/state-*.pt"))
    assert not list(tmp_path.rglob("*.tmp-*"))
    wait_for(lambda: left() == [], "all resources free, no placement group, no actor", seconds=120)


PACKAGE = """
    import torch
    import torch.nn.functional as F
    from genray.objectives import Objective
    from torch import nn


    def make(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))


    class Robust(Objective):
        def __call__(self, step):
            logits = step.model(step.craft("attack"))
            return F.cross_entropy(logits, step.y), logits


    class Corner:
        def __init__(self, epsilon):
            self.epsilon = epsilon

        def __call__(self, model, x, y, draw):
            return (x + self.epsilon * draw.normal(x).sign()).clamp(0, 1)
"""


def test_a_package_that_only_the_driver_has_reaches_the_nodes(on_ray, tmp_path, small_run):
    """Network, objective, training attack and evaluation column."""
    (tmp_path / "package/only_here").mkdir(parents=True)
    (tmp_path / "package/only_here/__init__.py").write_text("")
    (tmp_path / "package/only_here/parts.py").write_text(textwrap.dedent(PACKAGE))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'package'}"}

    def command(module, *words):
        line = [sys.executable, "-m", f"genray.{module}", *words]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @ray.remote
    def find():
        return importlib.util.find_spec("only_here")

    assert ray.get(find.remote()) is None
    own = ["model={name: only_here.parts:make}", "base_learners.linf.objective=only_here.parts:Robust"]
    own += ["base_learners.linf.attack={algorithm: only_here.parts:Corner, norm: linf, epsilon: 0.1}"]
    own += ["evaluation.attack.step_size=0.05", "training.epochs=1"]
    for where in (["--runtime", "local", "--storage", "here"], ["--address", on_ray.address, "--storage", "there"]):
        command("train", *where, *[text for text in small_run if "attack.num_steps=2" not in text], *own)
    models = [torch.load(tmp_path / place / "digits/model.pt", weights_only=True) for place in ("here", "there")]
    states = [model["state_dict"] for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    column = ["--attacks", "only_here.parts:Corner", "--allow", "only_here", "--examples", "20"]
    table = command("evaluate", "there/digits", *column, "--address", on_ray.address, "--workers", "1")
    assert "only_here.parts:Corner" in table


def test_errors_survive_pickling():
    for error in (PlacementError("a"), LearnerError("b"), NonFiniteError("c"), ConfigError(["d", "e"])):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
