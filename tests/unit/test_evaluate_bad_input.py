"""Whatever is wrong with an evaluation's input: exit code 2, one line that names the culprit, nothing left behind."""

import pickle
import types

import numpy as np
import pytest
import torch
from torch import nn

import genray
from genray.cli.evaluate import main, parse_args
from genray.cli.parser import run_command
from genray.errors import InputError
from genray.models import build_model

QUICK = ["--attacks", "pgd20", "--examples", "4", "--epsilon", "0.1"]


def run(*argv):
    """Exit code of `python -m genray.evaluate argv`."""
    try:
        return run_command(main, parse_args([str(arg) for arg in argv]))
    except SystemExit as stop:  # argparse
        return stop.code


def check(capsys, tmp_path, says, *argv):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(("error: ", "genray.evaluate: error: "))
    assert says in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


ARGUMENTS = [
    (["--attacks", "pgd21"], "expected one of pgd20, pgd100"),
    (["--attacks", "pgd21"], "got 'pgd21' (did you mean pgd20?)"),
    (["--attacks", ""], "evaluation attack: expected one of"),
    (["--attacks", "aa,"], "evaluation attack: expected one of"),
    (["--norms", "l3"], "norms[0]: expected one of linf, l2, l1, got 'l3'"),
    (["--norms", ""], "norms[0]: expected one of linf, l2, l1, got ''"),
    (["--norms", "l2", "--attacks", "cw"], "evaluation attack cw: expected norm linf, got 'l2'"),
    (
        ["--norms", "linf,l1", "--attacks", "mim", "--epsilon", "linf=0.1"],
        "evaluation attack mim: expected norm linf or l2, got 'l1'",
    ),
    (["--epsilon", "0"], "epsilon.linf: expected a number"),
    (["--epsilon", "-8/255"], "argument --epsilon: expected one argument"),
    (["--epsilon=-8/255"], "epsilon.linf: expected a number"),
    (["--epsilon", "eight"], "epsilon.linf: expected a number"),
    (["--epsilon", ""], "epsilon.linf: expected a number"),
    (["--epsilon", "nan"], "epsilon.linf: expected a number"),
    (["--epsilon", "8"], 'epsilon.linf: expected a number such as "8/255" above 0 at most 1, got 8'),
    (["--epsilon", "linf=8/0"], "epsilon.linf: expected a number"),
    (["--epsilon", "l2=1"], "--epsilon: expected those of linf, got one of 'l2'"),
    (["--epsilon", "1", "--norms", "l2,l1"], "--epsilon: expected norm=value for each of l2, l1, got '1'"),
    (["--step-size", "l2=1"], "--step-size: expected those of linf, got one of 'l2'"),
    (["--step-size", "0"], "step_size.linf: expected a number"),
    (["--engine", "mine"], "engine: expected one of genray, genray-bf16, pyautoattack or null, got 'mine'"),
    (["--examples", "0"], "--examples: expected"),
    (["--examples", "-3"], "--examples: expected"),
    (["--examples", "121"], "--examples: expected"),
    (["--examples", "few"], "argument --examples: invalid int value: 'few'"),
    (["--workers", "-1"], "--workers: expected at least 0, got -1"),
    (["--block-size", "0"], "--block-size: expected at least 1, got 0"),
    (["--seed", "-1"], "--seed: expected at least 0, got -1"),
    (["--arch", "resnet18"], "--arch: has no effect on a run folder"),
    (["--width", "8"], "--width: has no effect on a run folder"),
    (["--normalize", "none"], "--normalize: has no effect on a run folder"),
    (["--normalize", "imagenet"], "argument --normalize: expected none, cifar10, cifar100 or MEAN:STD such as"),
    (["--normalize", "0.5:0.2:0.1"], "got '0.5:0.2:0.1'"),
    (["--weights", "ema"], "--weights: has no effect on a run folder"),
    (["--data", "imagenet"], "data.source: expected one of digits, cifar10"),
    (["--data", ""], "data.source: expected one of digits, cifar10"),
    (["--data", "parquet"], 'data.path: the source "parquet" needs a folder'),
    (["--data", "parquet:/no/such/folder"], "/no/such/folder"),
    (["--data", "digits:/somewhere"], "data.path: expected nothing"),
    (["--address", "nonsense"], "--address: expected auto or HOST:PORT, got nonsense"),
    (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: no Ray cluster answers there"),
    (["--max-failures", "3"], "--max-failures: has no effect without --workers or --address"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
]


@pytest.mark.parametrize(("argv", "says"), ARGUMENTS, ids=[" ".join(argv) for argv, _ in ARGUMENTS])
def test_arguments(capsys, tmp_path, trained_run, argv, says):
    check(capsys, tmp_path, says, trained_run, *QUICK, "--output", tmp_path / "out", *argv)


def test_a_device_that_is_not_there(capsys, tmp_path, trained_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = "device: expected cpu or auto, because torch sees no CUDA device here, got cuda"
    check(capsys, tmp_path, says, trained_run, *QUICK, "--output", tmp_path / "out", "--device", "cuda")
    check(capsys, tmp_path, says, tmp_path / "none", "--mixtures", "1", "--device", "cuda")  # before a file is read
    assert run(trained_run, *QUICK, "--output", tmp_path / "out", "--device", "cpu") == 0


def test_every_mistake_is_listed_at_once(capsys, tmp_path, trained_run):
    line = [trained_run, "--norms", "linf,l2", "--epsilon", "linf=8,l2=0", "--output", tmp_path / "out"]
    assert run(*line) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "epsilon.linf: " in err and "epsilon.l2: " in err
    assert not list(tmp_path.iterdir())


# --- what is evaluated ---------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return open, ("pwned", "w")


def small(**changed):
    shape = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8), "width": 8, "seed": 0} | changed
    return build_model("small_cnn", **shape).state_dict()


def spoilt(name, value):
    state = small()
    state[name] = value
    return state


def half(path):
    torch.save(small(), path)
    path.write_bytes(path.read_bytes()[:9000])


def without(path, *names):
    torch.save({name: value for name, value in small().items() if name not in names}, path)


FC, HTML = "classifier.fc3.weight", b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
DATA, WIDE = ["--data", "digits"], ["--data", "digits", "--arch", "small_cnn", "--width", "8"]
FILES = {
    "absent": (lambda p: None, DATA, "expected a run folder or a model file, there is nothing"),
    "empty": (lambda p: p.write_bytes(b""), DATA, "the file is empty"),
    "html": (lambda p: p.write_bytes(HTML), DATA, "is a web page (HTML), not a model file"),
    "lfs": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), DATA, "is a Git LFS pointer"),
    "text": (lambda p: p.write_bytes(b"hello\n" * 99), DATA, "is not a PyTorch model file"),
    "truncated": (half, DATA, "is corrupt or truncated"),
    "hostile pickle": (lambda p: p.write_bytes(pickle.dumps(Hostile())), DATA, "refused"),
    "hostile torch file": (lambda p: torch.save({"state_dict": small(), "x": Hostile()}, p), DATA, "code or objects"),
    "whole model": (lambda p: torch.save(nn.Linear(2, 2), p), DATA, "contains code or objects other than tensors"),
    "no weights": (lambda p: torch.save({"epoch": 3}, p), DATA, "holds no state dict of tensors"),
    "a list": (lambda p: torch.save([torch.zeros(2)], p), DATA, "holds no state dict of tensors"),
    "no data": (lambda p: torch.save(small(), p), [], "--data: missing, expected SOURCE or SOURCE:PATH"),
    "wrong arch": (lambda p: torch.save(small(), p), [*DATA, "--arch", "resnet18"], "it fits small_cnn (width 8"),
    "unknown arch": (lambda p: torch.save(small(), p), [*DATA, "--arch", "resnet19"], "got 'resnet19'"),
    "wrong width": (lambda p: torch.save(small(), p), [*DATA, "--arch", "small_cnn"], "of another shape"),
    "zero width": (lambda p: torch.save(small(), p), [*WIDE[:-1], "0"], "width: expected at least 1, got 0"),
    "missing names": (lambda p: without(p, FC), WIDE, f"1 missing ({FC})"),
    "unexpected names": (lambda p: torch.save(spoilt("extra", torch.zeros(1)), p), WIDE, "1 unexpected (extra)"),
    "unknown names": (lambda p: torch.save({"w": torch.zeros(3)}, p), DATA, "give --arch"),
    "other classes": (lambda p: torch.save(small(num_classes=7), p), WIDE, "7 classes"),
    "colour": (lambda p: torch.save(small(in_channels=3), p), WIDE, "3 input channels"),
    "NaN weights": (lambda p: torch.save(spoilt(FC, torch.full((10, 200), np.nan)), p), WIDE, "NaN or infinite"),
    "half a normalisation": (lambda p: torch.save(spoilt("mean", torch.zeros(1)), p), WIDE, "not the other half"),
    "a normalisation by 0": (
        lambda p: torch.save(small() | {"mean": torch.zeros(1), "std": torch.zeros(1)}, p), WIDE, "std",
    ),
    "genray of the future": (lambda p: torch.save({"format": "genray-model/9", "net": small()}, p), DATA, "model/1"),
    "genray, unknown architecture": (
        lambda p: torch.save(
            {"format": "genray-model/1", "state_dict": small(), "metadata": {"architecture": {"name": "x"}}}, p
        ),
        DATA,
        "its architecture cannot be built",
    ),
    "empty folder": (lambda p: p.mkdir(), [], "this folder has no config.yaml"),
    "a config of another program": (
        lambda p: (p.mkdir(), (p / "config.yaml").write_text("some: thing")), [], "this version of genray: some: ",
    ),
    "a config that is no YAML": (lambda p: (p.mkdir(), (p / "config.yaml").write_text("[")), [], "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(capsys, tmp_path, monkeypatch, case):
    make, argv, says = FILES[case]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    file = tmp_path / "model.pt"
    make(file)
    check(capsys, tmp_path, says, file, *QUICK, *argv)
    assert not (tmp_path / "work" / "pwned").exists()


def test_an_unfinished_run(capsys, tmp_path, trained_run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((trained_run / "config.yaml").read_bytes())
    check(capsys, tmp_path, "model.pt: no such file", tmp_path / "run", *QUICK)


# --- the output ----------------------------------------------------------------------------------------------------


def test_output(capsys, tmp_path, trained_run):
    out = tmp_path / "out"
    line = [trained_run, *QUICK, "--output", out]
    assert run(*line) == 0
    capsys.readouterr()
    check(capsys, tmp_path, f"{out}: this evaluation is there; --resume goes on with it", *line)
    says = "cannot resume another evaluation: protocol.seed was 0, is 5"
    check(capsys, tmp_path, says, *line, "--resume", "--seed", "5")
    model = tmp_path / "other.pt"
    state = torch.load(trained_run / "model.pt", weights_only=True)["state_dict"]
    torch.save({name: value + 1 if value.is_floating_point() else value for name, value in state.items()}, model)
    of_other = [model, "--data", "digits", "--width", "8", *QUICK, "--output", out, "--resume"]
    check(capsys, tmp_path, "cannot resume another evaluation: model not what it was", *of_other)
    for content in (b"", b"[]", b"[1]", b"3", b"null", b"\xff\xfe"):
        (out / "request.json").write_bytes(content)
        says = "request.json is damaged or not of genray: "
        check(capsys, tmp_path, says, *line, "--resume")
    (out / "request.json").unlink()
    check(capsys, tmp_path, "out: expected request.json, which says what its blocks are of", *of_other)


def test_output_that_cannot_be(capsys, tmp_path, trained_run):
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        check(capsys, tmp_path, "file is not a folder", trained_run, *QUICK, "--output", where)
    check(capsys, tmp_path, "storage 'gopher://x'", trained_run, *QUICK, "--output", "gopher://x")


# --- arrays --------------------------------------------------------------------------------------------------------


def images(count=4):
    return torch.full((count, 1, 8, 8), 0.5)


def labels(*values):
    return torch.tensor(values or (0, 1, 2, 3))


class Answers(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def bad_pixel(value):
    x = images()
    x[1, 0, 2, 2] = value
    return x


TEN = Answers(lambda x: x.flatten(1)[:, :10]).eval()
ARRAYS = {
    "NaN": ((TEN, bad_pixel(np.nan), labels()), {}, "x: expected finite pixels, got 1 NaN or infinite ones"),
    "infinite": ((TEN, bad_pixel(np.inf), labels()), {}, "x: expected finite pixels, got 1 NaN"),
    "dark": ((TEN, bad_pixel(-0.1), labels()), {}, "x: expected pixels in [0, 1]"),
    "0..255 as float": ((TEN, images() * 255, labels()), {}, "x: expected pixels in [0, 1]"),
    "no images": ((TEN, images(0), labels()[:0]), {}, "x: expected images (N, C, H, W), at least one"),
    "flat": ((TEN, images().flatten(1), labels()), {}, "x: expected images (N, C, H, W)"),
    "text": ((TEN, "images", labels()), {}, "x: expected a tensor or array, got str"),
    "label too high": ((TEN, images(), labels(0, 1, 2, 10)), {}, "y: expected labels 0..9, got 0..10"),
    "negative label": ((TEN, images(), labels(-1, 1, 2, 3)), {}, "y: expected labels 0..9, got -1..3"),
    "float labels": ((TEN, images(), labels().float()), {}, "y: expected 4 integer labels"),
    "fewer labels": ((TEN, images(), labels(0, 1)), {}, "y: expected 4 integer labels"),
    "one-hot labels": ((TEN, images(), torch.eye(4, dtype=torch.long)), {}, "y: expected 4 integer labels"),
    "one class": ((Answers(lambda x: x.mean((2, 3))), images(), labels(0, 0, 0, 0)), {}, "got shape (4, 1)"),
    "K differs": ((TEN, images(), labels()), {"num_classes": 100}, "model: expected logits (N, K) with K = 100"),
    "K zero": ((TEN, images(), labels()), {"num_classes": 0}, "num_classes: expected a whole number at least 1"),
    "maps": ((Answers(lambda x: x), images(), labels()), {}, "K >= 2 for 4 images, got shape (4, 1, 8, 8)"),
    "other rows": ((Answers(lambda x: x.view(-1, 8)), images(), labels()), {}, "for 4 images, got shape (32, 8)"),
    "pairs": ((Answers(lambda x: (x, x)), images(), labels()), {}, "model: expected logits (N, K), got tuple; take"),
    "a dict": ((Answers(lambda x: {"out": x}), images(), labels()), {}, "got dict; take one of it in a function"),
    "maps in an object": (
        (Answers(lambda x: types.SimpleNamespace(logits=x)), images(), labels()),
        {},
        "K >= 2 for 4 images, got shape (4, 1, 8, 8)",
    ),
    "no logits in an object": (
        (Answers(lambda x: types.SimpleNamespace(scores=x)), images(), labels()),
        {},
        "model: expected logits (N, K), got SimpleNamespace",
    ),
    "arrays": ((lambda x: x.flatten(1).numpy(), images(), labels()), {}, "expected logits (N, K), got ndarray"),
    "class numbers": ((Answers(lambda x: x.flatten(1).long()), images(), labels()), {}, "got int64 numbers"),
    "channels": (
        (nn.Conv2d(3, 2, 3), images(), labels()),
        {},
        "model: cannot take float32 images of shape (1, 8, 8) on cpu (its first convolution takes 3 channels): ",
    ),
    "another error": ((lambda x: 1 / 0, images(), labels()), {}, "of shape (1, 8, 8) on cpu: division by zero"),
    "a path": (("runs/digits", images(), labels()), {}, "got str; genray.load_model reads model files"),
    "nothing": ((None, images(), labels()), {}, "model: expected torch.nn.Module or a function, got NoneType"),
    "a class": ((nn.Linear, images(), labels()), {}, "got the class Linear; make an object of it first"),
    "weights to come": ((nn.Sequential(nn.Flatten(), nn.LazyLinear(9)), images(), labels()), {}, "1.weight has no we"),
    "no weights": ((nn.Linear(8, 9, device="meta"), images(), labels()), {}, "it is on the device meta"),
    "half-precision function": (
        (nn.Linear(8, 9).half().forward, images(), labels()),
        {},
        "expected ordinary float32 weights, got float16; call",
    ),
    "radius None": ((TEN, images(), labels()), {"epsilon": {"linf": None}}, "epsilon.linf: expected a number"),
    "seed": ((TEN, images(), labels()), {"seed": 1.5}, "seed: expected a whole number at least 0, got 1.5"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(case, tmp_path):
    arguments, options, says = ARRAYS[case]
    with pytest.raises(InputError) as caught:
        genray.evaluate(*arguments, **{"attacks": "pgd20", "output": str(tmp_path / "out")} | options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
