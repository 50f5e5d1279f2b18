"""Evaluation on Ray actors and through kill -9: always the same record."""

import os
import re
import signal
import subprocess
import sys

import pytest
import ray
from conftest import ROOT, actors, wait_for
from ray.util import placement_group, remove_placement_group

import genray
from genray.cli.evaluate import main, parse_args
from genray.cli.parser import run_command
from genray.errors import GenrayError
from genray.runtime.ray import evaluation as evaluation_run

pytestmark = pytest.mark.ray

FILES = ("results.json", "results.parquet")
OPTIONS = {"attacks": "pgd20,mim", "norms": "linf,l2", "epsilon": {"linf": 0.1, "l2": 0.5}, "block_size": 15}


def written(folder):
    return [(folder / name).read_bytes() for name in FILES]


def evaluate(model, digits, folder, **options):
    genray.evaluate(model, *digits, **OPTIONS | options, output=str(folder))
    return written(folder)


@pytest.fixture(scope="module")
def local(model, digits, tmp_path_factory):
    """What is written without Ray."""
    return evaluate(model, digits, tmp_path_factory.mktemp("local") / "out")


def test_the_cascade_gives_the_same_bytes_too(model, digits, tmp_path, on_ray):
    """Its later members' blocks exist only once the members before are done, whoever did them."""
    images, labels = (part[:10] for part in digits)
    options = {"attacks": "aa", "norms": "linf", "epsilon": 0.2, "block_size": 2, "engine": "genray"}
    local = evaluate(model, (images, labels), tmp_path / "local", **options)
    assert evaluate(model, (images, labels), tmp_path / "two", workers=2, **options) == local
    blocks = {path.name: path.read_bytes() for path in (tmp_path / "two" / "blocks").iterdir()}
    assert {"linf-aa_apgd_ce-000004.json", "linf-aa_square-000000.json"} <= set(blocks)
    assert "linf-aa_square-000004.json" not in blocks  # packed into fewer
    for name in ("linf-aa_apgd_t-000000.json", "linf-aa_square-000000.json", "linf-aa_apgd_ce-000004.json"):
        (tmp_path / "two" / "blocks" / name).unlink()
    assert evaluate(model, (images, labels), tmp_path / "two", resume=True, **options) == local


def test_curves_images_and_other_networks_are_the_same_too(trained_run, model, digits, tmp_path, on_ray):
    """The networks of a transfer column travel to the workers, the images that fell travel back."""
    images, labels = (part[:20] for part in digits)
    options = {"attacks": "pgd20,transfer", "norms": "linf", "epsilon": [0.05, 0.2], "block_size": 5}
    options |= {"transfer": trained_run, "save_images": True}
    local = evaluate(model, (images, labels), tmp_path / "local", **options)
    assert evaluate(model, (images, labels), tmp_path / "two", workers=2, **options) == local
    parts = sorted(path.name for path in (tmp_path / "local/images").iterdir())
    assert parts[0] == "linf_0.05-pgd20-000000.parquet" and len(parts) > 8
    for name in parts:
        assert (tmp_path / "two/images" / name).read_bytes() == (tmp_path / "local/images" / name).read_bytes()


