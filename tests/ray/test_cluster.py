"""Joining a running cluster and leaving it clean; that a run which ends or fails does so is checked by `on_ray`."""

import pickle
import subprocess
import sys

import pytest
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


def test_errors_survive_pickling():
    for error in (PlacementError("a"), LearnerError("b"), NonFiniteError("c"), ConfigError(["d", "e"])):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
