"""An evaluation on two nodes loses a worker, a node and its driver: `--resume` gives the undisturbed record."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, command_of, descendants, wait_for
from ray.cluster_utils import Cluster
from test_tune_kills import FAST

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}


def workers():
    return [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(b"ray::EvaluationWorker")]


def test_kills_change_nothing(trained_run, tmp_path):
    whole, killed, said = tmp_path / "whole", tmp_path / "killed", tmp_path / "said.txt"
    line = f"-m genray.evaluate {trained_run} --attacks pgd20,mim,cw --epsilon 0.1"
    line = [sys.executable, *line.split(), "--examples", "60", "--block-size", "3"]
    subprocess.run([*line, "--output", whole], cwd=ROOT, check=True, capture_output=True)
    made = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": FAST})
    try:
        second = made.add_node(**NODE)
        made.wait_for_nodes()
        line += ["--output", str(killed), "--address", made.address, "--workers", "3"]
        line += ["--startup-timeout", "900"]

        def done(number):
            return lambda: len(list(killed.glob("blocks/*.json"))) >= number

        with open(said, "w") as log:
            first = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
        try:
            wait_for(done(4), "some blocks", first)
            os.kill(wait_for(workers, "a worker", first)[0], signal.SIGKILL)
            wait_for(done(14), "more blocks", first)
            raylet = second.all_processes["raylet"][0].process
            raylet.kill()
            raylet.wait()  # as long as it is a zombie, its workers take it for alive
            wait_for(done(40), "the blocks of the node that is left", first)
        finally:
            first.kill()
            first.wait()
        assert "its process died" in said.read_text() and "another one is started" in said.read_text()
        made.remove_node(second, allow_graceful=False)
        made.add_node(wait=False, **NODE)
        again = subprocess.run([*line, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert again.returncode == 0, again.stderr
        wait_for(lambda: not workers(), "the end of the workers", seconds=300)
    finally:
        made.shutdown()
    for name in ("results.json", "results.parquet"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not list(killed.rglob("*.tmp-*"))
