"""Processes of a run are killed (SIGKILL); it ends with the bits of the run in one process.

`benchmarks/chaos.py` is the long part of this: more kills, at random moments.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, actors, command_of, descendants, run_outcome, wait_for

import genray
from genray.config import load_config
from genray.data.splits import Split
from genray.errors import LearnerError, PlacementError
from genray.recording import Progress, RunFolder, RunRecorder
from genray.run.setup import prepare
from genray.runtime.ray.driver import run_on_ray

pytestmark = pytest.mark.ray
EPOCHS = 6
RUN = [*SMALL_RUN, f"training.epochs={EPOCHS}", "runtime.placement=spread"]
MIB = 2**20
IMAGES_OF_128_MIB = (8, 1, 4096, 4096)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    storage = tmp_path_factory.mktemp("undisturbed")
    genray.train(None, RUN, runtime="local", storage=str(storage))
    return storage / "digits"


@pytest.fixture
def second_node(on_ray):
    node = on_ray.add_node(num_cpus=1)
    on_ray.wait_for_nodes()
    return node


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


def kill_actors(*titles, killed, signum=signal.SIGKILL):
    """Sends a signal to one process of each title that has not had one."""

    def kill():
        found = [[pid for pid in actors(title) if pid not in killed] for title in titles]
        for pid, *_ in found if all(found) else []:
            killed.add(pid)
            os.kill(pid, signum)
        return all(found)

    return kill


def test_every_actor_and_a_node_may_die(on_ray, second_node, tmp_path, undisturbed, capsys):
    """And the images are in shared memory once: what this process has written there."""
    raylet, killed, seen = second_node.all_processes["raylet"][0].process, set(), {}
    waits_since, on_node = [], []

    def kill_node():
        waits_since.append(time.monotonic())
        on_node[:] = actors(b"ray::BaseLearner", b"ray::GlobalLearner", b"ray::Evaluator", below=raylet.pid)
        # Spread, one of the two learners is on it; but Ray promises no more than to try.
        over = bool(on_node) or waits_since[-1] - waits_since[0] > 60
        if over:
            raylet.kill()
            raylet.wait()  # as long as it is a zombie, its workers take it for alive
        return over

    kills = [
        (0, "base learner", kill_actors(b"ray::BaseLearner", killed=killed)),  # before the first checkpoint
        (2, "global learner, evaluator", kill_actors(b"ray::GlobalLearner", b"ray::Evaluator", killed=killed)),
        (4, "node", kill_node),
    ]
    setup = prepare(load_config(None, RUN))
    images = torch.zeros(IMAGES_OF_128_MIB, dtype=torch.uint8)
    setup.splits["as large as a data set"] = Split(images, torch.zeros(len(images), dtype=torch.int64))
    before = _written_to_shared_memory()

    def on_epoch(record):
        seen[record["epoch"]] = _written_to_shared_memory() - before
        due = sum(epoch < record["epoch"] for epoch, _, _ in kills)
        wait_for(lambda: len(killer.done) >= due or killer.problem, "the kill")

    killer = Killer(tmp_path / "digits", kills)
    killer.start()
    run_on_ray(RunRecorder(setup, RunFolder(str(tmp_path), "digits"), Progress(), None, on_epoch), Progress())
    killer.join(10)
    assert killer.problem is None
    assert killer.done == [name for _, name, _ in kills]
    err = capsys.readouterr().err
    assert err.count("going on from step") == 2 + bool(on_node)
    assert re.search("global learner: |evaluator: ", err) and "base_learners." in err
    assert run_outcome(tmp_path / "digits") == run_outcome(undisturbed)
    assert epochs_in(tmp_path / "digits") == EPOCHS
    assert seen[1] > images.nbytes
    assert seen[EPOCHS] < 1.9 * images.nbytes, {epoch: f"{size / MIB:.0f} MiB" for epoch, size in seen.items()}


def _written_to_shared_memory() -> int:
    """Bytes of shared memory that this process has mapped and touched."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssShmem:\s+(\d+) kB", status)[1]) * 1024


def test_one_that_crashes_twice_after_the_same_state_is_not_tried_again(on_ray, tmp_path, capsys):
    """Its own signal handler reports the signal, as it does for one that the process raised."""
    killed = set()
    kill = kill_actors(b"ray::Evaluator", killed=killed, signum=signal.SIGSEGV)
    killer = Killer(tmp_path / "digits", [(0, 1, kill), (0, 2, kill)])
    killer.start()
    overrides = [*SMALL_RUN, "training.epochs=5000", "checkpoint.every_epochs=5000", "runtime.max_failures=5"]
    with pytest.raises(LearnerError, match=r"evaluator: its process died: SIGSEGV: .*second time after step 0"):
        genray.train(None, overrides, storage=str(tmp_path))
    assert killer.done == [1, 2] and len(killed) == 2
    first = [line for line in capsys.readouterr().err.splitlines() if "going on from step 0" in line]
    assert len(first) == 1
    assert re.search(r"evaluator: its process died: SIGSEGV: .*Fatal Python error: Segmentation fault", first[0])


def test_a_bundle_that_no_node_holds(on_ray, second_node, tmp_path):
    """Five CPUs are free, but on two nodes: a learner that wants all of them cannot be placed."""
    overrides = [*RUN, "base_learners.linf.resources.num_cpus=4.9", "base_learners.natural.resources.num_cpus=0.01"]
    with pytest.raises(PlacementError, match="the cluster cannot hold this run"):
        genray.train(None, [*overrides, "runtime.startup_timeout_s=6"], storage=str(tmp_path))
    assert not list(tmp_path.iterdir())


# --- the driver of a private Ray --------------------------------------------------------------------------------------

LISTEN = "0A"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def sockets_of(pids):
    """Inodes of the sockets that processes hold."""
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def listening(pids):
    """Hexadecimal local addresses on which processes listen."""
    inodes, found = sockets_of(pids), set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == LISTEN and columns[9] in inodes:
                found.add(columns[1].split(":")[0])
    return found


def largest_difference(first, second, names=("model.pt", "model_last.pt", "learners/natural.pt", "learners/linf.pt")):
    """Of any weight of two runs' models."""

    def weights(folder, name):
        return torch.load(folder / name, weights_only=True)["state_dict"]

    pairs = [(weights(first, name), weights(second, name)) for name in names]
    return max(float((a[key].double() - b[key].double()).abs().max()) for a, b in pairs for key in a)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
def test_a_killed_driver_leaves_no_process_and_its_run_is_resumed(tmp_path, undisturbed):
    """Until then its private Ray listens on loopback and nowhere else; it goes on here, but for rounding the same."""
    run = [*RUN, "runtime.share_attack=true"]  # so that actors listen to each other
    line = [sys.executable, "-m", "genray.train", "--storage", str(tmp_path), *run]
    # How long Ray's processes look for the one that is gone: a minute by default.
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, **pipes)
    wait_for(lambda: list(tmp_path.glob("digits/checkpoints/*.pt")), "a checkpoint", process)
    started = descendants(process.pid)
    process.send_signal(signal.SIGSTOP)  # the run does not end while its sockets are read
    addresses = listening(started)
    process.kill()
    process.communicate()
    assert len(started) > 5 and addresses and addresses <= LOOPBACK
    assert not (tmp_path / "digits/results.json").exists()
    genray.train(None, run, runtime="local", storage=str(tmp_path), resume=True)
    assert largest_difference(tmp_path / "digits", undisturbed) < 1e-5
    assert epochs_in(tmp_path / "digits") == EPOCHS
    wait_for(lambda: not any(map(command_of, started)), "the end of all processes")