def test_mixtures_with_workers_give_the_same_bytes(trained_run, tmp_path, on_ray):
    line = [str(trained_run), "--mixtures", "0.3", "--attacks", "pgd20", "--examples", "30", "--block-size", "15"]
    for name, extra in (("local", []), ("worker", ["--workers", "1"])):
        argv = [*line, "--split", "test", "--output", str(tmp_path / name), *extra]
        assert run_command(main, parse_args(argv)) == 0
    for name in ("results.json", "curve_test.csv", "test/natural=0.7,linf=0.3/results.parquet"):
        assert (tmp_path / "worker" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


# Lambdas travel to a worker whole; functions of this module would be looked for there.
FAULTS = {
    "linf-mim-000003": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "none-natural-000000": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def test_workers_that_are_lost_give_their_blocks_back(model, digits, local, tmp_path, on_ray, monkeypatch, capfd):
    """One is killed, one stops: two workers write the bytes of one process all the same."""
    faults = FAULTS

    class Faulty(evaluation_run.EvaluationWorker):
        def run(self, task, request):
            before = tmp_path / task.key
            if task.key in faults and not before.exists():
                before.touch()
                faults[task.key]()
            return super().run(task, request)

    monkeypatch.setattr(evaluation_run, "EvaluationWorker", Faulty)
    limits = {"stall_timeout_s": 4, "max_failures": 20, "startup_timeout_s": 900}  # on a busy machine
    assert evaluate(model, digits, tmp_path / "two", workers=2, **limits) == local
    assert next(model.parameters()).device.type == "cpu"
    said = capfd.readouterr().err
    for task, why in {
        r"mim \(linf\) on block 3": "its process died",
        r"natural \(none\) on block 0": r"has computed nothing within stall_timeout_s \(4 s\)",
    }.items():
        assert re.search(rf"evaluation worker [12] of 2, {task}: {why}.*; another one is started \(loss", said)


def test_a_block_that_always_ends_its_worker_ends_the_evaluation(model, digits, local, tmp_path, on_ray, monkeypatch):
    fault = FAULTS["linf-mim-000003"]

    class Dying(evaluation_run.EvaluationWorker):
        def run(self, task, request):
            if task.key == "linf-mim-000003":
                fault()
            return super().run(task, request)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_run, "EvaluationWorker", Dying)
        says = r"^evaluation: mim \(linf\) on block 3 lost its worker 2 times \(max_failures: 1\); the last was "
        with pytest.raises(GenrayError, match=says + r"evaluation worker [12] of 2, mim.*; --resume keeps") as caught:
            evaluate(model, digits, tmp_path / "dying", workers=2, max_failures=1, startup_timeout_s=900)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert not (tmp_path / "dying" / "results.json").exists()
    assert len(list((tmp_path / "dying" / "blocks").iterdir())) == 8 * 5 - 1  # all others
    assert evaluate(model, digits, tmp_path / "dying", resume=True) == local


def test_workers_that_die_before_they_do_anything_end_the_evaluation(model, digits, tmp_path, on_ray, monkeypatch):
    fault = FAULTS["linf-mim-000003"]

    class Dead(evaluation_run.EvaluationWorker):
        def __init__(self, *others):
            fault()

    monkeypatch.setattr(evaluation_run, "EvaluationWorker", Dead)
    says = r"^evaluation: every worker was lost 2 times in a row \(max_failures: 1\); the last was evaluation worker "
    with pytest.raises(GenrayError, match=says):
        evaluate(model, digits, tmp_path / "dead", workers=1, max_failures=1, startup_timeout_s=900)


def test_a_worker_that_fails_is_named(model, digits, tmp_path, on_ray, monkeypatch):
    class Failing(evaluation_run.EvaluationWorker):
        def run(self, task, request):
            raise ZeroDivisionError("some\nlines")

    monkeypatch.setattr(evaluation_run, "EvaluationWorker", Failing)
    says = r"^evaluation worker 1 of 1, natural \(none\) on block 0: ZeroDivisionError: some lines; --resume keeps"
    with pytest.raises(GenrayError, match=says):
        evaluate(model, digits, tmp_path / "failing", workers=1)
    assert not (tmp_path / "failing").exists()


def test_nothing_is_started_where_everything_is_finished(model, digits, local, tmp_path, no_ray, monkeypatch):
    assert evaluate(model, digits, tmp_path / "done") == local
    monkeypatch.setattr(ray, "init", None)
    assert evaluate(model, digits, tmp_path / "done", workers=2, resume=True) == local


# --- kill -9 -------------------------------------------------------------------------------------------------------

# One process imports everything once and is the command again and again in children that it kills.
KILLER = """
import os, random, signal, sys, time
import torch, pyautoattack
from genray.cli.parser import run_command
from genray.cli.evaluate import main, parse_args
import genray.evaluation.sources, genray.evaluation.record, genray.recording.evaluation_folder, sklearn.datasets
import genray.evaluation.inputs, genray.recording.progress, genray.recording.run_folder, genray.evaluation.checks

def start(*argv):
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        os._exit(run_command(main, parse_args([*line, *argv])))
    return child

def finish(*argv):
    status = os.waitpid(start(*argv), 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0

line, whole, killed = sys.argv[3:], sys.argv[1], sys.argv[2]
blocks = os.path.join(killed, "blocks")

def finished():
    return sum(name.endswith(".json") for name in os.listdir(blocks)) if os.path.isdir(blocks) else 0

finish("--output", whole)
moments, killings = random.Random(3), 0
for _ in range(4):
    enough, deadline = finished() + moments.randint(0, 7), time.time() + 30
    child = start("--output", killed, "--resume")
    while finished() < enough and time.time() < deadline:
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    killings += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(finished(), flush=True)
finish("--output", killed, "--resume")
print("killed", killings)
"""


@pytest.fixture
def line(trained_run):
    return [str(trained_run), "--attacks", "pgd20,mim", "--epsilon", "0.1", "--block-size", "5"]


def test_kills_at_random_moments_change_nothing(tmp_path, line):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, whole, killed, *line], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    *blocks, last = done.stdout.splitlines()
    blocks = [int(count) for count in blocks]
    assert last == "killed 4"
    assert blocks == sorted(blocks) and len(set(blocks)) > 2 and blocks[-1] < 3 * 24, "kills must meet work"
    assert written(killed) == written(whole)


