"""`python -m genray.train` as a user sees it: the plan, progress, stopping, resuming, the run folder."""

import argparse
import fcntl
import importlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import CTRL_C, ROOT, SMALL_RUN, every_write_made, tensorboard_events

import genray
from genray.__main__ import COMMANDS
from genray.__main__ import main as genray_main
from genray.cli.parser import Terminated, run_command
from genray.cli.train import parse_args as train_args
from genray.config import load_config
from genray.errors import ConfigError, DataError, RunFolderError
from genray.run.setup import prepare


@pytest.mark.slow
def test_dry_run_says_everything_and_starts_nothing(genray_command, tmp_path):
    done = genray_command("train", "--dry-run", "--storage", tmp_path, "training.epochs=16")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    for line in (
        "epochs: 16",
        "data           digits: 1237 train, 200 validation, 360 test; 1x8x8, 10 classes",
        "steps          16 epochs x 20 = 320 a learner, batches of 64",
        "linf: adversarial; linf 0.2 (0.2), 10 steps of 0.05; lr 0.1 ->",
        "windows        16, 2 redistributions (epoch_end, c = 5, t' = 10), the first after epoch 10",
        "checkpoints    every 1 epochs, 2 kept",
        "placement      a private Ray on this machine: one actor a learner",
        "\ntime           about ",
        " (natural), ",
        "\nmemory         ",
    ):
        assert line in done.stdout
    weights = 4 * sum(v.numel() for v in _digits_network().state_dict().values() if v.is_floating_point())
    assert f"2 x {weights / 2**20:.2f} MiB to the global learner at the end of 16 windows" in done.stdout


def _digits_network():
    from genray.models import build_model

    return build_model("small_cnn", num_classes=10, in_channels=1, image_size=(8, 8), batch_norm=True)


