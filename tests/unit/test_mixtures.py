"""Mixtures of a run's base learners: points, weights, statistics, the record, the files, bad input."""

import csv
import itertools
import json
import random
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import described, every_write_made
from torch import nn

import genray
from genray.cli.evaluate import main, parse_args
from genray.cli.parser import run_command
from genray.core.mixing import weighted_sum
from genray.data.datasets import load_image_data, validation_split
from genray.evaluation.job import run_task
from genray.evaluation.mixture_sweep import OperatingPoint, build_row, choose, mark_pareto
from genray.evaluation.mixtures import Mixture, mix, parse_mixtures
from genray.records import MixtureResults
from genray.reporting.mixtures import mixture_table
from genray.tables import as_text

TWO, THREE = ("natural", "linf"), ("natural", "linf", "l2")
QUICK = ["--attacks", "pgd20", "--examples", 40, "--block-size", 20]


def command(*argv):
    try:
        return run_command(main, parse_args([str(arg) for arg in argv]))
    except SystemExit as stop:  # argparse
        return stop.code


def read(folder):
    assert described(MixtureResults, folder / "results.json")
    return json.loads((folder / "results.json").read_text())


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def slow_mix(states, weights, counters_of):
    """One number after another."""
    mixed = {}
    for key, value in states[counters_of].items():
        if value.is_floating_point():
            columns = zip(*(states[name][key].flatten().tolist() for name in weights))
            numbers = [sum(w * x for w, x in zip(weights.values(), column)) for column in columns]
            value = torch.tensor(numbers, dtype=torch.float32).reshape(value.shape)
        mixed[key] = value
    return mixed


def accuracy(state, images, labels, width=8):
    model = genray.models.build_model(
        "small_cnn", num_classes=10, in_channels=1, image_size=(8, 8), width=width, batch_norm=True
    )
    model.load_state_dict(state)
    with torch.no_grad():
        return float((model.eval()(images.float() / 255).argmax(1) == labels).double().mean())


@pytest.fixture(scope="module")
def parts():
    """The images of `trained_run`: validation and test."""
    data = load_image_data("digits", test_examples=120)
    train, validation = validation_split(data.train, 70, 0)
    return {"train": train, "validation": validation, "test": data.test}


