"""Clusters as cluster/ makes them: nodes that come when they are asked for, tokens, jobs."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, wait_for
from ray.cluster_utils import Cluster

from genray.run.allocation import equal_workers

pytestmark = pytest.mark.ray


@pytest.fixture
def head(no_ray):
    """A head that runs no learners, as cluster/ starts it; nobody is connected."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_run_and_an_evaluation_wait_for_the_nodes_they_asked_for(
    head, trained_run, tmp_path, small_run, genray_command
):
    address = ["--address", head.address]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_TOKEN")}
    environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "none")
    done = genray_command("train", *address, "--storage", tmp_path / "a", timeout=300, env=environment)
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster lets us in" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert done.stderr.count("\n") == 1

    wait = ["runtime.startup_timeout_s=900"]
    train = [sys.executable, "-m", "genray.train", *address, "--storage", str(tmp_path / "b"), *small_run, *wait]
    judge = [sys.executable, "-m", "genray.evaluate", str(trained_run), *address, "--startup-timeout", "900"]
    judge += ["--attacks", "pgd20", "--examples", "40", "--block-size", "20", "--output", str(tmp_path / "out")]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(line, cwd=ROOT, **pipes) for line in (train, [*judge, "--workers", "2"])]
    try:
        for run, wanted in zip(runs, ("2 CPU wanted, 0", "1 CPU wanted for each of 2 workers, 0 CPU, 0 GPU")):
            said = run.stderr.readline()  # only once a fixed cluster of this size would have been given up
            assert said.startswith(f"waiting up to 900 s for the cluster: {wanted} in the cluster"), said
        head.add_node(num_cpus=4)
        for run in runs:
            _, err = run.communicate(timeout=900)
            assert run.returncode == 0, err
    finally:
        for run in runs:
            run.kill()
    assert (tmp_path / "b/digits/results.json").exists()
    assert json.loads((tmp_path / "out/results.json").read_text())["norms"]["linf"]["columns"]["pgd20"]


def test_workers_ask_for_gpus_that_are_not_there():
    def shares(nodes):
        return [equal_workers(nodes, number, 8, device) for number, device in ((0, "auto"), (0, "cuda"), (3, "cuda"))]

    asks = {"num_cpus": 1.0, "num_gpus": 1.0}
    assert shares([]) == [(1, {"num_cpus": 1.0, "num_gpus": 0}), (1, asks), (3, asks)]
    assert shares([{"CPU": 4.0}]) == [(4, {"num_cpus": 1.0, "num_gpus": 0}), (1, asks), (3, asks)]
    assert shares([{"CPU": 4.0, "GPU": 2.0}]) == [(2, asks), (2, asks), (3, {"num_cpus": 1.0, "num_gpus": 0.5})]


def job_command(storage, overrides):
    """The command of rayjob.yaml, on the embedded digits, with a folder for its bucket and CPUs for its GPUs."""
    words = shlex.split(yaml.safe_load((ROOT / "cluster/kuberay/rayjob.yaml").read_text())["spec"]["entrypoint"])
    at = words.index("--config")
    del words[at : at + 2]
    words[words.index("--storage") + 1] = str(storage)
    words.remove("device=cuda")
    return [*words, *overrides]


def answers(port):
    """Whether an HTTP server answers at a port of this machine, be it that it wants a token."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=30).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="jobs need ray[default], which genray itself does not")
def test_the_jobs_command_runs_as_a_job(tmp_path, small_run):
    from ray._common.network_utils import find_free_port

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: sockets lie below it
    dashboard, agent, client = (find_free_port() for _ in range(3))
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--block", "--port=0", "--num-cpus=2", f"--temp-dir={folder}"]
    start += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    start += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(start, env=environment, start_new_session=True, **quiet)
    try:
        server = f"http://127.0.0.1:{dashboard}"
        submit = [ray, "job", "submit", "--address", server, "--", *job_command(tmp_path, small_run)]
        wait_for(lambda: answers(dashboard), "the dashboard", head)
        done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
    results = json.loads((tmp_path / "digits/results.json").read_text())
    assert 0 < results["models"]["global"]["natural"]["value"] <= 1
