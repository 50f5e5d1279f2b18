"""Processes of a run are killed (SIGKILL); it ends with the bits of the run in one process.

`benchmarks/chaos.py` is the long part of this: more kills, at random moments.
"""

import os
import signal
import subprocess
import sys
import threading

import pytest
import ray
from conftest import ROOT, SMALL_RUN, command_of, descendants, run_outcome, wait_for
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

import genray
from genray.errors import LearnerError

pytestmark = pytest.mark.ray
EPOCHS = 9
RUN = [*SMALL_RUN, f"training.epochs={EPOCHS}", "runtime.placement=spread"]
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,  # a slow machine is not a dead node
    "health_check_failure_threshold": 5,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    storage = tmp_path_factory.mktemp("undisturbed")
    genray.train(None, RUN, runtime="local", storage=str(storage))
    return run_outcome(storage / "digits")


@pytest.fixture(scope="module")
def two_nodes():
    head = {"num_cpus": 3, "_system_config": QUICK_TO_NOTICE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, namespace="genray")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def ours(title):
    """Actor processes below this one, by the beginning of their command line."""
    return sorted(pid for pid in descendants(os.getpid()) if command_of(pid).startswith(title))


def epochs_in(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


class Killer(threading.Thread):
    """Kills after given numbers of finished epochs, while the run goes on in the main thread."""

    def __init__(self, folder, kills):
        super().__init__(daemon=True)
        self.folder, self.kills, self.done, self.problem = folder, kills, [], None

    def run(self):
        try:
            for epochs, name, kill in self.kills:
                wait_for(lambda n=epochs: epochs_in(self.folder) >= n, f"epoch {epochs}")
                wait_for(kill, f"a {name} to kill")
                self.done.append(name)
        except BaseException as error:
            self.problem = error


def kill_actor(title, killed=set()):  # noqa: B006 (the same set for all: nobody is killed twice)
    def kill():
        found = [pid for pid in ours(title) if pid not in killed]
        for pid in found[:1]:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return bool(found)

    return kill


def test_every_actor_and_a_node_may_die(two_nodes, tmp_path, undisturbed, capsys):
    def kill_node():
        os.kill(two_nodes.second.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        return True

    kills = [
        (0, "base learner", kill_actor(b"ray::BaseLearner")),  # before the first checkpoint
        (2, "global learner", kill_actor(b"ray::GlobalLearner")),
        (4, "evaluator", kill_actor(b"ray::Evaluator")),
        (6, "node", kill_node),
    ]
    killer = Killer(tmp_path / "digits", kills)
    killer.start()
    genray.train(None, RUN, storage=str(tmp_path))
    killer.join(10)
    assert killer.problem is None
    assert killer.done == [name for _, name, _ in kills]
    err = capsys.readouterr().err
    assert err.count("going on from step") >= 3
    assert "global learner: " in err and "evaluator: " in err and "base_learners." in err
    assert run_outcome(tmp_path / "digits") == undisturbed
    assert [record["epoch"] for record in undisturbed[0]] == list(range(1, EPOCHS + 1))
    wait_for(lambda: all(g["state"] == "REMOVED" for g in placement_group_table().values()), "end of all groups")
    wait_for(lambda: not ours(b"ray::BaseLearner"), "end of all learners, those of the dead node too")


def test_too_many_deaths_end_the_run_with_who_and_why(two_nodes, tmp_path):
    """Each as soon as it has started, so that no checkpoint comes between."""
    kills = [(0, f"evaluator {n}", kill_actor(b"ray::Evaluator")) for n in range(2)]
    killer = Killer(tmp_path / "digits", kills)
    killer.start()
    overrides = [*RUN, "training.epochs=5000", "checkpoint.every_epochs=5000", "runtime.max_failures=1"]
    with pytest.raises(LearnerError, match=r"any checkpoint: evaluator 2 times \(runtime.max_failures: 1\).*died"):
        genray.train(None, overrides, storage=str(tmp_path))
    assert killer.done == ["evaluator 0", "evaluator 1"]


def test_killed_driver_resumes_and_leaves_no_process(tmp_path, undisturbed):
    line = [sys.executable, "-m", "genray.train", "--storage", str(tmp_path), *RUN]
    # How long Ray's processes look for the one that is gone: a minute by default.
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, **pipes)
    wait_for(lambda: list(tmp_path.glob("digits/checkpoints/*.pt")), "a checkpoint", process)
    started = descendants(process.pid)
    assert len(started) > 5
    process.kill()
    process.communicate()
    done = subprocess.run([*line, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert run_outcome(tmp_path / "digits") == undisturbed
    wait_for(lambda: not any(map(command_of, started)), "the end of all processes")
