"""Whatever is wrong with the input: exit code 2, one line that names the culprit, nothing left behind."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from genray.cli.parser import run_command
from genray.cli.train import main, parse_args
from genray.config import DEFAULT_CONFIG

L = "base_learners.linf"


def run(*argv):
    """Exit code of `python -m genray.train argv`."""
    try:
        return run_command(main, parse_args([str(arg) for arg in argv]))
    except SystemExit as stop:  # argparse
        return stop.code


def check(capsys, tmp_path, says, *argv, storage=None, lines=1):
    before = sorted(tmp_path.rglob("*"))
    assert run("--runtime", "local", "--storage", storage or tmp_path / "runs", *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == lines
    assert err.startswith(("error: ", "genray.train: error: "))
    assert says in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config", "no_such_file.yaml"], "no_such_file.yaml: cannot be read: No such file"),
        (["--config", "/"], "/: cannot be read"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--runtime", "spark"], "argument --runtime: invalid choice: 'spark'"),
        (["--address", "auto"], "--address is for --runtime ray"),
        (["--name", "x" * 101], "name: expected text of letters"),
    ],
)
def test_flags(capsys, tmp_path, argv, says):
    check(capsys, tmp_path, says, *argv)


@pytest.mark.parametrize(
    "address", ["nonsense", "host:port", "ray://127.0.0.1:10001", "127.0.0.1:1", "127.0.0.1:99999"]
)
def test_addresses(capsys, tmp_path, address):
    assert run("--storage", tmp_path, "--address", address) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--address: expected auto or HOST:PORT, got {address}" in err or f"--address {address}: no Ray clus" in err
    assert not list(tmp_path.iterdir())


# --- storage and run folders ---------------------------------------------------------------------------------------


def test_storage_scheme(capsys, tmp_path):
    check(capsys, tmp_path, "storage 'gopher://x'", storage="gopher://x")


def test_storage_below_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    check(capsys, tmp_path, "file is not a folder", storage=tmp_path / "file" / "runs")


def make_run(tmp_path, small_run):
    assert run("--runtime", "local", "--storage", tmp_path / "runs", *small_run, "training.epochs=1") == 0
    return tmp_path / "runs" / "digits"


def test_run_folders(capsys, tmp_path, small_run):
    folder = make_run(tmp_path, small_run)
    capsys.readouterr()
    same = [*small_run, "training.epochs=1"]
    check(capsys, tmp_path, "a run of this name exists; choose another with --name", *same)
    check(capsys, tmp_path, "another configuration: seed was 0, is 5", "--resume", *same, "seed=5")

    (folder / "results.json").unlink()  # a finished run needs no checkpoint
    state = next((folder / "checkpoints").iterdir())
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    check(capsys, tmp_path, f"{state.name}: not a readable checkpoint: its checksum is missing", "--resume", *same)
    torch.save({"format": "other"}, state)
    check(capsys, tmp_path, f"no whole checkpoint is left: {state}", "--resume", *same)

    (folder / "config.yaml").write_text(yaml.safe_dump({"some": "thing"}))
    check(capsys, tmp_path, "config.yaml: not of this version of genray: ", "--resume", *same)
    (folder / "config.yaml").write_text("[")
    check(capsys, tmp_path, "config.yaml: not of this version of genray: ", "--resume", *same)


# --- data ----------------------------------------------------------------------------------------------------------


def png(side=8):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(folder, images, labels, name="label"):
    folder.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": image, "path": ""} for image in images])
    for part in ("train", "test"):
        pq.write_table(pa.table({"image": column, name: labels}), folder / f"{part}-00000-of-00001.parquet")


DATA = {
    "absent": (lambda d: None, [], "data.path"),
    "empty folder": (lambda d: d.mkdir(), [], "parquet"),
    "corrupt image": (lambda d: parquet(d, [png()] * 9 + [b"junk"], [0, 1] * 5), [], "row 9"),
    "tiny images": (lambda d: parquet(d, [png(4)] * 10, [0, 1] * 5), [], "at least 8"),
    "no such column": (lambda d: parquet(d, [png()] * 10, [0, 1] * 5), ["data.label_column=klass"], "klass"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(capsys, tmp_path, case):
    prepare, overrides, says = DATA[case]
    prepare(tmp_path / "data")
    path = tmp_path / "data"
    check(capsys, tmp_path, says, "data.source=parquet", f"data.path={path}", "data.validation_examples=2", *overrides)


def test_data_that_cannot_be_downloaded(capsys, tmp_path):
    overrides = ["data.source=cifar10", f"data.path={tmp_path / 'cifar'}", "data.download=false"]
    check(capsys, tmp_path, "cifar", *overrides)


def test_batch_larger_than_the_data(capsys, tmp_path):
    overrides = ["training.batch_size=2000", "training.drop_last=true"]
    check(capsys, tmp_path, "training.batch_size: expected at most the 1237 training images", *overrides)


def test_everything_that_does_not_fit_the_data_is_listed_at_once(capsys, tmp_path):
    overrides = ["data.train_examples=5000", "data.validation_examples=4000", "data.test_examples=900"]
    overrides += ["evaluation.examples=1000", f"{L}.augmentation.crop_padding=9", "model.mean=[0, 0]"]
    overrides += ["model.std=[1, 1]"]
    assert run("--storage", tmp_path, *overrides) == 2
    fields = [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()]
    assert fields == [
        *("data.train_examples", "data.test_examples", "data.validation_examples", "evaluation.examples"),
        *(f"{L}.augmentation.crop_padding", "model.mean, model.std"),
    ]
    assert not list(tmp_path.iterdir())


def planned(capsys, *argv):
    """The configuration that a dry run resolves."""
    assert run("--dry-run", "--runtime", "local", *argv) == 0
    return yaml.safe_load(capsys.readouterr().out.partition("\ndata  ")[0])


def test_what_nobody_asked_for_follows_the_data_and_the_epochs(capsys, tmp_path):
    """A preset on a smaller data set: its own numbers, and defaults, are lowered; numbers that are typed are not."""
    config = yaml.safe_load(DEFAULT_CONFIG.read_text())
    config["data"] |= {"train_examples": 40000, "test_examples": 9000, "validation_examples": 4000}
    config["global_learner"]["warmup_epochs"] = 12
    config["training"]["epochs"] = 24
    config["evaluation"] = config.get("evaluation", {}) | {"examples": 1000}
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump(config))

    check(capsys, tmp_path, "data.train_examples: expected 1 to 1437", "--config", preset, lines=4)  # of its own making
    found = planned(capsys, "--config", preset, "data.source=digits", "training.epochs=4")
    sizes = [found["data"][f"{part}_examples"] for part in ("train", "test", "validation")]
    assert sizes == [1437, 360, 287]
    assert (found["evaluation"]["examples"], found["global_learner"]["warmup_epochs"]) == (360, 2)
    typed = ["data.source=digits", "data.validation_examples=4000", "global_learner.warmup_epochs=5"]
    check(capsys, tmp_path, "warmup_epochs: expected at most", "--config", preset, *typed, "training.epochs=4")
    check(capsys, tmp_path, "data.validation_examples: expected 0 to", "--config", preset, *typed)

    del config["data"]["validation_examples"], config["data"]["train_examples"], config["data"]["test_examples"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    few = planned(capsys, "--config", tmp_path / "own.yaml", "data.train_examples=100")
    assert few["data"]["validation_examples"] == 20  # of the default, 1000, a fifth of what is there


def test_a_run_that_followed_its_data_goes_on(tmp_path, capsys):
    few = ["--runtime", "local", "--storage", tmp_path, "data.train_examples=150", "training.epochs=1", "model.width=4"]
    assert run(*few) == 0
    assert "note: data.validation_examples: 30 instead of 200, to fit the data" in capsys.readouterr().err
    (tmp_path / "digits" / "results.json").unlink()
    assert run(*few, "--resume") == 0
    assert yaml.safe_load((tmp_path / "digits" / "config.yaml").read_text())["data"]["validation_examples"] == 30