def workers():
    return actors(b"ray::EvaluationWorker")


@pytest.fixture
def full_head(on_ray):
    """Half of the head's CPUs are taken, so that three workers need another node, too."""
    group = placement_group([{"CPU": 2, "node:__internal_head__": 0.001}])
    ray.get(group.ready(), timeout=60)
    yield on_ray
    remove_placement_group(group)


@pytest.mark.slow
def test_a_worker_a_node_and_the_driver_are_killed(trained_run, tmp_path, full_head):
    """...and `--resume` gives the undisturbed record."""
    whole, killed, said = tmp_path / "whole", tmp_path / "killed", tmp_path / "said.txt"
    line = f"{trained_run} --attacks pgd20,mim,cw --epsilon 0.1 --examples 120 --block-size 2".split()
    assert run_command(main, parse_args([*line, "--output", str(whole)])) == 0
    second = full_head.add_node(num_cpus=2)
    full_head.wait_for_nodes()
    line += ["--output", str(killed)]
    on_ray = [sys.executable, "-m", "genray.evaluate", *line, "--address", full_head.address, "--workers", "3"]
    raylet = second.all_processes["raylet"][0].process

    def done():
        return len(list(killed.glob("blocks/*.json")))

    with open(said, "w") as log:
        first = subprocess.Popen([*on_ray, "--startup-timeout", "900"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
    try:
        wait_for(lambda: done() >= 4, "some blocks", first)
        wait_for(lambda: actors(b"ray::EvaluationWorker", below=raylet.pid), "a worker on the second node", first)
        os.kill(workers()[0], signal.SIGKILL)
        wait_for(lambda: "another one is started" in said.read_text(), "word of the loss", first)
        raylet.kill()
        raylet.wait()  # as long as it is a zombie, its workers take it for alive
        before = done()
        wait_for(lambda: done() > before + 5, "the blocks of the node that is left", first)
    finally:
        first.kill()
        first.wait()
    assert "its process died" in said.read_text() and not (killed / "results.json").exists()
    assert run_command(main, parse_args([*line, "--resume"])) == 0
    assert written(killed) == written(whole)
    assert not list(killed.rglob("*.tmp-*"))
