"""`genray.evaluate` on arrays and `python -m genray.evaluate`: what is measured, and what the record says of it."""

import io
import json
import random
import re
import shutil
import time
from dataclasses import replace
from fractions import Fraction
from math import sqrt

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import wait_for
from torch import nn

import genray
from genray.attacks import ExampleDraw, GradientAttack
from genray.cli.evaluate import main, parse_args
from genray.cli.parser import run_command
from genray.errors import DataError
from genray.evaluation.job import Request, run_task
from genray.evaluation.record import protocol, record_table
from genray.evaluation.suite import COLUMNS
from genray.recording import progress
from genray.storage import Storage
from genray.types import ThreatModel

QUICK = {"attacks": ("pgd20", "cw"), "epsilon": "0.1", "block_size": 25}


@pytest.fixture(scope="module")
def record(model, digits):
    return genray.evaluate(model, *digits, **QUICK)


class Linear(nn.Module):
    """Logits linear in the mean brightness of K vertical stripes."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return torch.stack([part.mean((1, 2, 3)) for part in x.tensor_split(self.classes, dim=3)], 1)


def stripes(classes, count=30):
    """Images whose stripe y is a little brighter than the others."""
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.5
    y = torch.arange(count) % classes
    for image, label in zip(x, y):
        image.tensor_split(classes, dim=2)[label].add_(0.06)
    return x, y


# --- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["numpy uint8", "numpy float32", "numpy float64", "torch float", "list of labels"])
def test_any_arrays_give_the_same_numbers(model, digits, record, form):
    x, y = digits
    forms = {
        "numpy uint8": (x.numpy(), y.numpy()),
        "numpy float32": ((x.float() / 255).numpy(), y.numpy().astype(np.int32)),
        "numpy float64": (x.double().numpy() / 255, y.numpy()),
        "torch float": (x.float() / 255, y),
        "list of labels": (x, y.tolist()),
    }
    assert genray.evaluate(model, *forms[form], **QUICK) == record


def test_attacks_and_norms_as_one_text(model, digits, record):
    assert genray.evaluate(model, *digits, **QUICK | {"attacks": "cw, pgd20", "norms": "linf"}) == record


def test_the_model_and_the_global_randomness_are_as_before(trained_run, digits):
    model = genray.load_model(trained_run)
    model.train()
    model.classifier.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    record = genray.evaluate(model, digits[0][:20], digits[1][:20], attacks="pgd20,apgd_ce", epsilon=0.1)
    assert record["findings"] == ["the model was in train mode; it is evaluated in eval mode"]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_the_mode_is_put_back_after_an_error(trained_run, digits):
    model = genray.load_model(trained_run).train()
    with pytest.raises(DataError, match="cannot take float32 images of shape"):
        genray.evaluate(model, torch.rand(3, 2, 8, 8), digits[1][:3], attacks="pgd20")
    assert all(module.training for module in model.modules())


# --- the record ----------------------------------------------------------------------------------------------------


def wilson(p, n, z=1.959963984540054):
    """The roots of (p - q)^2 = z^2 q (1 - q) / n in q."""
    a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
    root = sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def columns_of(record):
    yield record["natural"]
    for norm in record["norms"].values():
        yield from norm["columns"].values()


def test_intervals_and_classes(model, digits, record):
    x, y = digits
    with torch.no_grad():
        correct = model(x.float() / 255).argmax(1) == y
    assert record["natural"]["value"] == pytest.approx(float(correct.float().mean()))
    for column in columns_of(record):
        assert (column["low"], column["high"]) == pytest.approx(wilson(column["value"], 120))
        assert column["examples"] == 120
    assert record["natural"]["per_class"] == {str(k): float(correct[y == k].double().mean()) for k in range(10)}

    attack, keep = GradientAttack("linf", 0.1, 0.025, 20), correct.nonzero().flatten()
    found = attack(model, x[keep].float() / 255, y[keep], ExampleDraw(0, "pgd20", keep.tolist()))
    robust = torch.zeros(120, dtype=torch.bool)
    robust[keep] = model(found).argmax(1) == y[keep]
    column = record["norms"]["linf"]["columns"]["pgd20"]
    assert column["value"] == pytest.approx(float(robust.float().mean()))
    assert column["per_class"] == pytest.approx({str(k): float(robust[y == k].float().mean()) for k in range(10)})


def test_union_counts_examples_and_parquet_holds_every_flag(model, digits, tmp_path):
    radii = {"linf": 0.15, "l2": 0.65}
    record = genray.evaluate(
        model, *digits, attacks="pgd20,mim,apgd_ce", norms=("l2", "linf"), epsilon=radii, output=str(tmp_path / "out")
    )
    table = pq.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    flags = {name: np.array(values) for name, values in table.items()}
    attacks = ["pgd20", "mim", "apgd_ce"]
    assert set(flags) == {"index", "label", "natural"} | {f"{norm}_{a}" for norm in radii for a in attacks}
    assert list(flags["index"]) == list(range(120)) and list(flags["label"]) == digits[1].tolist()
    assert record["natural"]["value"] == flags["natural"].mean()
    alive = flags["natural"].copy()
    for norm in radii:
        for attack in attacks:
            values = flags[f"{norm}_{attack}"]
            assert values.dtype == bool and not (values & ~flags["natural"]).any()
            assert record["norms"][norm]["columns"][attack]["value"] == values.mean()
            alive &= values
    assert record["union"]["value"] == alive.mean()
    single = min(column["value"] for column in columns_of(record))
    assert record["union"]["value"] < single, "choose radii at which the norms break different examples"
    assert f"union of all norms and attacks: {100 * alive.mean():.2f} [" in record_table(record)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(record))


@pytest.mark.slow
def test_the_cascade_is_its_last_stage(model, digits, tmp_path):
    record = genray.evaluate(model, digits[0][:4], digits[1][:4], epsilon=0.2, output=str(tmp_path / "out"))
    flags = pq.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    assert flags["linf_aa"] == flags["linf_aa_square"]
    stages = [np.array(flags[f"linf_aa_{stage}"]) for stage in ("apgd_ce", "apgd_t", "fab_t", "square")]
    assert all(not (later & ~earlier).any() for earlier, later in zip(stages, stages[1:]))
    assert [attack["name"] for attack in record["protocol"]["threats"][0]["attacks"]] == ["aa"]


@pytest.mark.parametrize("epsilon", ["8/255", {"linf": "8/255"}, "0.03", 0.03])
def test_epsilon_as_fraction_and_decimal(epsilon):
    x, y = stripes(10, 20)
    (threat,) = genray.evaluate(Linear(10), x, y, attacks="pgd20", epsilon=epsilon)["protocol"]["threats"]
    text = "8/255" if "8" in str(epsilon) else "0.03"
    assert threat["epsilon"] == text
    assert threat["epsilon_decimal"] == pytest.approx(8 / 255 if text == "8/255" else 0.03)


def test_protocol_hash():
    """Changes with everything that was decided and with nothing else."""
    x, y = stripes(10, 20)
    base = {"attacks": ("pgd20",), "norms": ("linf",), "epsilon": 0.1, "data": {"source": "a", "split": "test"}}

    def hashed(examples=20, classes=10, **changed):
        return genray.evaluate(Linear(classes), x[:examples], y[:examples] % classes, **base | changed)["protocol"]

    same = hashed()
    assert same["hash"] == hashed()["hash"] and len(same["hash"]) == 16
    changes = [
        {"attacks": ("pgd20", "cw")},
        {"attacks": ("mim",)},
        {"norms": ("linf", "l2"), "epsilon": {"linf": 0.1, "l2": 1}},
        {"norms": ("l2",)},
        {"epsilon": "0.100001"},
        {"step_size": 0.01},
        {"seed": 1},
        {"block_size": 10},
        {"examples": 19},
        {"data": {"source": "b", "split": "test"}},
        {"data": {"source": "a", "split": "train"}},
        {"engine": "pyautoattack"},
    ]
    hashes = [hashed(**change)["hash"] for change in changes]
    assert len({same["hash"], *hashes}) == len(changes) + 1
    known = {"data", "threats", "seed", "block_size", "engine", "num_classes"}
    assert set(same) == known | {"interval", "hash", "engines", "versions"}
    (attack,) = same["threats"][0]["attacks"]
    stated = {"num_steps": 20, "step_size": 0.025, "restarts": 1, "passes": 20, "loss": "cross-entropy"}
    assert attack.items() >= stated.items()
    assert {"torch", "pyautoattack", "genray"} <= set(same["versions"])


def test_the_package_with_blocks_of_100_has_the_hash_of_older_records():
    """They were the default before; the hash was computed then."""
    threats = ThreatModel("linf", Fraction(8, 255)), ThreatModel("l1", Fraction(12))
    request = Request(threats, ("paper",), {}, block_size=100, engine="pyautoattack")
    stated = protocol(request, {"source": "cifar10", "split": "test", "examples": 500}, 10, {})
    assert (stated["engine"], stated["hash"]) == ("pyautoattack", "5f7f186ae67be698")


def test_a_folder_of_an_older_version_is_gone_on_with_as_it_was_begun(model, digits, tmp_path):
    x, y, out = digits[0][:60], digits[1][:60], str(tmp_path / "out")
    how = {"attacks": "apgd_ce", "epsilon": 0.1, "output": out}
    before = genray.evaluate(model, x, y, **how, engine="pyautoattack", block_size=25)
    for file in (tmp_path / "out/blocks").glob("*-000001.json"):
        file.unlink()
    assert genray.evaluate(model, x, y, **how, resume=True) == before
    with pytest.raises(genray.errors.RunFolderError, match="protocol.block_size was 25, is 30"):
        genray.evaluate(model, x, y, **how, resume=True, block_size=30)


@pytest.mark.parametrize("shape, size", [((3, 32, 32), 100), ((1, 28, 28), 100), ((1, 8, 8), 256), ((1, 2, 2), 1000)])
def test_blocks_of_tiny_images_are_larger(shape, size):
    x = torch.rand((3, *shape), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    stated = genray.evaluate(model, x, torch.tensor([0, 1, 2]), attacks="natural")["protocol"]
    assert stated["block_size"] == size


def test_a_notebook_shows_a_table_a_norm():
    x, y = stripes(10, 20)
    record = genray.evaluate(Linear(10), x, y, attacks="pgd20", norms="linf,l2")
    assert repr(record) == record_table(record) and isinstance(record, dict)
    html = record._repr_html_()
    assert html.count("<table") == 2 and html.count("PGD20") == 2 and "l2 128/255" in html


def test_the_table_is_in_the_papers_order(model, digits):
    wanted = ["pgd100", "apgd_dlr", "pgd20", "apgd_ce", "cw"]
    record = genray.evaluate(model, digits[0][:30], digits[1][:30], attacks=wanted, epsilon=0.1)
    lines = record_table(record).splitlines()
    order = [name for name in COLUMNS if name in wanted]
    assert order == ["pgd20", "pgd100", "cw", "apgd_ce", "apgd_dlr"]
    assert lines[0] == "linf 0.1 (0.1), 30 examples"
    assert lines[1].split() == ["natural", *order, "union"]
    linf = record["norms"]["linf"]
    values = [record["natural"], *(linf["columns"][name] for name in order), linf["union"]]
    assert lines[2].split() == ["accuracy", *(f"{100 * value['value']:.2f}" for value in values)]
    low, high = wilson(values[0]["value"], 30)
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in lines[3]
    assert lines[-1].endswith(record["protocol"]["hash"])


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    x, y = stripes(classes)
    names = ["pgd20", "cw", "apgd_ce", "apgd_dlr", "apgd_t", "fab_t"]
    record = genray.evaluate(Linear(classes).eval(), x, y, attacks=names, epsilon=0.05)
    columns = record["norms"]["linf"]["columns"]
    assert record["natural"]["value"] == 1
    # The stripe's mean is 0.06 above the others', and 0.05 each way is enough for all of the attacks.
    assert {name: column["value"] for name, column in columns.items()} == dict.fromkeys(names, 0.0)
    notes = [note for a in record["protocol"]["threats"][0]["attacks"] for note in a["notes"]]
    assert f"apgd_t: the targeted DLR loss needs 4 classes, there are {classes}" in " ".join(notes)
    assert any(f"fab_t: {classes - 1} targets" in note for note in notes)
    assert any(note.startswith("apgd_dlr") for note in notes) == (classes == 2)
    assert all(f"  note: {note}" in record_table(record) for note in notes)
    assert record["findings"] == []


@pytest.mark.slow
def test_the_order_of_the_work_does_not_matter(model, digits, tmp_path, monkeypatch):
    """Workers give results back in any order."""

    def backwards(todo, model, images, labels, classes, cluster, *others):
        while batch := todo.take():
            for task in reversed(batch):
                yield task, run_task(task, todo.request, model, images, labels, classes, "cpu")

    def written(name):
        options = QUICK | {"attacks": "pgd20,aa", "epsilon": 0.2, "engine": "genray", "block_size": 4}
        genray.evaluate(model, digits[0][:16], digits[1][:16], **options, output=str(tmp_path / name))
        return [(tmp_path / name / file).read_bytes() for file in ("results.json", "results.parquet")]

    forwards = written("forwards")
    monkeypatch.setattr("genray.evaluation.run.run_tasks", backwards)
    assert written("backwards") == forwards


# --- the folder ----------------------------------------------------------------------------------------------------


def test_finished_blocks_are_not_done_again_and_damaged_ones_are(model, digits, tmp_path, monkeypatch):
    out = tmp_path / "out"
    genray.evaluate(model, *digits, **QUICK, output=str(out))
    final = (out / "results.json").read_bytes()
    blocks = sorted((out / "blocks").iterdir())
    assert len(blocks) == 3 * 5
    blocks[0].unlink()
    blocks[4].write_bytes(b"")
    blocks[7].write_bytes(b'{"flags": 3}')
    blocks[9].write_bytes(b"[" * 100_000)
    (out / "results.json").unlink()
    half = out / "blocks" / f"{blocks[0].name}.tmp-742388f4"  # of a process that was killed while it wrote
    half.write_bytes(b'{"fla')
    done = []

    def counted(task, *args):
        done.append(task.key)
        return run_task(task, *args)

    monkeypatch.setattr("genray.evaluation.job.run_task", counted)
    genray.evaluate(model, *digits, **QUICK, output=str(out), resume=True)
    assert sorted(done) == sorted(blocks[i].stem for i in (0, 4, 7, 9))
    assert (out / "results.json").read_bytes() == final
    assert sorted((out / "blocks").iterdir()) == blocks  # and nothing else


def test_a_block_that_cannot_be_written_stops_no_other(model, digits, record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("genray.recording.evaluation_folder.STORAGE_TIMEOUT_S", 1.0)
    undisturbed, blocks = tmp_path / "whole", tmp_path / "out" / "blocks"
    genray.evaluate(model, *digits, **QUICK, output=str(undisturbed))
    expected = sorted(path.name for path in (undisturbed / "blocks").iterdir())
    in_the_way = blocks / expected[0] / "a folder"
    in_the_way.mkdir(parents=True)
    with pytest.raises(genray.errors.StorageError) as caught:
        genray.evaluate(model, *digits, **QUICK, output=str(tmp_path / "out"))
    assert str(caught.value).startswith(f"tried for 1 s; not written: blocks/{expected[0]} ({blocks}/{expected[0]}: ")
    # A last try may still be on its way, with its file of another name.
    wait_for(lambda: sorted(path.name for path in blocks.iterdir() if path.is_file()) == expected[1:], "the files")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(record))
    assert record_table(record) in capsys.readouterr().err
    shutil.rmtree(blocks / expected[0])
    assert genray.evaluate(model, *digits, **QUICK, output=str(tmp_path / "out"), resume=True) == record
    assert (blocks / expected[0]).is_file()


def test_an_evaluation_that_is_stopped_keeps_what_is_finished(model, digits, tmp_path, monkeypatch):
    """Storage that fails for a while, and Ctrl-C meanwhile."""
    real, began = Storage.write, time.monotonic()

    def write(self, name, data):
        if time.monotonic() < began + 2:
            raise genray.errors.StorageError(f"{name}: cannot be written: No space left on device")
        real(self, name, data)

    def stopped(todo, *args):
        for task in todo.take()[:2]:
            yield task, run_task(task, todo.request, *args[:4], "cpu")
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "write", write)
    monkeypatch.setattr("genray.evaluation.run.run_tasks", stopped)
    with pytest.raises(KeyboardInterrupt):
        genray.evaluate(model, *digits, **QUICK, output=str(tmp_path / "out"))
    assert (tmp_path / "out" / "request.json").is_file() and len(list((tmp_path / "out" / "blocks").iterdir())) == 2


def test_another_evaluation_cannot_go_on_in_the_folder(model, digits, tmp_path):
    x, y = digits
    out = {"output": str(tmp_path / "out")}
    genray.evaluate(model, x, y, **QUICK, **out)
    changed = Linear(10)
    cases = [
        (model, x, {"seed": 1}, "protocol.seed was 0, is 1"),
        (model, x, {"epsilon": "8/255"}, r"protocol.threats.0.epsilon was 0.1, is 8/255"),
        (model, x, {"block_size": 10}, "protocol.block_size was 25, is 10"),
        (model, x, {"attacks": "cw"}, "protocol.threats.0.attacks not what it was"),
        (changed, x, {}, "model not what it was"),
        (model, 255 - x, {}, "images not what it was"),
    ]
    for some_model, some_x, options, says in cases:
        with pytest.raises(genray.errors.RunFolderError, match=f"cannot resume another evaluation: {says}"):
            genray.evaluate(some_model, some_x, y, **QUICK | options, **out, resume=True)


def test_normalisation_is_part_of_the_model(tmp_path):
    """Its mean and std are not in the state dict."""
    x, y = stripes(2, 10)
    shape = {"num_classes": 2, "in_channels": 1, "image_size": (8, 8), "width": 4, "seed": 0}
    plain, normal = (
        genray.models.build_model("small_cnn", **shape, **more) for more in ({}, {"mean": [0.5], "std": [1]})
    )
    options = {"attacks": "pgd20", "output": str(tmp_path / "out")}
    genray.evaluate(plain.eval(), x, y, **options)
    with pytest.raises(genray.errors.RunFolderError, match="model not what it was"):
        genray.evaluate(normal.eval(), x, y, **options, resume=True)


# --- the command ---------------------------------------------------------------------------------------------------

COMMAND = ["--attacks", "pgd20,cw", "--epsilon", "0.1", "--block-size", "25"]


def command(*argv):
    return run_command(main, parse_args([str(arg) for arg in argv]))


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_run_folder_and_model_file_give_the_same_numbers(trained_run, record, tmp_path, capsys, digits):
    assert command(trained_run, *COMMAND, "--output", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert out == record_table(read(tmp_path / "run")) + f"\neverything is in {tmp_path / 'run'}\n"
    # A file of its own, and one of bare weights: their architecture is seen or given.
    shutil.copy(trained_run / "model.pt", tmp_path / "model.pt")
    bare = torch.load(trained_run / "model.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": {f"module.{name}": value for name, value in bare.items()}}, tmp_path / "bare.pt")
    numbers = read(tmp_path / "run")
    for name, extra in (
        ("model.pt", []),
        ("bare.pt", ["--width", 8, "--normalize", "none"]),
        ("bare.pt", ["--arch", "small_cnn", "--width", 8, "--normalize", "none"]),
    ):
        line = [tmp_path / name, "--data", "digits", "--examples", 120, *COMMAND, *extra]
        assert command(*line) == 0
        (found,) = (tmp_path / f"{name}.evaluations").iterdir()
        assert read(found) == numbers
        shutil.rmtree(found)
    assert {key: numbers[key] for key in ("natural", "norms")} == json.loads(
        json.dumps({key: record[key] for key in ("natural", "norms")})
    )
    data = {"source": "digits", "split": "test", "examples": 120}
    assert numbers["protocol"]["data"] == data | {"fingerprint": record["protocol"]["data"]["fingerprint"]}


def test_examples_are_the_first_and_said(trained_run, digits, model, tmp_path, capsys):
    assert command(trained_run, *COMMAND, "--examples", 30, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("linf 0.1 (0.1), 30 examples\n")
    found = read(tmp_path / "out")
    first = genray.evaluate(model, digits[0][:30], digits[1][:30], **QUICK)
    assert found["natural"] == first["natural"] and found["protocol"]["data"]["examples"] == 30
    assert found["norms"] == json.loads(json.dumps(first["norms"]))


def test_a_run_brings_its_radius_and_its_data(trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    assert command(tmp_path / "run", "--attacks", "pgd20", "--norms", "l2,linf", "--examples", 20) == 0
    (folder,) = (tmp_path / "run" / "evaluations").iterdir()
    threats = read(folder)["protocol"]["threats"]
    assert [(threat["norm"], threat["epsilon"]) for threat in threats] == [("l2", "128/255"), ("linf", "0.1")]


def test_evaluations_of_one_run_lie_side_by_side(trained_run, tmp_path, capsys):
    run, few = shutil.copytree(trained_run, tmp_path / "run"), ["--attacks", "pgd20", "--examples", 20]
    for more in ([], ["--attacks", "mim"], ["--epsilon", "0.05"], ["--seed", 1], ["--examples", 21]):
        assert command(run, *few, *more) == 0
    there = sorted(folder.name for folder in (run / "evaluations").iterdir())
    assert [name.rpartition("-")[0] for name in there] == ["mim-linf", *["pgd20-linf"] * 4]

    before = contents(run)
    capsys.readouterr()
    assert command(run, *few) == 2
    assert "this evaluation is there; --resume goes on with it or shows it, --overwrite" in capsys.readouterr().err
    assert command(run, *few, "--resume") == 0 and "pgd20" in capsys.readouterr().out
    assert contents(run) == before
    assert command(run, *few, "--output", tmp_path / "same") == 0
    same = read(tmp_path / "same")
    (place,) = [run / "evaluations" / name for name in there if read(run / "evaluations" / name) == same]
    line = [run, *few, "--output", place]
    assert command(*line, "--data", "image_folder:/gone") == 2  # found before the data are looked for
    assert "this evaluation is there" in capsys.readouterr().err
    assert command(*line, "--data", "image_folder:/gone", "--overwrite") == 2
    assert contents(run) == before
    assert command(*line, "--seed", 7, "--overwrite") == 0
    assert read(place)["protocol"]["seed"] == 7
    changed = {name for name, content in contents(run).items() if before.get(name) != content}
    assert changed and all(name.startswith(f"evaluations/{place.name}/") for name in changed)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- what a user sees ----------------------------------------------------------------------------------------------


class Stream(io.StringIO):
    def isatty(self):
        return False


def test_long_attacks_say_how_long_they_take(model, digits, monkeypatch):
    """Off a terminal: in shares of the time, not of the blocks, so that quick ones do not promise too much."""
    clock, stream = [0.0], Stream()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", stream)
    seconds = {"natural": 1, "pgd20": 61, "pgd100": 301}  # for three passes a gradient

    def slow(task, *args):
        clock[0] += seconds[task.attack]
        return replace(run_task(task, *args), seconds=seconds[task.attack])

    monkeypatch.setattr("genray.evaluation.job.run_task", slow)
    genray.evaluate(model, digits[0][:40], digits[1][:40], attacks="pgd20,pgd100", epsilon=0.1, block_size=20)
    lines = stream.getvalue().splitlines()
    found = [re.fullmatch(r"evaluating (\d+)/100 %  about (\d+):(\d+) left", line).groups() for line in lines[:2]]
    first, second = ((int(share), 60 * int(minutes) + int(rest)) for share, minutes, rest in found)
    assert first == (pytest.approx(9, abs=1), pytest.approx(726 - 63, rel=0.1))
    assert second == (pytest.approx(17, abs=1), pytest.approx(726 - 124, rel=0.1))
    assert lines[-1] == "evaluating 100/100 %" and len(lines) == 4


def test_the_bar_is_closed_and_the_work_stopped_when_the_disk_is_full(model, digits, tmp_path, monkeypatch):
    closed = []

    def watched(todo, *args):
        try:
            for task in todo.take():
                yield task, run_task(task, todo.request, *args[:4], "cpu")
        finally:
            closed.append(True)

    def full(self, task, result):
        raise genray.errors.StorageError("disk full")

    monkeypatch.setattr("genray.evaluation.run.run_tasks", watched)
    monkeypatch.setattr("genray.recording.evaluation_folder.EvaluationFolder.write", full)
    with pytest.raises(genray.errors.StorageError) as caught:
        genray.evaluate(model, *digits, **QUICK, output=str(tmp_path / "out"))
    assert closed == [True], "before the traceback is let go of"
    assert caught.value is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_on_a_gpu_stays_there(model, digits, record):
    import copy

    moved = copy.deepcopy(model).cuda()
    found = genray.evaluate(moved, digits[0].cuda(), digits[1].cuda(), **QUICK)
    assert next(moved.parameters()).is_cuda
    for ours, theirs in zip(columns_of(found), columns_of(record)):
        assert abs(ours["value"] - theirs["value"]) <= 1 / 120
    assert found["findings"] == []
