"""Joining a running cluster and leaving it clean."""

import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
import ray
from conftest import CTRL_C, ROOT, wait_for
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from genray.errors import ConfigError, LearnerError, NonFiniteError, PlacementError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    """A head with 2 CPUs, as `ray start --head` gives; tests look at it through their own connection."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=made.address, namespace="observer", log_to_driver=False)
    yield made.address
    ray.shutdown()
    made.shutdown()


def assert_clean():
    """Nothing of a run is left: all resources free, no placement group, no actor."""
    from ray.util.state import list_actors

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
        if free and not groups:
            break
        time.sleep(0.2)
    assert not groups
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    try:
        alive = [a for a in list_actors() if a.state not in ("DEAD",)]
    except Exception as error:  # the state API needs ray[default]'s dashboard, which this cluster runs without
        assert "dashboard" in str(error).lower() or "api server" in str(error).lower()
        alive = []
    assert alive == []


def start(address, tmp_path, *overrides):
    line = [sys.executable, "-m", "genray.train", "--address", address, "--storage", str(tmp_path), *overrides]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **CTRL_C)


def wait_for_a_checkpoint(folder, process):
    """The first one, not the first metrics: those are written before it."""
    wait_for(lambda: list(folder.glob("checkpoints/state-*.pt")), "a checkpoint", process)


def test_joins_and_leaves_clean_on_success(cluster, tmp_path, small_run):
    process = start(cluster, tmp_path, *small_run)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "theta_g, epoch" in out
    assert (tmp_path / "digits" / "results.json").exists()
    assert_clean()


def test_leaves_clean_on_failure(cluster, tmp_path, small_run):
    process = start(cluster, tmp_path, *small_run, "base_learners.linf.lr=1e30")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert re.search(r"error: base_learners.linf: loss \S+ at step \d+ \(batch \d+ of epoch 1\)", err), err
    assert "Traceback" not in err
    assert_clean()


def test_leaves_clean_when_stopped(cluster, tmp_path, small_run):
    """By Ctrl-C; by SIGTERM in test_loopback.py."""
    process = start(cluster, tmp_path, *small_run, "training.epochs=5000")
    wait_for_a_checkpoint(tmp_path / "digits", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert list((tmp_path / "digits" / "checkpoints").glob("state-*.pt"))
    assert not list((tmp_path / "digits").rglob("*.tmp-*"))
    assert_clean()


def test_wrong_address_is_one_line(genray_command, tmp_path):
    done = genray_command("train", "--address", "127.0.0.1:1", "--storage", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--address 127.0.0.1:1: no Ray cluster answers there" in done.stderr


def test_errors_survive_pickling():
    for error in (PlacementError("a"), LearnerError("b"), NonFiniteError("c"), ConfigError(["d", "e"])):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
