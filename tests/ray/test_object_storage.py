"""A run's whole life on a real S3-compatible server on loopback: everything is as on a local folder."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, SMALL_RUN, run_outcome, wait_for
from pyarrow.fs import copy_files

import genray
from genray.cli import evaluate, export, report, train, tune
from genray.cli.parser import run_command
from genray.reporting.trials import read_trials
from genray.storage import Storage
from genray.tuning.grid import load_grid

moto_server = pytest.importorskip("moto.server")
pytestmark = pytest.mark.ray
EPOCHS = 8
RUN = [*SMALL_RUN, f"training.epochs={EPOCHS}", "name=mine", "runtime.startup_timeout_s=900"]
EVALUATION = ["--attacks", "pgd20,mim", "--epsilon", "0.1", "--examples", "40", "--block-size", "10"]
GRID = {
    "name": "rates",
    "runtime": "local",  # a trial in one process: what is tested is where its files go
    "set": {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in SMALL_RUN)}
    | {"training.epochs": 2, "global_learner.warmup_epochs": 1, "runtime.startup_timeout_s": 900},
    "grid": {"base_learners.linf.lr": [0.05]},
    "evaluate": {"attacks": ["pgd20"], "examples": 20},
}


@pytest.fixture(scope="module")
def uri():
    """What `--storage` is given: a prefix in a bucket of a server that takes any credentials."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override={host}:{port}&scheme=http"
    Storage(f"s3://bucket?{options}&allow_bucket_creation=true").filesystem.create_dir("bucket")
    yield f"s3://bucket/some/runs?{options}"
    server.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same run, evaluation and grid on a local folder."""
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def run(uri, local):
    """A run on S3 that was killed (SIGKILL) on its way and resumed; its like is in `local`."""
    genray.train(None, RUN, runtime="local", storage=local)
    place = Storage(uri) / "mine"
    line = [sys.executable, "-m", "genray.train", *RUN, "--runtime", "local", "--storage", uri]
    for _ in range(5):  # on a busy machine the run may end before it is killed
        killed = subprocess.Popen(
            [*line, "--overwrite"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for(lambda: len(place.names("checkpoints")), "a checkpoint", killed)
        killed.send_signal(signal.SIGKILL)
        assert "Traceback" not in killed.communicate()[0]
        if not place.exists("results.json"):
            break
    assert not place.exists("results.json")
    genray.train(None, RUN, runtime="local", storage=uri, resume=True)
    return place


def copied(place, folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(place.read(name))
    return folder


def done(module, *argv):
    assert run_command(module.main, module.parse_args([str(part) for part in argv])) == 0


def test_a_run_that_was_killed_and_resumed(run, local, tmp_path):
    names = ("metrics.jsonl", "model.pt", "model_last.pt", "results.json")
    assert run_outcome(copied(run, tmp_path, *names)) == run_outcome(local / "mine")


def test_load_model(run, local):
    ours, theirs = genray.load_model(run.uri).state_dict(), genray.load_model(local / "mine").state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_evaluation_on_two_workers_with_its_output_on_s3(on_ray, run, uri, local, capsys):
    done(evaluate, local / "mine", *EVALUATION, "--output", local / "evaluated")
    at = Storage(uri) / "evaluated"
    done(evaluate, run.uri, *EVALUATION, "--workers", 2, "--output", at.uri)
    assert capsys.readouterr().out.splitlines()[-1] == f"everything is in {at}"
    for name in ("results.json", "results.parquet", "request.json"):
        assert at.read(name) == (local / "evaluated" / name).read_bytes()
    at.delete("results.json")
    at.delete("blocks/linf-mim-000002.json")
    done(evaluate, (run / "model.pt").uri, "--data", "digits", *EVALUATION, "--output", at.uri, "--resume")
    assert (
        json.loads(at.read("results.json"))["norms"]
        == json.loads((local / "evaluated/results.json").read_text())["norms"]
    )


def test_mixtures_beside_the_run(run, local):
    line = ["--mixtures", "0.3", "--split", "test", *EVALUATION]
    for place in (str(local / "mine"), run.uri):
        done(evaluate, place, *line)
        done(evaluate, place, "--save-mixture", "0.3")
    for name in ("results.json", "curve_test.csv"):
        assert (run / "mixtures").read(name) == (local / "mine" / "mixtures" / name).read_bytes()
    saved = "mixtures/natural=0.7,linf=0.3.pt"
    ours, theirs = genray.load_model(run / saved).state_dict(), genray.load_model(local / "mine" / saved).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_grid_with_judging_and_its_resume(on_ray, uri, local, tmp_path, capsys):
    file, grid = tmp_path / "rates.yaml", Storage(uri) / "rates"
    file.write_text(yaml.safe_dump(GRID))
    done(tune, file, "--storage", uri)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"everything is in {grid}")
    ours = genray.tune(file, storage=uri, resume=True)
    copy_files(grid.root, str(local / "rates"), source_filesystem=grid.filesystem)
    theirs = read_trials(str(local / "rates"))
    assert ours.rows == theirs.rows and ours.measures == theirs.measures == ("natural", "pgd20")
    (trial,) = load_grid(file).trials
    genray.train(trial.config, runtime="local", storage=tmp_path)
    assert run_outcome(local / "rates" / trial.name) == run_outcome(tmp_path / trial.name)


def test_report_of_all_of_it(run, uri, local):
    """After the tests above, whose files it shows."""
    made = {}
    for place in (str(local), uri):
        output = Storage(place) / "report"
        done(report, place, "--output", output.absolute, "--format", "html,csv", "--gallery-images", 20)
        made[place] = {name: output.read(name) for name in json.loads(output.read("report.json"))["files"]}
    ours, theirs = made[uri], made[str(local)]
    assert set(ours) == set(theirs) and b"allery" in ours["index.html"]
    tables = [name for name in ours if name.startswith("tables/") and "time" not in name]
    assert len(tables) > 3 and all(ours[name] == theirs[name] for name in tables)


def test_export(run, local):
    for place in (local / "mine", run.uri):
        done(export, place, "--layout", "onnx")
    assert run.read("model.onnx") == (local / "mine" / "model.onnx").read_bytes()


# --- what is wrong --------------------------------------------------------------------------------------------------


def silent():
    """A port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("which", ["no server", "no bucket", "no run", "no such option", "no such scheme"])