def start(tmp_path, *overrides, **kwargs):
    line = [sys.executable, "-m", "genray.train", "--runtime", "local", "--storage", str(tmp_path), *overrides]
    return subprocess.Popen(line, cwd=ROOT, text=True, **CTRL_C, **kwargs)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path, small_run):
    process = start(tmp_path, *small_run, "training.epochs=500", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    checkpoints, deadline = tmp_path / "digits" / "checkpoints", time.monotonic() + 120
    while not list(checkpoints.glob("state-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped by Ctrl-C; --resume goes on from the newest checkpoint"
    assert "Traceback" not in err
    assert list(checkpoints.glob("state-*.pt"))
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("options", [{}, {"resume": False}])
def test_only_a_command_that_can_go_on_says_so(options, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # the handlers of this process stay

    def interrupted(args):
        raise KeyboardInterrupt

    assert run_command(interrupted, argparse.Namespace(debug=False, **options)) == 130
    hint = "; --resume goes on from the newest checkpoint" if options else ""
    assert capsys.readouterr().err == f"stopped by Ctrl-C{hint}\n"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 0])
def test_a_terminal_shows_accuracy_first_and_a_bar_where_it_has_columns(tmp_path, small_run, columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = start(tmp_path, *small_run, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    process.communicate(timeout=60)
    assert process.returncode == 0
    text = shown.decode()
    (line,) = [line for line in re.split(r"[\r\n]", text) if "epoch 3/3" in line]
    assert re.search(r"epoch 3/3  theta_g validation natural [0-9.]+ %, pgd3 [0-9.]+ %  natural loss", line)
    assert ("100%" in text) == (columns > 0)
    assert ("21/21 steps" in text) == (columns > 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: (what it returned, its folder); not to be written to."""
    storage = tmp_path_factory.mktemp("finished")
    with every_write_made():
        return genray.train(None, SMALL_RUN, runtime="local", storage=str(storage)), storage / "digits"


def test_run_folder(finished):
    results, folder = finished
    stored = json.loads((folder / "results.json").read_text())
    assert set(stored["models"]) == {"global", "global_last", "natural", "linf"}
    assert stored["models"] == results["models"]
    for record in stored["models"].values():
        assert set(record) == {"natural", "pgd3"}
        for accuracy in record.values():
            assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
            assert accuracy["examples"] == 60
    assert stored["protocol"]["epsilon"] == "0.2"
    assert stored["seed"] == 0

    content = torch.load(folder / "model.pt", weights_only=True)
    assert content["metadata"]["class_names"] == [str(i) for i in range(10)]
    model = genray.load_model(folder)
    assert not model.training
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["state-000000014.pt", "state-000000021.pt"]

    (file,) = (folder / "tensorboard").iterdir()
    scalars = [value for event in tensorboard_events(file) for value in event.summary.value]
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for tag, expected in (
        ("global/natural", [e["global"]["natural"] for e in epochs]),
        ("linf/loss", [e["learners"]["linf"]["loss"] for e in epochs]),
        ("mixing_weight/linf", [e["mixing_weights"]["linf"] for e in epochs]),
    ):
        assert [v.simple_value for v in scalars if v.tag == tag] == pytest.approx(expected, rel=1e-6)


def test_model_predicts_what_the_table_says(finished):
    """The shipped model, used as a user would, has the natural accuracy of results.json."""
    (results, folder), test = finished, prepare(load_config(None, SMALL_RUN)).splits["test"]
    right = genray.load_model(folder)(test.images.float() / 255).argmax(1) == test.labels
    natural = results["models"]["global"]["natural"]["value"]
    assert right.float().mean().item() == pytest.approx(natural)


def test_resuming_a_finished_run_changes_nothing(finished):
    results, folder = finished
    before = (folder / "model.pt").read_bytes()
    again = genray.train(None, SMALL_RUN, runtime="local", storage=str(folder.parent), resume=True)
    assert again["models"] == results["models"] and (folder / "model.pt").read_bytes() == before


@pytest.mark.parametrize("stop, code", [(Terminated, 143), (KeyboardInterrupt, 130)])
def test_a_stop_inside_compiled_code_is_a_stop(stop, code, capsys):
    """CPython wraps what a signal handler raised where a compiled function returned all the same."""

    def main(args):
        raise SystemError("returned a result with an exception set") from stop()

    assert run_command(main, argparse.Namespace(resume=False)) == code
    assert "--resume goes on" in capsys.readouterr().err


def image_folder(path):
    """Two classes of plain images, told apart by their brightness."""
    from PIL import Image

    for part, number in (("train", 24), ("test", 8)):
        for label, name in enumerate(("dark", "light")):
            (path / part / name).mkdir(parents=True)
            for i in range(number):
                Image.new("L", (8, 8), 40 + 150 * label + i).save(path / part / name / f"{i:02}.png")
    return path


def folder_run(path):
    return [
        *("data.source=image_folder", f"data.path={path}", "data.validation_examples=8", "training.epochs=2"),
        *("training.batch_size=16", "model.width=4", "base_learners.linf.attack.num_steps=1", "name=a"),
    ]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_that_is_there_is_found_before_the_data(tmp_path):
    """Refusals, and the record of a finished run, need no data; a run is overwritten once the new one can start."""
    data, runs = image_folder(tmp_path / "data"), tmp_path / "runs"
    options = {"runtime": "local", "storage": runs}
    first = genray.train(None, folder_run(data), **options)
    (runs / "a" / "mine.txt").write_text("kept")
    (runs / "a" / "model.onnx").write_bytes(b"of the old model")
    before = contents(runs)
    data.rename(tmp_path / "elsewhere")

    with pytest.raises(RunFolderError, match="a run of this name exists.*--name.*--resume.*--overwrite"):
        genray.train(None, folder_run(data), **options)
    again = genray.train(None, folder_run(data), resume=True, **options)
    assert again == first
    with pytest.raises(DataError, match="data"):
        genray.train(None, folder_run(data), overwrite=True, **options)
    with pytest.raises(ConfigError, match="--overwrite: expected no --resume"):
        genray.train(None, folder_run(data), overwrite=True, resume=True, **options)
    assert contents(runs) == before

    (tmp_path / "elsewhere").rename(data)
    other = genray.train(None, [*folder_run(data), "seed=5"], overwrite=True, **options)
    after = contents(runs)
    assert (other["seed"], genray.train(None, [*folder_run(data), "seed=5"], resume=True, **options)) == (5, other)
    assert after["a/mine.txt"] == b"kept" and "a/model.onnx" not in after
    assert {name for name in before if after.get(name) == before[name]} == {"a/mine.txt", "a/data.json"}


def test_what_is_no_run_is_not_overwritten(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "config.yaml").write_text("services: {web: {image: nginx}}")
    (folder / "model.pt").write_bytes(b"precious")
    with pytest.raises(RunFolderError, match="not of a genray run; it is not overwritten"):
        genray.train(runtime="local", storage=tmp_path, overwrite=True)
    assert sorted(contents(folder)) == ["config.yaml", "model.pt"]


@pytest.mark.slow
def test_a_finished_run_shows_its_table_at_once(tmp_path, small_run, genray_command):
    """And without Ray, whose start would take its time: none of its modules is there."""
    genray.train(None, small_run, runtime="local", storage=str(tmp_path))
    code = "import sys; sys.modules['ray'] = None; from genray.cli.train import *; main(parse_args(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "--resume", "--storage", str(tmp_path), *small_run]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "base learner linf" in done.stdout and "everything is in" in done.stdout
    assert "training" not in done.stderr


def test_all_commands_have_one_name(capsys):
    from genray import __version__

    assert genray_main(["--version"]) == 0 and capsys.readouterr().out == f"genray {__version__}\n"
    assert genray_main(["--help"]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in ["train"])
    assert genray_main([]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_ends_with_an_example_that_it_takes(name, capsys):
    with pytest.raises(SystemExit) as stop:
        genray_main([name, "--help"])
    assert stop.value.code == 0
    program, command, *words = capsys.readouterr().out.rpartition("example: ")[2].split()
    assert (program, command) == ("genray", name) and importlib.import_module(COMMANDS[name][0]).parse_args(words)
    assert genray_main(["trian"]) == 2 and "(did you mean train?)" in capsys.readouterr().err
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            genray_main([name, "--help"])
        assert stop.value.code == 0 and f"usage: genray.{name}" in capsys.readouterr().out


def test_a_configuration_may_be_named_bare(capsys):
    for words in (["configs/digits.yaml"], ["--config", "configs/digits.yaml"]):
        args = train_args([*words, "training.epochs=4"])
        assert (args.config, args.overrides) == ("configs/digits.yaml", ["training.epochs=4"])
    assert genray_main(["train", "absent.yaml", "--dry-run"]) == 2
    assert "absent.yaml: cannot be read" in capsys.readouterr().err
