"""A grid on two nodes loses a learner, a node and its tuner: `--resume` gives the whole table, of the same runs."""

import os
import signal
import subprocess
import sys

import pytest
import ray
import yaml
from conftest import ROOT, command_of, descendants, run_outcome, wait_for
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

import genray
from genray.errors import PlacementError
from genray.reporting.trials import read_trials
from genray.tuning.checks import check_visible
from genray.tuning.grid import load_grid

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NODE = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 << 20}
# A killed raylet refuses connections, so it is noticed soon; a slow one is left alone.
FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 60_000}
SETTINGS = {
    "training.epochs": 25,
    "training.batch_size": 48,
    "data.train_examples": 300,
    "data.test_examples": 30,
    "data.validation_examples": 40,
    "model.width": 4,
    "base_learners.linf.attack.num_steps": 2,
    "base_learners.natural.resources.num_gpus": 0.5,
    "base_learners.linf.resources.num_gpus": 0.5,
    "evaluation.attack.num_steps": 2,
    "global_learner.warmup_epochs": 1,
    "runtime.startup_timeout_s": 900,
}


@pytest.fixture
def cluster():
    made = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": FAST})
    second = made.add_node(**NODE)
    ray.init(address=made.address, namespace="observer", log_to_driver=False)
    made.wait_for_nodes()
    yield made, second
    ray.shutdown()
    made.shutdown()


def learners():
    return [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(b"ray::BaseLearnerActor")]


def test_kills_change_nothing(cluster, tmp_path):
    made, second = cluster
    path, folder = tmp_path / "killed.yaml", tmp_path / "runs" / "killed"
    path.write_text(yaml.safe_dump({"set": SETTINGS, "seeds": [0, 1, 2], "max_failures": 9}))
    with pytest.raises(PlacementError, match="expected a folder that every node sees"):
        check_visible(str(tmp_path))  # it has no grid in it: as a folder of another machine looks from here
    line = [sys.executable, "-m", "genray.tune", str(path), "--storage", str(tmp_path / "runs")]
    line += ["--address", made.address]

    def start(*more):
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*line, *more], cwd=ROOT, **pipes)

    def epochs():
        return sum(len(p.read_text().splitlines()) for p in folder.glob("*/metrics.jsonl"))

    def finished():
        return {p.parent.name for p in folder.glob("*/results.json")}

    def under_way():
        return {p.parent.name for p in folder.glob("*/checkpoints")} - finished()

    tuner = start()
    try:
        os.kill(wait_for(lambda: epochs() >= 2 and learners(), "a learner", tuner, seconds=900)[0], signal.SIGKILL)
        wait_for(lambda: epochs() >= 12, "some epochs", tuner, seconds=900)
        raylet = second.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()  # as long as it is a zombie, its workers take it for alive
        wait_for(lambda: finished() and under_way(), "a trial after another", tuner, seconds=900)
    finally:
        tuner.kill()
    tuner.communicate()
    done = finished()
    assert len(done) < 3
    stamps = {p: p.stat().st_mtime_ns for name in done for p in (folder / name).rglob("*") if p.is_file()}
    made.remove_node(second, allow_graceful=False)
    made.add_node(wait=False, **NODE)
    tuner = start("--resume")
    _, err = tuner.communicate(timeout=1800)
    assert tuner.returncode == 0, err
    assert [row["status"] for row in read_trials(str(folder)).rows] == ["finished"] * 3
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}  # what was finished is not touched again
    for trial in load_grid(path).trials:
        genray.train(trial.config, runtime="local", storage=str(tmp_path / "alone"))
        assert run_outcome(folder / trial.name) == run_outcome(tmp_path / "alone" / trial.name)
    wait_for(lambda: not learners() and not groups(), "the end of the actors", seconds=300)


def groups():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
