"""Processes that crash say why, are not restarted in vain, and leave one copy of the data in the object store."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import ray
import torch
from conftest import SMALL_RUN, command_of, descendants
from test_kills import Killer

import genray
from genray.config import load_config
from genray.data.splits import Split
from genray.errors import LearnerError
from genray.recording import Progress, RunFolder, RunRecorder
from genray.run.setup import prepare
from genray.runtime.ray.driver import run_on_ray

pytestmark = pytest.mark.ray
MIB = 2**20
IMAGES_OF_128_MIB = (8, 1, 4096, 4096)


@pytest.fixture(scope="module")
def own_ray():
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, namespace="genray")
    yield
    ray.shutdown()


def crash(title, signum, killed):
    """Sends a signal to an actor's process, to each process once."""

    def kill():
        found = [p for p in descendants(os.getpid()) if command_of(p).startswith(title) and p not in killed]
        for pid in found:
            killed.add(pid)
            os.kill(pid, signum)
        return found

    return kill


def test_one_that_crashes_twice_after_the_same_state_is_not_tried_again(own_ray, tmp_path, capsys):
    """Its own signal handler reports the signal, as it does for one that the process raised."""
    killed = set()
    killer = Killer(tmp_path / "digits", [(0, n, crash(b"ray::Evaluator", signal.SIGSEGV, killed)) for n in (1, 2)])
    killer.start()
    overrides = [*SMALL_RUN, "training.epochs=5000", "checkpoint.every_epochs=5000", "runtime.max_failures=5"]
    with pytest.raises(LearnerError, match=r"evaluator: its process died: SIGSEGV: .*second time after step 0"):
        genray.train(None, overrides, storage=str(tmp_path))
    assert killer.done == [1, 2] and len(killed) == 2
    first = [line for line in capsys.readouterr().err.splitlines() if "going on from step 0" in line]
    assert len(first) == 1
    assert re.search(r"evaluator: its process died: SIGSEGV: .*Fatal Python error: Segmentation fault", first[0])


def test_the_data_are_in_the_object_store_once_after_a_recovery(own_ray, tmp_path):
    """What this process wrote into shared memory: the images, once."""
    setup = prepare(load_config(None, [*SMALL_RUN, "training.epochs=8"]))
    images = torch.zeros(IMAGES_OF_128_MIB, dtype=torch.uint8)
    setup.splits["as large as a data set"] = Split(images, torch.zeros(len(images), dtype=torch.int64))
    before, killed, seen = _written_to_shared_memory(), set(), {}
    kills = [(2, "a learner", crash(b"ray::BaseLearner", signal.SIGKILL, killed))]
    kills += [(5, "the global learner", crash(b"ray::GlobalLearner", signal.SIGKILL, killed))]
    killer = Killer(tmp_path / "digits", kills)
    killer.start()

    def on_epoch(record):
        seen[record["epoch"]] = _written_to_shared_memory() - before
        if record["epoch"] in (2, 5):  # the kill comes before the run is over
            time.sleep(3)

    recorder = RunRecorder(setup, RunFolder(str(tmp_path), "digits"), Progress(), None, on_epoch)
    run_on_ray(recorder, Progress())
    assert killer.done == ["a learner", "the global learner"]
    assert seen[1] > images.nbytes
    assert seen[8] < 1.9 * images.nbytes, {epoch: f"{size / MIB:.0f} MiB" for epoch, size in seen.items()}


def _written_to_shared_memory() -> int:
    """Bytes of shared memory that this process has mapped and touched."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssShmem:\s+(\d+) kB", status)[1]) * 1024