def test_one_line_and_exit_2(uri, which, capsys, tmp_path):
    """...wherever it is given, and nobody reads the credentials in it."""
    options = uri.partition("?")[2]
    place, words = {
        "no server": (
            f"s3://me:hush@bucket/runs?endpoint_override=127.0.0.1:{silent()}&scheme=http",
            "cannot be reached",
        ),
        "no bucket": (f"s3://me:hush@absent/runs?{options}", ""),
        "no run": (f"s3://me:hush@bucket/absent?{options}", "there is nothing|no such file"),
        "no such option": (f"s3://me:hush@bucket/runs?{options}&colour=red", "colour"),
        "no such scheme": ("s4://me:hush@bucket/runs", "s4"),
    }[which]
    grid = tmp_path / "rates.yaml"
    grid.write_text(yaml.safe_dump(GRID))
    lines = [
        (evaluate, [place, *EVALUATION]),
        (export, [place, "--layout", "onnx"]),
        (report, [place, "--output", str(tmp_path / "report")]),
    ]
    if which != "no run":
        lines += [(train, ["--storage", place, *RUN]), (tune, [str(grid), "--storage", place])]
    for module, argv in lines:
        assert run_command(module.main, module.parse_args(argv)) == 2, (module, argv)
        said = capsys.readouterr().err.splitlines()
        assert (
            len(said) == 1 and said[0].startswith("error: ") and re.search(words, said[0]) and "hush" not in said[0]
        ), said
    assert os.listdir(tmp_path) == ["rates.yaml"]