@pytest.fixture(scope="module")
def study(trained_run, tmp_path_factory):
    """Folder of a finished command; not to be written to."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert command(trained_run, "--mixtures", "0,0.4,1", "--save-mixture", 0.4, *QUICK, "--output", out) == 0
    return out


# --- points --------------------------------------------------------------------------------------------------------


def weights(points):
    return [tuple(weight for _, weight in point.weights) for point in points]


def test_values_and_ranges_of_gamma():
    found = weights(parse_mixtures(" 1, 0:0.3:0.1 ,1/3;0.1", TWO, "linf"))
    gammas = [1, 0, Fraction(1, 10), Fraction(1, 5), Fraction(3, 10), Fraction(1, 3)]
    assert found == [(1 - gamma, gamma) for gamma in gammas]
    assert weights(parse_mixtures("0.25", ("linf", "natural"), "linf")) == [(Fraction(1, 4), Fraction(3, 4))]


def test_points_and_grids_of_the_simplex():
    points = parse_mixtures("l2=0.3,natural=0.2,linf=0.5; natural=1", THREE, None)
    assert weights(points) == [(Fraction(1, 5), Fraction(1, 2), Fraction(3, 10)), (1, 0, 0)]
    assert [point.only for point in points] == [None, "natural"]
    assert [point.key for point in points] == ["natural=0.2,linf=0.5,l2=0.3", "natural=1,linf=0,l2=0"]
    for names, parts in ((THREE, 4), (TWO, 10), ((*THREE, "l1"), 3)):
        every = {p for p in itertools.product(range(parts + 1), repeat=len(names)) if sum(p) == parts}
        found = weights(parse_mixtures(f"grid:1/{parts}", names, None))
        assert len(found) == len(every) and {tuple(int(w * parts) for w in point) for point in found} == every
    assert "/" not in parse_mixtures("natural=1/3,linf=2/3", TWO, None)[0].key


NUMBERS = "expected numbers from 0 to 1, got"
BAD_POINTS = [
    ("", TWO, f"{NUMBERS} ''"),
    ("0,,1", TWO, f"{NUMBERS} ''"),
    ("1.1", TWO, f"{NUMBERS} '1.1'"),
    ("-0.1", TWO, f"{NUMBERS} '-0.1'"),
    ("nan", TWO, f"{NUMBERS} 'nan'"),
    ("half", TWO, f"{NUMBERS} 'half'"),
    ("0:2:1", TWO, f"{NUMBERS} '0:2:1'"),
    ("0:1", TWO, "expected a range START:STOP:STEP such as 0:1:0.1 that ends at STOP, got '0:1'"),
    ("0:1:0.3", TWO, "that ends at STOP, got '0:1:0.3'"),
    ("0:1:0", TWO, "that ends at STOP, got '0:1:0'"),
    ("1:0:0.1", TWO, "that ends at STOP, got '1:0:0.1'"),
    ("0:1:1/1000000000", TWO, "expected at most 1000 mixtures, got 1000000001 from"),
    ("grid:1e-9", THREE, "expected at most 1000 mixtures, got 500000001500000001 from 'grid:1e-9'"),
    ("grid:0.3", TWO, "a grid whose step is 1 over a whole number, such as grid:0.25, got 'grid:0.3'"),
    ("grid:0", TWO, "a grid whose step is 1 over a whole number"),
    ("grid:", TWO, f"{NUMBERS} 'grid:'"),
    ("natural=0.5,linf=0.4", TWO, "expected weights that sum to 1, got 0.9 for 'natural=0.5,linf=0.4'"),
    ("natural=0.5,l1=0.5", TWO, "expected LEARNER=WEIGHT with learners natural, linf, got 'l1=0.5'"),
    ("natural=0.5,0.5", TWO, "expected LEARNER=WEIGHT with learners natural, linf, got '0.5'"),
    ("natural=0.5,natural=0.5", TWO, "expected each learner once, got natural twice"),
    ("natural=2,linf=-1", TWO, f"{NUMBERS} 'natural=2'"),
    ("0.5", THREE, "expected points such as natural=1,linf=0,l2=0 or grid:0.25, because gamma is for one natural"),
    ("1", ("linf",), "expected a run of at least two base learners, this one has linf"),
]


@pytest.mark.parametrize(("text", "names", "says"), BAD_POINTS, ids=[text for text, _, _ in BAD_POINTS])
def test_bad_points_are_one_line(text, names, says):
    with pytest.raises(genray.errors.ConfigError) as caught:
        parse_mixtures(text, names, "linf" if names == TWO else None)
    (problem,) = caught.value.problems
    assert problem.startswith("--mixtures: ") and says in problem and "\n" not in problem


def test_every_bad_point_is_listed():
    with pytest.raises(genray.errors.ConfigError) as caught:
        parse_mixtures("2;natural=1;grid:0.3", TWO, "linf", "--save-mixture")
    assert [problem.split()[0] for problem in caught.value.problems] == ["--save-mixture:"] * 2


# --- weights -------------------------------------------------------------------------------------------------------


def random_states(names):
    draw = torch.Generator().manual_seed(3)
    shapes = {"conv.weight": (4, 2, 3, 3), "bn.running_var": (4,), "fc.bias": (5,), "bn.mean": ()}
    return {
        name: {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
        | {"bn.num_batches_tracked": torch.tensor(10 + number)}
        for number, name in enumerate(names)
    }


@pytest.mark.parametrize("point", ["natural=0.2,linf=0.5,l2=0.3", "natural=1/3,l2=2/3", "linf=0.9,l2=0.1"])
def test_a_mixture_is_the_weighted_sum_of_every_number(point):
    states = random_states(THREE)
    (mixture,) = parse_mixtures(point, THREE, None)
    found = mix(states, mixture, "linf")
    slow = slow_mix(states, {name: float(weight) for name, weight in mixture.weights}, "linf")
    assert list(found) == list(slow)
    for key in slow:
        assert found[key].dtype == slow[key].dtype
        torch.testing.assert_close(found[key], slow[key], rtol=1e-7, atol=1e-7)
    assert found["bn.num_batches_tracked"] == 11


def test_all_weight_on_one_learner_is_that_learner_bit_for_bit():
    states = random_states(TWO)
    states["linf"]["fc.bias"][0], states["natural"]["fc.bias"][1] = -0.0, float("inf")
    for name in TWO:
        found = mix(states, Mixture(tuple((other, Fraction(other == name)) for other in TWO)), "linf")
        for key, value in states[name].items():
            assert found[key].numpy().tobytes() == value.numpy().tobytes()
            assert found[key].data_ptr() != value.data_ptr()


def test_rounding_is_that_of_one_number():
    """Added up in float32, 1 + 2^-24 three times would stay 1."""
    ones = [torch.ones(1), torch.full((1,), 1 + 2**-23), torch.ones(1), torch.full((1,), 1 + 2**-23)]
    assert weighted_sum(ones, [0.1, 0.4, 0.1, 0.4]) == 1 + 2**-23


# --- the command ---------------------------------------------------------------------------------------------------


def by_name(results, split):
    return {row["name"]: row for row in results["splits"][split]["rows"]}


def test_the_ends_are_the_base_learners_and_between_them_is_the_mixture(trained_run, study, parts):
    states = {name: state_of(trained_run / "learners" / f"{name}.pt") for name in TWO}
    ends = {"gamma 0 = base learner natural": "natural", "gamma 1 = base learner linf": "linf"}
    for split, number in (("validation", 40), ("test", 40)):
        x, y = parts[split].images[:number], parts[split].labels[:number]
        rows = by_name(read(study), split)
        assert list(rows) == ["gamma 0 = base learner natural", "gamma 0.4", list(ends)[1], "theta_g (model.pt)"]
        middle = slow_mix(states, {"natural": 0.6, "linf": 0.4}, "linf")
        assert rows["gamma 0.4"]["natural"]["value"] == accuracy(middle, x, y)
        assert rows["gamma 0.4"]["weights"] == {"natural": "0.6", "linf": "0.4"}
        for row, name in ends.items():
            assert rows[row]["natural"]["value"] == accuracy(states[name], x, y)
            model = genray.load_model(trained_run / "learners" / f"{name}.pt")
            alone = genray.evaluate(model, x, y, attacks="pgd20", epsilon=0.1, block_size=20)
            assert rows[row]["robust"]["value"] == alone["norms"]["linf"]["columns"]["pgd20"]["value"]
        assert rows["theta_g (model.pt)"]["natural"]["value"] == accuracy(state_of(trained_run / "model.pt"), x, y)


def test_the_learners_files_are_the_models_of_the_runs_own_table(trained_run, parts):
    results = json.loads((trained_run / "results.json").read_text())
    for name in TWO:
        state = state_of(trained_run / "learners" / f"{name}.pt")
        assert accuracy(state, parts["test"].images, parts["test"].labels) == pytest.approx(
            results["models"][name]["natural"]["value"]
        )


def test_the_choice_is_of_the_validation_images_and_printed_so(study):
    results = read(study)
    rows = [row for row in results["splits"]["validation"]["rows"] if row["kind"] == "mixture"]
    sums = {row["name"]: row["natural"]["value"] + row["robust"]["value"] for row in rows}
    assert sums[results["chosen"]] == pytest.approx(max(sums.values()))
    for split in ("validation", "test"):
        table = mixture_table(results, split)
        assert table.title == f"digits: 40 {split} images of digits, linf 0.1 (0.1); BatchNorm statistics mixed"
        assert [name for name, marks in (row.labels for row in table.rows) if "*" in marks] == [results["chosen"]]
        assert "\n*: largest natural + robust accuracy on the validation images" in as_text(table, notes=True)


@pytest.mark.parametrize(("attacks", "noted"), [(["pgd20"], True), (["pgd20", "square"], False), (["own:Mine"], False)])
def test_a_curve_by_gradients_alone_says_so(study, attacks, noted):
    results = read(study)
    for row in results["splits"]["test"]["rows"]:
        row["columns"] = {"linf": dict.fromkeys(attacks, row["natural"])}
    assert ("mixtures can hide gradients" in as_text(mixture_table(results, "test"), notes=True)) == noted


def test_csv_holds_every_number(study):
    results = read(study)
    for split in ("validation", "test"):
        lines, rows = list(csv.DictReader((study / f"curve_{split}.csv").open())), by_name(results, split)
        assert [line["model"] for line in lines] == list(rows) and len(lines) == 4
        for line in lines:
            row = rows[line["model"]]
            for head, found in (("NAT", row["natural"]), ("PGD20", row["columns"]["linf"]["pgd20"])):
                written = line[head], line[f"{head}_low"], line[f"{head}_high"]
                assert written == (f"{100 * found['value']:.2f}", *(f"{100 * found[k]:.1f}" for k in ("low", "high")))
            assert ("P" in line["marks"], "*" in line["marks"]) == (
                row.get("pareto", False),
                row["name"] == results["chosen"],
            )


def test_the_saved_model_is_the_row_of_the_table(study, parts, tmp_path, capsys):
    file = study / "natural=0.6,linf=0.4.pt"
    rows = by_name(read(study), "test")
    model = genray.load_model(file)
    with torch.no_grad():
        right = model(parts["test"].images[:40].float() / 255).argmax(1) == parts["test"].labels[:40]
    assert float(right.double().mean()) == rows["gamma 0.4"]["natural"]["value"]
    line = [file, "--data", "digits", "--epsilon", "0.1", *QUICK, "--output", tmp_path / "again"]
    assert command(*line) == 0
    record = json.loads((tmp_path / "again" / "results.json").read_text())
    assert record["norms"]["linf"]["columns"]["pgd20"]["value"] == rows["gamma 0.4"]["robust"]["value"]
    metadata = torch.load(file, weights_only=True)["metadata"]
    assert metadata["mixture"] == {"natural": "0.6", "linf": "0.4"} and metadata["batch_norm"] == "mix"


FILES = ("results.json", "curve_test.csv", "curve_test_against.png", "curve_test_over_gamma.svg")


def test_resume_does_no_block_twice_and_gives_the_same_bytes(trained_run, study, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(study, out)
    lost = [out / "test" / "theta_g" / "blocks", out / "validation" / "natural=0.6,linf=0.4" / "blocks"]
    (lost[0] / "linf-pgd20-000001.json").unlink()
    (lost[1] / "none-natural-000000.json").unlink()
    for folder in lost:
        (folder.parent / "results.json").unlink()
    for name in FILES:
        (out / name).unlink()
    done = []

    def counted(task, *args):
        done.append(task.key)
        return run_task(task, *args)

    monkeypatch.setattr("genray.evaluation.job.run_task", counted)
    line = [trained_run, "--mixtures", "0,0.4,1", *QUICK, "--output", out]
    assert command(*line, "--resume") == 0
    assert sorted(done) == ["linf-pgd20-000001", "none-natural-000000"]
    assert capsys.readouterr().err.splitlines() == [
        "1/2: gamma 0.4, validation images",
        "2/2: theta_g (model.pt), test images",
    ]
    assert [(out / name).read_bytes() for name in FILES] == [(study / name).read_bytes() for name in FILES]

    assert command(*line) == 2
    assert "this evaluation is there; --resume goes on with it" in capsys.readouterr().err
    assert command(*line, "--resume", "--batch-norm", "reestimate") == 2
    assert "cannot resume another evaluation: model not what it was" in capsys.readouterr().err


def test_another_point_is_added_to_those_that_are_there(trained_run, study, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(study, out)
    assert command(trained_run, "--mixtures", "0.4,0.7", *QUICK, "--output", out, "--resume", "--split", "test") == 0
    results, captured = read(out), capsys.readouterr()
    assert captured.err.splitlines()[0] == "1/3: gamma 0.7, test images", "and the learners, which are no points now"
    assert list(by_name(results, "test")) == [
        "gamma 0.4", "gamma 0.7", "base learner natural", "base learner linf", "theta_g (model.pt)",
    ]  # fmt: skip
    assert results["chosen"] is None and "validation" not in results["splits"]
    assert "picked on test images; --split validation,test picks honestly" in captured.out


# --- BatchNorm -----------------------------------------------------------------------------------------------------


def test_reestimated_statistics_are_those_of_clean_training_images(trained_run, parts, tmp_path, capsys):
    """Slow: every BatchNorm layer's inputs, kept and averaged here."""
    line = [trained_run, "--save-mixture", "natural=0.6,linf=0.4", "--batch-norm", "reestimate"]
    assert command(*line, "--output", tmp_path / "out") == 0
    found = state_of(tmp_path / "out" / "natural=0.6,linf=0.4.pt")
    states = {name: state_of(trained_run / "learners" / f"{name}.pt") for name in TWO}
    mixed = slow_mix(states, {"natural": 0.6, "linf": 0.4}, "linf")
    config = genray.config.load_config(None, ["model.width=8"])
    batches = list(genray.evaluation.evaluator.clean_batches(config, parts["train"], "cpu"))
    assert len(batches) == min(config.global_learner.reestimate_batches, len(parts["train"]) // 64)
    known = {image.numpy().tobytes() for image in parts["train"].images}
    seen = [(image * 255).round().to(torch.uint8).numpy().tobytes() for batch in batches for image in batch]
    assert set(seen) <= known

    model = genray.load_model(trained_run)
    model.load_state_dict(mixed)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    inputs = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach().double()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    assert len(layers) >= 4
    for name in layers:
        flat = [x.transpose(0, 1).flatten(1).numpy() for x in inputs[name]]
        mean = np.mean([x.mean(1) for x in flat], 0)
        variance = np.mean([x.var(1, ddof=1) for x in flat], 0)
        np.testing.assert_allclose(found[f"{name}.running_mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{name}.running_var"], variance, rtol=1e-4)
        assert not np.allclose(mixed[f"{name}.running_var"], variance, rtol=1e-2)
    for key, value in mixed.items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


# --- more learners, older runs --------------------------------------------------------------------------------------

L2 = "base_learners.l2={objective: adversarial, lr: 0.05, averaging: {enabled: false}, "
L2 += "attack: {norm: l2, epsilon: 0.5, step_size: 0.2, num_steps: 2}}"
MIXED_THREE = ["global_learner.gamma=null", "global_learner.mixing_weights={natural: rest, linf: 0.4, l2: 0.3}"]


@pytest.fixture(scope="module")
def three_run(tmp_path_factory):
    storage = tmp_path_factory.mktemp("three")
    options = ["training.epochs=2", "training.batch_size=100", "data.test_examples=60", "data.validation_examples=0"]
    options += ["evaluation.select_on=test", "model.width=8", "name=three", "base_learners.linf.attack.num_steps=2"]
    with every_write_made():
        genray.train(None, [*options, L2, *MIXED_THREE], runtime="local", storage=str(storage))
    return storage / "three"


def test_three_learners_without_validation_images(three_run, parts, tmp_path, capsys):
    line = [three_run, "--mixtures", "grid:0.5", "--attacks", "pgd20,mim", "--norms", "linf,l2"]
    assert command(*line, "--examples", 30, "--output", tmp_path / "out") == 0
    results, out = read(tmp_path / "out"), capsys.readouterr().out
    assert list(results["splits"]) == ["test"] and results["gamma_of"] is None and results["chosen"] is None
    assert "NOTE: theta_g's epoch was chosen on the test images" in out
    states = {name: state_of(three_run / "learners" / f"{name}.pt") for name in THREE}
    points = [row for row in results["splits"]["test"]["rows"] if row["kind"] == "mixture"]
    assert len(points) == 6
    for row in points:
        mixed = slow_mix(states, {name: float(row["weights"][name]) for name in THREE}, "linf")
        assert row["natural"]["value"] == accuracy(mixed, parts["test"].images[:30], parts["test"].labels[:30])
        assert set(row["columns"]) == {"linf", "l2"} and set(row["columns"]["l2"]) == {"pgd20", "mim"}
        lowest = min(value["value"] for columns in row["columns"].values() for value in columns.values())
        assert row["robust"]["value"] <= lowest, "the union"
    assert "survives every attack in every norm" in out
    assert (tmp_path / "out" / "curve_test_against.svg").exists()


def test_a_run_without_learners_files_gives_those_of_its_checkpoint(three_run, tmp_path, capsys):
    """Averaged for two of them, the raw weights for the one that does not average."""
    old = tmp_path / "three"
    shutil.copytree(three_run, old)
    shutil.rmtree(old / "learners")
    for name in THREE:
        assert command(old, "--save-mixture", f"{name}=1", "--output", tmp_path / "out") == 0
        (file,) = (tmp_path / "out").glob(f"*{name}=1*")
        found, own = state_of(file), state_of(three_run / "learners" / f"{name}.pt")
        assert list(found) == list(own) and all(torch.equal(found[key], own[key]) for key in own)
    states = sorted((old / "checkpoints").iterdir())
    states[-1].unlink()
    assert command(old, "--mixtures", "l2=1", "--attacks", "pgd20", "--examples", 5, "--output", tmp_path / "half") == 0
    assert "the run has not ended: base learners of step 15 of 30\n" in capsys.readouterr().out
    shutil.rmtree(old / "checkpoints")
    assert command(old, "--mixtures", "l2=1", "--output", tmp_path / "none") == 2
    assert "expected base learners in learners/ or a checkpoint, there are none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_members_of_the_cascade_are_no_columns():
    def accuracy_of(correct):
        return {"value": correct / 10, "low": 0.0, "high": 1.0, "examples": 10, "per_class": {}}

    columns = {"pgd20": accuracy_of(7), "aa_apgd_ce": accuracy_of(8), "aa_square": accuracy_of(6), "aa": accuracy_of(6)}
    record = {"natural": accuracy_of(9), "findings": [], "norms": {"linf": {"columns": columns, "findings": ["weak"]}}}
    record["protocol"] = {"threats": [{"norm": "linf", "attacks": [{"name": "pgd20"}, {"name": "aa"}]}]}
    row = build_row(OperatingPoint("mixture", "a", "a", Mixture((("linf", Fraction(1)),))), record)
    assert {norm: list(by_name) for norm, by_name in row["columns"].items()} == {"linf": ["pgd20", "aa"]}
    assert row["robust"]["value"] == 0.6 and row["findings"] == ["weak"]


# --- Pareto ---------------------------------------------------------------------------------------------------------


def test_pareto_and_choice_against_every_pair():
    draw = random.Random(5)
    for _ in range(50):
        points = [(draw.randint(0, 5) / 10, draw.randint(0, 5) / 10) for _ in range(8)]
        rows = [
            {"kind": "mixture", "name": str(i), "natural": {"value": n}, "robust": {"value": r}}
            for i, (n, r) in enumerate(points)
        ]
        rows.append({"kind": "theta_g", "name": "t", "natural": {"value": 1.0}, "robust": {"value": 1.0}})
        mark_pareto(rows)
        for row, (n, r) in zip(rows, points):
            beaten = [(a, b) for a, b in points if (a > n and b >= r) or (a >= n and b > r)]
            assert row["pareto"] == (not beaten)
        assert "pareto" not in rows[-1]
        best = points[int(choose(rows))]
        assert sum(best) == pytest.approx(max(map(sum, points)))
        assert best[1] == max(r for n, r in points if n + r == pytest.approx(sum(best)))


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = [
    (["--mixtures", "2"], "error: --mixtures: expected numbers from 0 to 1, got '2'"),
    (["--mixtures", "l2=1"], "error: --mixtures: expected LEARNER=WEIGHT with learners natural, linf, got 'l2=1'"),
    (["--save-mixture", "0,1"], "error: --save-mixture: expected one mixture, got several in '0,1'"),
    (["--mixtures", "1", "--split", "train"], "error: --split: expected validation or test, or both with a comma, got"),
    (["--split", "test"], "genray.evaluate: error: --split: has no effect without --mixtures"),
    (["--batch-norm", "mix"], "genray.evaluate: error: --batch-norm: has no effect without --mixtures or"),
    (["--mixtures", "1", "--batch-norm", "none"], "genray.evaluate: error: argument --batch-norm: invalid choice"),
    (["--mixtures", "1", "--arch", "resnet18"], "error: --arch: has no effect on a run folder, whose model is known"),
    (["--mixtures", "1", "--attacks", "natural"], "error: --attacks: expected at least one attack beside natural"),
    (["--mixtures", "1", "--attacks", "pgd21"], "error: evaluation attack: expected one of pgd20"),
    (["--mixtures", "1", "--norms", "l3"], "error: norms[0]: expected one of linf, l2, l1, got 'l3'"),
    (["--mixtures", "1", "--epsilon", "l2=1"], "error: --epsilon: expected those of linf, got one of 'l2'"),
    (["--mixtures", "1", "--epsilon", "8"], "error: epsilon.linf: expected a number"),
    (["--mixtures", "1", "--engine", "mine"], "error: engine: expected one of genray"),
    (["--mixtures", "1", "--step-size", "0"], "error: step_size.linf: expected a number"),
    (["--mixtures", "1", "--examples", "121"], "error: --examples: expected 1 to 120"),
    (["--mixtures", "1", "--examples", "71", "--split", "validation"], "error: --examples: expected 1 to 70"),
    (["--mixtures", "1", "--data", "cifar10"], "error: --data: expected the run's own source digits with --mixtures"),
    (["--mixtures", "1", "--data", "digits:/x"], "error: data.path: expected nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "says"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(trained_run, tmp_path, capsys, argv, says):
    assert command(trained_run, *argv, "--output", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert err.startswith(says) and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists()


def test_a_model_file_has_no_learners(trained_run, tmp_path, capsys):
    assert command(trained_run / "model.pt", "--mixtures", "1", "--output", tmp_path / "out") == 2
    says = "error: --mixtures: expected a run folder, which holds the base learners, got the file "
    assert capsys.readouterr().err == f"{says}{trained_run}/model.pt\n"


def test_learners_of_different_steps_are_refused(trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    file = tmp_path / "run" / "learners" / "linf.pt"
    content = torch.load(file, weights_only=True)
    content["metadata"]["step"] -= 1
    torch.save(content, file)
    assert command(tmp_path / "run", "--save-mixture", "1") == 2
    assert "learners: expected models of one step, got " in capsys.readouterr().err
