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
N = "base_learners.natural"

# (arguments, what the one line has to say)
OVERRIDES = [
    (["training.epochs=0"], "training.epochs: expected a whole number at least 1, got 0"),
    (["training.epochs=ten"], "training.epochs: expected a whole number at least 1, got 'ten'"),
    (["training.epochs=1.5"], "training.epochs: expected a whole number"),
    (["training.epochs=true"], "training.epochs: expected a whole number"),
    (["training.batch_size=-8"], "training.batch_size: expected"),
    (["training.epoch=3"], "training.epoch: unknown key (did you mean epochs?)"),
    (["trainig.epochs=3"], "trainig: unknown key (did you mean training?)"),
    (["training=3"], "training: expected a section"),
    (["training.schedules_by=minute"], "training.schedules_by: expected one of epoch, step"),
    (["seed=010"], "seed: expected a whole number at least 0, got '010'"),
    (["seed=0x10"], "seed: expected a whole number at least 0, got '0x10'"),
    (["training.batch_size=1:20"], "training.batch_size: expected a whole number at least 1, got '1:20'"),
    (["training.batch_size=1_000"], "training.batch_size: expected a whole number at least 1, got '1_000'"),
    (["compute.compile=yes"], "compute.compile: expected true or false, got 'yes'"),
    ([f"{L}.attack.step_size=010"], f"{L}.attack.step_size: expected a number such as"),
    ([f"{L}.attack.step_size=08/255"], f"{L}.attack.step_size: expected a number such as"),
    (["seed=-1"], "seed: expected a whole number at least 0"),
    (["name=../evil"], "name: expected text of letters"),
    (["device=tpu"], "device: expected one of auto, cpu, cuda, got 'tpu'"),
    (["device=cuda"], "device: expected cpu or auto, because torch sees no CUDA device"),
    (["model.name=resnet19"], "model.name: expected one of"),
    (["model.width=0"], "model.width: expected"),
    (["model.mean=[0.5]"], "model.mean, model.std: expected both or neither"),
    (["model.mean=[0.5,0.5]", "model.std=[1,1]"], "model.mean, model.std: expected 1 values each, one a channel"),
    (["model.name=resnet18", "model.batch_norm=true"], "model.batch_norm: expected false for resnet18"),
    (["data.source=imagenet"], "data.source: expected one of"),
    (["data.source=parquet"], "data.path: missing, source parquet needs the folder"),
    (["data.path=/tmp"], "data.path: has no effect with source digits"),
    (["data.label_column=label"], "data.label_column: has no effect with source digits"),
    (["data.image_size=[8, 8]"], "data.image_size: has no effect with source digits"),
    (["data.train_examples=99999"], "data.train_examples: expected"),
    (["data.validation_examples=5000"], "data.validation_examples: expected"),
    (["data.validation_examples=0"], "data.validation_examples: expected at least 1 with evaluation.select_on"),
    (["evaluation.examples=100000"], "evaluation.examples: expected at most the 360 test images"),
    (["evaluation.select_on=train"], "evaluation.select_on: expected one of validation, test"),
    (
        ["evaluation.attack.epsilon=8"],
        "evaluation.attack.epsilon: expected at most 1 for linf (pixels are in [0, 1]), got 8",
    ),
    ([f"{L}.attack.norm=l3"], f"{L}.attack.norm: expected one of linf, l2, l1, got 'l3'"),
    ([f"{L}.attack.epsilon=8"], "write 8/255, not 8"),
    ([f"{L}.attack.epsilon=0"], f'{L}.attack.epsilon: expected a number such as "8/255" above 0, got 0'),
    ([f"{L}.attack.epsilon=8/0"], f"{L}.attack.epsilon: expected"),
    ([f"{L}.attack.epsilon=.nan"], f"{L}.attack.epsilon: expected"),
    ([f"{L}.attack.step_size=-0.1"], f"{L}.attack.step_size: expected"),
    ([f"{L}.attack.num_steps=0"], f"{L}.attack.num_steps: expected"),
    ([f"{L}.attack=null"], f"{L}.attack: missing, objective adversarial needs one"),
    ([f"{N}.attack={{norm: linf, epsilon: 0.1, step_size: 0.1}}"], f"{N}.attack: has no effect with objective natural"),
    ([f"{L}.objective=trade"], f"{L}.objective.name: expected one of natural, adversarial"),
    ([f"{L}.objective.beta=2"], f"{L}.objective.beta: expected"),
    ([f"{L}.optimizer.name=lion"], f"{L}.optimizer.name: expected one of sgd, adam, adamw"),
    ([f"{L}.optimizer={{name: adam, momentum: 0.9}}"], f"{L}.optimizer.momentum: unknown key"),
    ([f"{L}.lr=-0.1"], f"{L}.lr: expected"),
    ([f"{L}.lr=[[0, 0.1], [2, 0.1]]"], f"{L}.lr: expected positions from 0 to 1"),
    ([f"{L}.lr=[[0.5, 0.1], [0.2, 0.1]]"], f"{L}.lr: expected positions from 0 to 1 in non-decreasing order"),
    ([f"{L}.lr=null"], f"{L}.lr: expected"),
    ([f"{L}.augmentation.crop_padding=8"], f"{L}.augmentation.crop_padding: expected less than the image's side (8)"),
    ([f"{L}.averaging.decay=1"], f"{L}.averaging.decay: expected a number at least 0 below 1, got 1"),
    ([f"{L}.resources.num_gpus=1.5"], f"{L}.resources.num_gpus: expected at most 1, because a worker computes on"),
    ([f"{L}.resources.num_cpus=0"], f"{L}.resources.num_cpus: expected"),
    (
        [
            "base_learners.global={objective: natural, lr: 0.1}",
            "global_learner.gamma=null",
            "global_learner.mixing_weights={linf: 1, natural: 0, global: 0}",
        ],
        "base_learners.global: expected another name",
    ),
    (["base_learners={}"], "base_learners: expected one or more"),
    ([f"{N}=null"], "global_learner.gamma: expected one natural and one robust learner, got linf"),
    (["global_learner.gamma=1.5"], "global_learner.gamma: expected"),
    (["global_learner.gamma=null"], "global_learner.mixing_weights: missing"),
    (["global_learner.mixing_weights={linf: 1, natural: rest}"], "expected gamma or mixing_weights, got both"),
    (["global_learner.sync_every=0"], "global_learner.sync_every: expected"),
    (["global_learner.sync_unit=epoch"], "global_learner.sync_unit: expected one of step, epoch_end"),
    (["global_learner.warmup_epochs=1000"], "global_learner.warmup_epochs: expected at most training.epochs"),
    (["global_learner.decay=1"], "global_learner.decay: expected"),
    (["checkpoint.keep=0"], "checkpoint.keep: expected"),
    (["runtime.startup_timeout_s=0"], "runtime.startup_timeout_s: expected"),
    (["training.epochs"], "'training.epochs': expected key=value"),
    (["=3"], "'=3': expected key=value"),
    (["training.epochs=1", "configs/digits.yaml"], "'configs/digits.yaml': expected key=value, --config for a file"),
    (["configs/absent.yaml"], "configs/absent.yaml: cannot be read: No such file"),
    (["training..epochs=3"], "expected key=value"),
    (["training.epochs=[1"], "training.epochs: value '[1' is not valid YAML"),
    (["seed.sub.key=3"], "seed.sub.key: seed is not a section but 0"),
]


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


@pytest.mark.parametrize(("overrides", "says"), OVERRIDES, ids=[" ".join(o) for o, _ in OVERRIDES])
def test_overrides(capsys, tmp_path, overrides, says):
    check(capsys, tmp_path, says, *overrides)


def test_every_mistake_is_listed_at_once(capsys, tmp_path):
    assert run("--storage", tmp_path, "training.epochs=0", "model.name=x", f"{L}.attack.norm=l9") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 3
    for culprit in ("training.epochs", "model.name", f"{L}.attack.norm"):
        assert f"error: {culprit}: expected" in err
    assert not list(tmp_path.iterdir())


FILES = {
    "list.yaml": (b"- a\n- b\n", "expected key: value lines, got list"),
    "empty.yaml": (b"", "expected key: value lines, got NoneType"),
    "broken.yaml": (b"name: [a\nseed: 0\n", "not valid YAML: line"),
    "twice.yaml": (b"name: a\nseed: 0\nseed: 1\n", "not valid YAML: line 3: key 'seed' stands twice"),
    "binary.yaml": (b"\xff\xfe\x00\x01", "expected a YAML text file"),
    "hostile.yaml": (b"name: !!python/object/apply:os.system ['touch pwned']\n", "not valid YAML"),
    "tab.yaml": (b"name: a\n\tseed: 0\n", "not valid YAML: line 2"),
}


@pytest.mark.parametrize("name", FILES)
def test_config_files(capsys, tmp_path, monkeypatch, name):
    content, says = FILES[name]
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    check(capsys, tmp_path, says, "--config", tmp_path / name)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config", "no_such_file.yaml"], "no_such_file.yaml: cannot be read: No such file"),
        (["--config", "/"], "/: cannot be read"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--runtime", "spark"], "argument --runtime: invalid choice: 'spark'"),
        (["--address", "auto"], "--address is for --runtime ray"),
        (["--name", "a b"], "name: expected text of letters"),
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
    check(
        capsys,
        tmp_path,
        "a run of this name exists; choose another with --name, go on with --resume, or replace",
        *same,
    )
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
    "not parquet": (
        lambda d: (d.mkdir(), [(d / f"{p}-00000-of-00001.parquet").write_bytes(b"x" * 99) for p in ("train", "test")]),
        [],
        "train-00000-of-00001.parquet",
    ),
    "corrupt image": (lambda d: parquet(d, [png()] * 9 + [b"junk"], [0, 1] * 5), [], "row 9"),
    "mixed sizes": (lambda d: parquet(d, [png()] * 9 + [png(9)], [0, 1] * 5), [], "data.image_size"),
    "no such column": (lambda d: parquet(d, [png()] * 10, [0, 1] * 5), ["data.label_column=klass"], "klass"),
    "negative label": (lambda d: parquet(d, [png()] * 10, [0, -1] * 5), [], "label"),
    "one class": (lambda d: parquet(d, [png()] * 10, [0] * 10), [], "class"),
    "tiny images": (lambda d: parquet(d, [png(4)] * 10, [0, 1] * 5), [], "at least 8"),
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
    overrides += [
        "evaluation.examples=1000",
        f"{L}.augmentation.crop_padding=9",
        "model.mean=[0, 0]",
        "model.std=[1, 1]",
    ]
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
    assert [found["data"][key] for key in ("train_examples", "test_examples", "validation_examples")] == [
        1437,
        360,
        287,
    ]
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
