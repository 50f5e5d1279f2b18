"""`genray.report`: its numbers are those of the files, whatever else lies there; the page needs and runs nothing."""

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import types
from contextlib import redirect_stderr
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, described

import genray
from genray.attacks import ExampleDraw, GradientAttack
from genray.cli.parser import run_command
from genray.cli.report import main, parse_args
from genray.config import load_config, to_dict
from genray.data.splits import Split
from genray.errors import InputError, StorageError
from genray.evaluation.published import TABLES
from genray.recording.table import results_table
from genray.records import RunResults
from genray.reporting import gallery
from genray.reporting.build import build_report
from genray.reporting.comparison import comparison_table, comparisons
from genray.reporting.found import find
from genray.reporting.gallery import KINDS, Side, default_sides, examples_of, make_gallery, side_of
from genray.reporting.page import as_page
from genray.reporting.paper import paper_table
from genray.reporting.plots import heat_map
from genray.reporting.report import report_grid
from genray.reporting.run_plots import times
from genray.reporting.trials import read_trials
from genray.run.setup import prepare
from genray.tables import Cell, Table, TableRow, as_csv, as_latex, as_markdown
from genray.types import fraction_text

HOSTILE = "<script>alert('x')</script> $\\frac{a}{b_|`*"


# --- a folder with everything in it -----------------------------------------------------------------------------------


def accuracy(value, examples=200):
    return {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "examples": examples}


def write_run(folder, config, natural, robust, epochs=3, examples=200):
    """A finished run, written by hand: its numbers are the test's."""
    folder.mkdir(parents=True)
    versions = {"genray": "0", "torch": "1", "ray": None, "python": "3", "devices": ["cpu"]}
    (folder / "config.yaml").write_text(yaml.safe_dump({**to_dict(config), "versions": versions}))
    attack = config.evaluation.attack
    column = f"pgd{attack.num_steps}"
    model = {"natural": accuracy(natural, examples), column: accuracy(robust, examples)}
    epsilon = fraction_text(attack.epsilon)
    protocol = {"data": config.data.source, "norm": attack.norm, "epsilon": epsilon, "examples": examples,
                "epsilon_decimal": float(attack.epsilon), "attack": f"{column}: PGD", "step_size": "0.05",
                "selected_on": config.evaluation.select_on, "threat_model": f"linf {epsilon}"}  # fmt: skip
    results = {"models": {"global": model, "global_last": model}, "protocol": protocol, "best_epoch": 2, "wall_s": 1.0,
               "seed": config.seed, "versions": versions}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    names = list(config.base_learners)
    seconds = {"seconds": 10.0, "attack_seconds": 6.0, "averaging_seconds": 1.5, "transfer_seconds": 0.25,
               "waiting_seconds": 3.0}  # fmt: skip
    learner = {"loss": 1.0, "train_accuracy": 0.5, "learning_rate": 0.1, **seconds}
    records = [
        {"epoch": epoch, "step": epoch, "wall_s": 1.0, "redistributions": max(0, epoch - 1), "best_epoch": 2,
         "learners": dict.fromkeys(names, learner), "mixing_weights": dict.fromkeys(names, 1 / len(names)),
         "global": {"natural": natural, column: robust}}
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


GRID = {  # gamma, c -> natural and robust accuracy of seeds 0 and 1
    (0.2, 1): ((0.91, 0.51), (0.93, 0.52)), (0.2, 2): ((0.90, 0.55), (0.90, 0.57)),
    (0.7, 1): ((0.80, 0.60), (0.82, 0.64)), (0.7, 2): ((0.85, 0.40), (0.86, 0.42)),
}  # fmt: skip


def write_grid(folder, method="Generalist"):
    trials = {}
    for (gamma, c), of_seeds in GRID.items():
        for seed, numbers in enumerate(of_seeds):
            name = f"t{len(trials)}_{gamma}_{c}_{seed}"
            config = load_config(None, [f"name={name}", f"seed={seed}", f"global_learner.sync_every={c}",
                                        f"global_learner.gamma={gamma}"])  # fmt: skip
            write_run(folder / name, config, *numbers)
            point = {"global_learner.gamma": gamma, "global_learner.sync_every": c}
            trials[name] = {"name": name, "method": method, "point": point, "seed": seed, "config": to_dict(config)}
    (folder / "grid.json").write_text(json.dumps({"source": {}, "trials": trials}))


STUDY = {"0": (0.95, 0.20), "0.5": (0.90, 0.30), "0.7": (0.85, 0.30), "1": (0.80, 0.40)}  # gamma -> natural, PGD


def write_study(folder):
    """Operating points by hand; on the validation images gamma 0.5 was chosen. Of the four, 0.7 is beaten by 0.5."""
    rows = [
        {"kind": "mixture", "name": f"gamma {gamma}", "weights": {"natural": str(1 - float(gamma)), "linf": gamma},
         "natural": accuracy(natural), "columns": {"linf": {"pgd20": accuracy(robust)}}, "robust": accuracy(robust),
         "findings": [], "pareto": gamma != "0.7"}
        for gamma, (natural, robust) in STUDY.items()
    ]  # fmt: skip
    threat = {"norm": "linf", "epsilon": "0.1", "epsilon_decimal": 0.1, "attacks": []}
    protocol = {
        "data": {"source": "digits", "examples": 200},
        "threats": [threat],
        "seed": 0,
        "engine": "x",
        "hash": "y",
    }
    part = {"protocol": protocol, "rows": rows}
    record = {"run": "digits", "data": "digits", "learners": ["natural", "linf"], "gamma_of": "linf", "step": 1,
              "batch_norm": "mix", "norms": ["linf"], "chosen": "gamma 0.5", "theta_g_selected_on": "test",
              "splits": {"test": part}}  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(record))


# What other tests have put into the run that all of them share.
OTHERS = shutil.ignore_patterns("evaluation", "evaluations", "mixtures")


@pytest.fixture(scope="module")
def lab(trained_run, digits, tmp_path_factory):
    """A real run with two real evaluations, a grid, and things that are not right."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(trained_run, folder / "digits", ignore=OTHERS)
    model, (x, y) = genray.load_model(trained_run), digits
    for epsilon, where in (("0.1", "digits/evaluation"), ("0.05", "apart")):
        genray.evaluate(model, x[:60], y[:60], attacks="pgd20,mim", epsilon=epsilon, engine="genray",
                        output=str(folder / where), data={"source": "digits", "split": "test"})  # fmt: skip
    write_grid(folder / "grid", HOSTILE)
    write_study(folder / "digits" / "mixtures")
    wrong = folder / "wrong"
    write_run(wrong / "torn", load_config(None, ["name=torn", "seed=7"]), 0.5, 0.25)
    text = (wrong / "torn" / "results.json").read_text()
    (wrong / "torn" / "results.json").write_text(text[: len(text) // 2])
    write_run(wrong / "half", load_config(None, ["name=half", "seed=8"]), 0.5, 0.25)
    (wrong / "half" / "results.json").unlink()
    with (wrong / "half" / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 4, "st')
    for name, content in (("foreign", "services: {web: {image: nginx}}"), ("bomb", "a: &a [*a]"), ("bytes", "\0\xff")):
        (wrong / name).mkdir()
        (wrong / name / "config.yaml").write_text(content)
    (wrong / "void").mkdir()
    (wrong / "void" / "config.yaml").write_text("# nothing")
    (wrong / "nan").mkdir()
    (wrong / "nan" / "results.json").write_text('{"splits": {"test": {"rows": NaN}}}')
    (wrong / "begun" / "blocks").mkdir(parents=True)
    (wrong / "begun" / "request.json").write_text("{}")
    return folder


EVERYTHING = ["--gallery-images", "40", "--format", "html,md,csv,tex,png,svg"]


@pytest.fixture(scope="module")
def made(lab, tmp_path_factory):
    """The report of it, made by the command: (folder, what was said)."""
    output = tmp_path_factory.mktemp("made") / "report"
    with redirect_stderr(io.StringIO()) as said:
        assert run_command(main, parse_args([str(lab), "--output", str(output), *EVERYTHING])) == 0
    return output, said.getvalue()


VOID = {"meta", "img", "br", "path", "use", "rect", "stop", "image"}


class Page(HTMLParser):
    """Collects what the tests ask of a page, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.ids, self.links, self.text = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href", "srcset", "action")]
        if tag == "table":
            self.tables.append({"caption": "", "rows": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("th", "td"):
            self.tables[-1]["rows"][-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "br"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "caption" in self.open:
            self.tables[-1]["caption"] += data
        elif self.open and {"td", "th"} & set(self.open):
            self.tables[-1]["rows"][-1][-1] += " " + data

    def table(self, caption):
        (found,) = [table["rows"] for table in self.tables if caption in table["caption"]]
        return [[" ".join(cell.split()) for cell in row] for row in found]


@pytest.fixture(scope="module")
def page(made):
    return Page((made[0] / "index.html").read_text())


# --- numbers ----------------------------------------------------------------------------------------------------------


def as_printed(record):
    return f"{100 * record['value']:.2f} [{100 * record['low']:.1f}, {100 * record['high']:.1f}]"


def test_an_evaluation_is_shown_with_its_numbers_and_caveats(lab, page):
    record = json.loads((lab / "digits/evaluation/results.json").read_text())
    linf = record["norms"]["linf"]
    rows = page.table("SmallCNN, width 8 on digits, linf 0.1, 60 test images, genray.evaluate")
    assert rows[0] == ["model", "seeds", "NAT", "PGD20", "MIM", "union"]
    expected = record["natural"], linf["columns"]["pgd20"], linf["columns"]["mim"], linf["union"]
    assert rows[1] == ["digits", "1", *map(as_printed, expected)]
    text = " ".join("".join(page.text).split())
    assert f"protocol {record['protocol']['hash']}, engine genray, attack seed 0" in text
    assert "few test images (60, 120, 200)" in text


def test_an_evaluation_that_lies_apart_is_known_by_its_models_fingerprint(page):
    rows = page.table("linf 0.05, 60 test images, genray.evaluate")
    assert rows[1][:2] == ["digits", "1"]


def test_the_models_of_a_run(lab, page):
    models = json.loads((lab / "digits/results.json").read_text())["models"]
    rows = page.table("digits: all models on 120 test images")
    assert [row[1:] for row in rows[1:]] == [list(map(as_printed, model.values())) for model in models.values()]
    assert [row[0] for row in rows[2:]] == ["theta_g, last epoch", "base learner natural", "base learner linf"]


def test_a_table_of_one_norm_ends_in_its_own_union(trained_run, digits, tmp_path):
    """And one of several norms shows each of them, and the union of all."""
    shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    x, y = (part[:60] for part in digits)
    radii = {"linf": "0.02", "l2": "1", "l1": "4"}
    output = str(tmp_path / "run" / "evaluation")
    genray.evaluate(genray.load_model(trained_run), x, y, attacks="pgd20,apgd_ce", norms=list(radii), epsilon=radii,
                    engine="genray", output=output)  # fmt: skip
    flags = pq.read_table(f"{output}/results.parquet").to_pandas()
    of_norm = {n: flags[["natural", *(c for c in flags if c.startswith(n))]].all(axis=1) for n in radii}
    rates = {norm: f"{100 * alive.mean():.2f}" for norm, alive in of_norm.items()}
    everything = f"{100 * (of_norm['linf'] & of_norm['l2'] & of_norm['l1']).mean():.2f}"
    assert len({everything, rates["linf"], rates["l2"]}) == 3, "choose radii of different strength"
    made = [
        comparison for comparison in comparisons(find([str(tmp_path)])) if comparison.setting.how == "genray.evaluate"
    ]
    tables = {comparison.setting.norm: comparison_table(comparison, 1) for comparison in made}
    for norm, rate in rates.items():
        assert (tables[norm].heads[-1], tables[norm].rows[0].cells[-1].text) == ("union", rate)
    several = tables["several norms"]
    assert "linf 0.02, l2 1, l1 4" in several.title and several.heads == ("NAT", "linf", "l2", "l1", "union")
    assert [cell.text for cell in several.rows[0].cells[1:]] == [*rates.values(), everything]


@pytest.mark.slow
def test_a_run_in_several_norms_ends_in_a_table_of_each(tmp_path, capsys):
    """Against the gradient loop itself, with another norm's largest radius and `evaluation.attack`'s steps."""
    overrides = ["training.epochs=1", "data.test_examples=50", "data.validation_examples=70", "model.width=4",
                 "evaluation.attack.num_steps=3", "base_learners.linf.attack.epsilon=0.1",
                 "base_learners.a={objective: adversarial, lr: 0.1, attack: "
                 "{norm: l2, epsilon: 0.6, step_size: 0.2, num_steps: 1}}",
                 "base_learners.b={objective: max, lr: 0.1, attacks: "
                 "{small: {norm: l2, epsilon: 0.3, step_size: 0.3, num_steps: 1}, "
                 "l1: {algorithm: apgd, norm: l1, epsilon: 4, num_steps: 2}}}",
                 "global_learner.gamma=null",
                 "global_learner.mixing_weights={natural: 0.7, linf: 0.1, a: 0.1, b: 0.1}",
                 "global_learner.warmup_epochs=0"]  # fmt: skip
    results = genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    test, model = prepare(load_config(None, overrides)).splits["test"], genray.load_model(tmp_path / "digits")
    x, y = test.images.float() / 255, test.labels
    alive = natural = (model(x).argmax(1) == y).numpy()
    for name, attack in {
        "pgd3": GradientAttack("linf", 0.1, 0.05, 3),
        "pgd3_l2": GradientAttack("l2", 0.6, 0.2, 3),
        "pgd3_l1": GradientAttack("l1", 4.0, 1.0, 3),
    }.items():
        x_adv = x.clone()
        x_adv[natural] = attack(model, x[natural], y[natural], ExampleDraw(0, name, np.flatnonzero(natural).tolist()))
        right = natural & (model(x_adv).argmax(1) == y).numpy()
        assert results["models"]["global"][name]["value"] == right.mean()
        alive = alive & right
    assert described(RunResults, tmp_path / "digits/results.json")
    assert list(results["models"]["linf"]) == ["natural", "pgd3", "pgd3_l2", "pgd3_l1", "union"]
    assert results["models"]["global"]["union"]["value"] == alive.mean()
    head = results_table(results).splitlines()[0].split("  ")
    heads = ["model", "natural", "pgd3 linf 0.1 (0.1)", "pgd3 l2 0.6 (0.6)", "pgd3 l1 4 (4)", "union"]
    assert [text.strip() for text in head if text] == heads
    metrics = json.loads((tmp_path / "digits" / "metrics.jsonl").read_text())
    assert list(metrics["global"]) == ["natural", "pgd3"], "checkpoints are chosen as before"
    tables = {
        comparison.setting.norm: comparison_table(comparison, 1) for comparison in comparisons(find([str(tmp_path)]))
    }
    assert {norm: table.heads for norm, table in tables.items()} == {
        "linf": ("NAT", "PGD3"), "l2": ("NAT", "PGD3"), "l1": ("NAT", "PGD3"),
        "several norms": ("NAT", "linf", "l2", "l1", "union"),
    }  # fmt: skip
    assert tables["several norms"].rows[0].cells[-1].text == f"{100 * alive.mean():.2f}"


def test_a_table_that_is_wide_for_a_telephone_says_so(made):
    hints = {}
    for part in (made[0] / "index.html").read_text().split("<table>")[1:]:
        caption, rest = part.split("</caption>", 1)
        hints[re.sub("<.*?>", "", caption)] = rest.split("</table></div>")[1].startswith('<p class="hint">')
    assert hints["SmallCNN on digits, linf 0.2, 200 test images, at the end of training"] and hints["Grid grid"]
    assert not hints["SmallCNN, width 8 on digits, linf 0.1, 120 test images, at the end of training"]


def test_a_grid_has_mean_and_spread_over_seeds_and_the_best_marked(made, page):
    rows = page.table("SmallCNN on digits, linf 0.2, 200 test images, at the end of training")
    for row, ((gamma, c), numbers) in zip(rows[1:], GRID.items()):
        means = [f"{100 * statistics.mean(of):.2f} ± {100 * statistics.stdev(of):.2f}" for of in zip(*numbers)]
        assert row[0].endswith(f"gamma={gamma} sync_every={c}") and row[1:] == ["2", *means]
    markdown = (made[0] / "report.md").read_text()
    assert "| **92.00 ± 1.41** | 51.50 ± 0.71 |" in markdown and "| 81.00 ± 1.41 | **62.00 ± 2.83** |" in markdown
    assert "| <u>90.00 ± 0.00</u> | <u>56.00 ± 1.41</u> |" in markdown
    lines = list(csv.DictReader((made[0] / "tables/grid_grid.csv").open()))
    assert [(line["gamma"], line["sync_every"], line["NAT"], line["PGD20_std"]) for line in lines] == [
        ("0.2", "1", "92.00", "0.71"), ("0.2", "2", "90.00", "1.41"), ("0.7", "1", "81.00", "2.83"),
        ("0.7", "2", "85.50", "1.41"),
    ]  # fmt: skip


def test_a_heat_map_is_of_two_fields_and_says_which_vary_otherwise(lab, tmp_path):
    trials = read_trials(str(lab / "grid"))
    svg = heat_map(trials, "natural")["svg"].decode()
    assert [text for text in re.findall(r">([\d.]+)</text>", svg) if "." in text and len(text) == 4] == [
        "92.0", "90.0", "81.0", "85.5"
    ]  # fmt: skip
    shutil.copytree(lab / "grid", tmp_path / "one")
    record = json.loads((tmp_path / "one/grid.json").read_text())
    for trial in record["trials"].values():
        trial["point"]["global_learner.sync_every"] = 1
    (tmp_path / "one/grid.json").write_text(json.dumps(record))
    report = build_report(find([str(tmp_path / "one")]), None, "", True)
    assert "no heat map: it is of two fields, this grid varies global_learner.gamma" in as_page(report)


def test_the_split_of_time_is_the_sum_over_epochs(page):
    records = [{"learners": {"a": {"seconds": 10.0, "attack_seconds": 6.0, "averaging_seconds": 1.5,
                                   "transfer_seconds": 0.25, "waiting_seconds": 3.0}}}] * 3  # fmt: skip
    assert times(records) == {"a": {"attack": 18, "step": 7.5, "averaging": 4.5, "transfer": 0.75, "waiting": 9}}
    assert times([{"learners": {"a": {"seconds": 1.0}}}]) == {}, "an older run"
    rows = page.table("Seconds of each learner")
    assert ["grid grid", "linf", "144.0", "60.0", "36.0", "6.0", "72.0"] in rows, "8 trials of 3 epochs"


def test_operating_points_are_shown_with_what_was_chosen(made, page):
    rows = page.table("digits: 200 test images of digits, linf 0.1")
    assert [(row[0], row[1]) for row in rows[1:]] == [("gamma 0", "P"), ("gamma 0.5", "P*"), ("gamma 0.7", ""),
                                                     ("gamma 1", "P")]  # fmt: skip
    assert [row[2:] for row in rows[1:]] == [[as_printed(accuracy(v)) for v in both] for both in STUDY.values()]
    text = " ".join("".join(page.text).split())
    assert "digits: theta_g's epoch was chosen on the test images" in text, "a caution on top"
    svg = (made[0] / "plots/mixtures_1_test_against.svg").read_text()
    assert all(f">gamma {gamma}</text>" in svg for gamma in STUDY)


def test_accuracy_over_epsilon_joins_evaluations_of_one_model(made, page):
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    (label,) = [label for label in labels if "over the radius" in label]
    assert label.startswith("digits: accuracy over the radius of the linf ball on 60 test images")
    curves = re.findall(r'id="line2d_\d+">\s*<path d="([^"]*)" clip-path[^>]*stroke: #0072b2; stroke-width: 1.5',
                        (made[0] / "plots/epsilon_1.svg").read_text())  # fmt: skip
    (points,) = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", curve) for curve in curves]
    across, down = ([float(place[i]) for place in points] for i in (0, 1))
    assert len(points) == 3 and across[2] - across[0] == pytest.approx(2 * (across[1] - across[0])), "0, 0.05, 0.1"
    assert down == sorted(down), "a larger ball, a lower accuracy"


# --- published --------------------------------------------------------------------------------------------------------

PAPER = ROOT / "tests/data/paper"
NUMBERS = re.compile(r"-?\d+(\.\d+)?")


def transcript(name):
    """A table as it was copied from its document, with what our layout calls its columns."""
    rows = list(csv.DictReader((PAPER / f"{name}.csv").open()))
    return rows


def of_one(name, key, value):
    return [{k: v for k, v in row.items() if k != key} for row in transcript(name) if row[key] == value]


def norms_of(data):
    rows = of_one("multi_norm_msd_paper", "dataset", data)
    methods = [key for key in rows[0] if key != "metric"]
    heads = {"clean": "NAT"}
    return [{"method": m, **{heads.get(r["metric"], r["metric"]): r[m] for r in rows}} for m in methods]


def second_hand(data):
    rows = of_one("generalistpp_second_hand", "dataset", data)
    names = {"variant": "method", "arch": "network", "AA_Linf": "AA"}
    return [{names.get(k, k): v for k, v in row.items() if k != "paper_table"} for row in rows]


EXPECTED = {
    "cifar10_resnet18": transcript("cifar10_resnet18"),
    "cifar10_wrn32_10": transcript("cifar10_wrn32_10"),
    "cifar100_resnet18": transcript("cifar100_resnet18"),
    "mnist_resnet18": of_one("mnist_svhn_resnet18", "dataset", "MNIST"),
    "svhn_resnet18": of_one("mnist_svhn_resnet18", "dataset", "SVHN"),
    "cifar10_resnet18_cost": transcript("cost_resnet18"),
    "cifar10_resnet18_learning_rates": transcript("learning_rate_cifar10_resnet18"),
    "cifar10_generalistpp": second_hand("cifar10"),
    "cifar100_generalistpp": second_hand("cifar100"),
    "cifar10_msd": norms_of("cifar10"),
    "mnist_msd": norms_of("mnist"),
}


@pytest.mark.parametrize("published", TABLES, ids=lambda table: table.name)
def test_published_tables_in_our_layout_digit_for_digit(published):
    table, expected = paper_table(published), EXPECTED[published.name]
    assert list(csv.DictReader(io.StringIO(as_csv(table)))) == expected
    heads, _, *lines = as_markdown(table).splitlines()
    heads = heads.strip("| ").split(" | ")
    for line, row in zip(lines, expected, strict=True):
        cells = dict(zip(heads, line.strip("| ").split(" | ")))
        for head, cell in cells.items():
            plain = re.sub(r"\*\*|</?u>|\\", "", cell)
            spread = row.get(f"{head}_std")
            assert plain == (f"{row[head]} ± {spread}" if spread else row[head] or "-")
    latex = as_latex(table)
    assert latex.count("\\\\\n") == len(expected) + 1 and all(row["NAT"] in latex for row in expected)


def test_marks_of_a_published_table():
    """Of the slides' table: the best and second best of three columns, read off by eye."""
    (published,) = [table for table in TABLES if table.name == "cifar10_resnet18"]
    lines = {line.split(" | ")[0].strip("| "): line for line in as_markdown(paper_table(published)).splitlines()}
    assert "| **93.04** |" in lines["NT"] and "| <u>89.09</u> | <u>50.01</u> |" in lines["Generalist"]
    assert "| **54.25** |" in lines["TRADES (lambda=6)"] and lines["TRADES (lambda=6)"].endswith("| **48.20** |")
    assert lines["Generalist"].endswith("| **56.68** | <u>46.07</u> |")


def published_board(tmp_path, name, *changes, numbers=(0.8812, 0.4933), source="cifar10_resnet18_generalist"):
    for seed, shift in ((0, 0.0), (1, 0.01)):
        config = load_config(ROOT / f"configs/paper/{source}.yaml", [f"name={name}_{seed}", f"seed={seed}", *changes])
        write_run(tmp_path / name / str(seed), config, numbers[0] + shift, numbers[1] + shift, examples=10000)
    (comparison,) = comparisons(find([tmp_path / name]))
    return comparison_table(comparison, 1)


@pytest.mark.slow
def test_our_number_stands_beside_the_published_one_with_the_difference(tmp_path):
    table = published_board(tmp_path, "same", "data.source=cifar10", "data.path=null")
    rows = {row.labels[0]: [cell.number for cell in row.cells] for row in table.rows}
    assert rows["same"] == ["88.62 ± 0.71", "49.83 ± 0.71"]
    assert rows["same minus published Generalist"] == ["-0.47", "-0.18"], "of 89.09 and 50.01"
    assert rows["published Generalist"] == ["89.09", "50.01"] and rows["published NT"] == ["93.04", "0.00"]
    assert sum(label.startswith("published") for label in rows) == 9
    assert any("selected on the test set" in note for note in table.notes)
    found = find([tmp_path / "same"])
    figures = [block for s in build_report(found, None, "", True).sections for block in s.blocks]
    (caption,) = [figure.caption for figure in figures if getattr(figure, "name", "") == "scatter_1_pgd20"]
    assert "1 AT (beta=1)" in caption and caption.endswith("8 Generalist.") and " NT" not in caption


@pytest.mark.parametrize(
    "change",
    [
        "evaluation.attack.epsilon=4/255",
        "model.name=preact_resnet18",
        "base_learners.linf.attack.num_steps=7",
        "data.train_examples=500",
    ],
)
def test_nothing_is_compared_that_is_not_the_same(tmp_path, change):
    table = published_board(tmp_path, "other", "data.source=cifar10", "data.path=null", change)
    assert not [row for row in table.rows if "minus" in row.labels[0]]
    beside = [row for row in table.rows if row.kind == "published"]
    assert len(beside) == (0 if change.startswith(("evaluation", "model")) else 9), "of the same data, ball and network"


def test_seeds_count_once(tmp_path):
    for name in ("one", "copy"):
        write_run(tmp_path / name, load_config(None, [f"name={name}"]), 0.9, 0.5)
    found = find([tmp_path])
    again = find([tmp_path / "one", tmp_path, tmp_path])
    assert len(again.runs) == 2 and again.problems == [], "a folder counts once, however often it is named"
    (comparison,) = comparisons(found)
    assert [len(group.entries) for group in comparison.groups] == [1]
    assert [reason for _, reason in found.problems] == [
        f"same configuration and seed as {tmp_path}/copy: counted once"
    ]  # fmt: skip


def test_evaluations_side_by_side_are_one_row(trained_run, digits, tmp_path):
    """In the old place and in the new ones; a number that differs from one that is shown is said to be left out."""
    run, (x, y) = shutil.copytree(trained_run, tmp_path / "digits", ignore=OTHERS), digits
    asked = {"evaluation": {"attacks": "pgd20"}, "evaluations/mim-linf-1": {"attacks": "mim"}}
    asked["evaluations/pgd20-linf-2"] = {
        "attacks": "pgd20",
        "block_size": 7,
    }  # another seed for each example: other draws
    asked["evaluations/pgd20-linf-2"] |= {"seed": 1, "step_size": 0.001}
    records = {
        place: genray.evaluate(genray.load_model(run), x[:60], y[:60], epsilon=0.1, output=run / place,
                               data={"source": "digits", "split": "test"}, **options)
        for place, options in asked.items()
    }  # fmt: skip
    found = find([run])
    comparison = comparisons(found)[0]
    ((entry,),) = [group.entries for group in comparison.groups]
    first, second, third = (record["norms"]["linf"]["columns"] for record in records.values())
    assert entry.values == {"natural": records["evaluation"]["natural"], **first, **second}
    assert third["pgd20"] != first["pgd20"] and [path for path, _ in found.problems] == [
        f"{run}/evaluations/pgd20-linf-2"
    ]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_one_line_each_and_the_rest_is_made(lab, made, page):
    lines = made[1].splitlines()
    wrong = {line.split(": ")[1].rpartition("/")[2]: line for line in lines if "/wrong/" in line}
    assert len(lines) == sum("/wrong/" in line for line in lines) == 9
    assert "results.json is damaged" in wrong["torn"] and "its table is left out" in wrong["torn"]
    assert sum("half" in line for line in lines) == 2
    assert any("metrics.jsonl: line 4 is damaged" in line for line in lines)
    assert any("unfinished: 3 of 30 epochs; only its curves" in line for line in lines)
    for name in ("foreign", "bomb", "bytes"):
        assert "config.yaml is not of a genray run" in wrong[name]
    assert "config.yaml is not of a genray run: the file: expected key: value lines, got NoneType" in wrong["void"]
    assert "results.json is damaged or not of genray: run: missing" in wrong["nan"]
    assert "unfinished evaluation: 0 blocks are done" in wrong["begun"]
    text = " ".join("".join(page.text).split())
    assert all(" ".join(line.removeprefix("note: ").split()) in text for line in lines)


STRANGE = (None, "x", "", -1, 2, True, [], {}, [1], 1e300, float("nan"), float("inf"), "1/0", {"a": None}, HOSTILE)


def places(content, path=()):
    """Every place in plain data."""
    yield path
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def damaged(content, path, value):
    """The same with something else in one place, or with that place gone."""
    if not path:
        return value
    copy = content.copy()
    if len(path) == 1 and value is GONE:
        del copy[path[0]]
    else:
        copy[path[0]] = damaged(content[path[0]], path[1:], value)
    return copy


GONE = object()
FILES = ("digits/results.json", "digits/evaluation/results.json", "digits/mixtures/results.json", "grid/grid.json",
         "digits/metrics.jsonl", "digits/evaluation/request.json")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_whatever_stands_in_a_file_the_report_is_made(lab, tmp_path, name):
    """Each file with strange things in strange places: no error that is not a line, and a page every time."""
    folder = tmp_path / name.split("/")[0]
    ignored = shutil.ignore_patterns("checkpoints", "*.pt", "blocks", "tensorboard")
    shutil.copytree(lab / folder.name, folder, ignore=ignored)
    file, draw = tmp_path / name, random.Random(name)
    lines = file.read_text().splitlines()[:2] if name.endswith("l") else [file.read_text()]
    content = [json.loads(line) for line in lines]
    where = [place for place in places(content) if place]
    for place in draw.sample(where, min(30, len(where))):
        value = draw.choice((GONE, *STRANGE)) if len(place) > 1 else draw.choice(STRANGE)
        changed = damaged(content, place, value)
        file.write_text("\n".join(json.dumps(part) for part in changed))
        found = find([folder])
        page = as_page(build_report(found, None, "", False))
        Page(page)
        assert all(reason and "\n" not in reason for _, reason in found.problems), (place, value)


def test_nothing_usable_is_an_error_and_nothing_is_written(lab, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (lab / "wrong" / "foreign", tmp_path / "empty", tmp_path / "absent", ROOT / "README.md"):
        args = parse_args([str(folder), "--output", str(tmp_path / "out")])
        assert run_command(main, args) == 2 and not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(folder) in line


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_and_runs_nothing(page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "foreignobject"}
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    policy = [attrs.get("content") for tag, attrs in page.tags if attrs.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_can_be_read_without_eyes(page):
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    svgs = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(svgs) >= 8 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in svgs)
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert all(table["caption"] for table in page.tables)


def test_hostile_names_are_text(made, page):
    assert any(HOSTILE in row[0] for table in page.tables for row in table["rows"]), "escaped, and whole"
    markdown, latex = (made[0] / "report.md").read_text(), (made[0] / "tables/grid_grid.tex").read_text()
    assert "<script" not in markdown.replace("\\<script", "")
    assert r"\textbackslash{}frac\{a\}\{b\_|" in latex
    for line in latex.splitlines():
        assert line.startswith("%") or not re.search(r"(?<!\\)[$#](?!\\pm\$|\$)", line.replace(r"$\pm$", ""))
    assert as_csv(Table("t", "", ("a",), ("b",), (TableRow(("=1+1",), (Cell("1.00"),)),))) == "a,b\n'=1+1,1.00\n"


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(lab, made, tmp_path):
    """In another process, which hashes text differently."""
    environment = os.environ | {"PYTHONHASHSEED": "2", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "genray.report", str(lab), "--output", str(tmp_path / "again"), *EVERYTHING]
    subprocess.run(line, capture_output=True, check=True, timeout=600, env=environment)
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (made[0], tmp_path / "again")]
    assert files[0] == files[1] and len(files[0]) > 30
    for name in files[0]:
        first, second = (hashlib.sha256((f / name).read_bytes()).hexdigest() for f in (made[0], tmp_path / "again"))
        assert first == second, name


# --- files ------------------------------------------------------------------------------------------------------------


def quick(*args):
    main(parse_args([*map(str, args), "--no-gallery"]))


def test_only_a_report_is_overwritten(lab, tmp_path, capsys):
    output = tmp_path / "out"
    quick(lab / "grid", "--output", output, "--format", "html,csv")
    assert (output / "tables/table_1.csv").exists() and not list(output.rglob("*.tmp-*"))
    (output / "mine.txt").write_text("kept")
    for _ in range(2):
        quick(lab / "grid", "--output", output, "--format", "md")
    assert sorted(p.name for p in output.rglob("*") if p.is_file()) == ["mine.txt", "report.json", "report.md"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name, content in (("notes.txt", ""), ("report.json", "[]"), ("report.json", '{"kind": "x", "files": []}'),
                          ("report.json", '{"kind": "genray-report/1", "files": ["../notes"]}')):  # fmt: skip
        (foreign / name).write_text(content)
        with pytest.raises(InputError, match="--output .*: expected a new or empty folder or an earlier report"):
            quick(lab / "grid", "--output", foreign)
    with pytest.raises(InputError, match="--format: expected some of html, md, csv, tex, png, svg, got 'pdf'"):
        quick(lab / "grid", "--output", tmp_path / "new", "--format", "html,pdf")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("spoiled", ["report.md", "tables"])
def test_a_file_that_cannot_be_written_stops_no_other(lab, tmp_path, capsys, spoiled):
    output = tmp_path / "out"
    quick(lab / "grid", "--output", output, "--format", "html,md,csv")
    whole = {p.relative_to(output): p.read_bytes() for p in output.rglob("*") if p.is_file()}
    for place in output.iterdir():
        shutil.rmtree(place) if place.is_dir() else place.name != "report.json" and place.unlink()
    (output / "report.md" / "folder").mkdir(parents=True) if spoiled == "report.md" else (output / spoiled).touch()
    with pytest.raises(StorageError, match=rf"^not written: {spoiled}[^()]* \({output}/{spoiled}\S*: \S.*\)$"):
        quick(lab / "grid", "--output", output, "--format", "html,md,csv")
    there = {p.relative_to(output): p.read_bytes() for p in output.rglob("*") if p.is_file() and p.stat().st_size}
    assert there == {path: data for path, data in whole.items() if path.parts[0] != spoiled}


def test_a_grids_file_that_cannot_be_written_stops_no_other(lab, tmp_path):
    folder = tmp_path / "grid"
    shutil.copytree(lab / "grid", folder)
    (folder / "trials.csv" / "folder").mkdir(parents=True)
    trials, unwritten = report_grid(str(folder))
    assert len(trials.rows) == 8 and str(unwritten).startswith(f"not written: trials.csv ({folder}/trials.csv: ")
    assert "table.md" in {p.name for p in folder.iterdir() if p.is_file()}


def test_without_matplotlib_there_are_tables_and_a_page(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    quick(lab / "grid", "--output", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert "no plots: matplotlib is not installed; pip install 'genray[plot]'" in lines
    page = Page((tmp_path / "out/index.html").read_text())
    assert len(page.table("linf 0.2, 200 test images, at the end of training")) == 5
    assert not list(tmp_path.rglob("*.png")) and not [tag for tag, _ in page.tags if tag == "svg"]


# --- the gallery ------------------------------------------------------------------------------------------------------


def test_the_gallery_shows_what_the_models_say(lab, digits, monkeypatch):
    """Against the networks themselves; images, kinds and sizes of perturbations as they are promised."""
    runs = find([lab / "digits"]).runs
    first, second = default_sides(runs)
    assert (first, second) == (str(lab / "digits"), str(lab / "digits/learners/linf.pt"))

    class Silent:
        def phase(self, *args, **kwargs): ...
        def steps(self, done): ...

    drawn, draw = [], gallery.draw_examples
    monkeypatch.setattr(gallery, "draw_examples", lambda rows, attack: drawn.extend(rows) or draw(rows, attack))
    figure = make_gallery(first, second, 100, Silent())
    models = [genray.load_model(lab / "digits"), genray.load_model(lab / "digits/learners/linf.pt")]
    kinds = [kind for kind, _ in drawn]
    assert len(kinds) >= 8 and all(kinds.count(kind) <= 4 for kind in KINDS) and kinds == sorted(kinds, key=KINDS.index)
    assert figure.files["png"].startswith(b"\x89PNG") and "1: digits: theta_g; 2: digits: linf" in figure.caption
    svg = figure.files["svg"].decode()
    for kind, example in drawn:
        x, label = digits[0][example.index].float() / 255, str(int(digits[1][example.index]))
        assert torch.equal(example.image, x) and example.label == label
        assert f"label {label}" in svg and f"1: {example.clean[0]} → {example.under_attack[0]}" in svg
        delta = example.attacked - example.image
        assert delta.abs().max() <= 0.1 + 1e-6 and example.attacked.min() >= 0 and example.attacked.max() <= 1
        with torch.no_grad():
            said = [tuple(str(int(m(image[None]).argmax())) for m in models) for image in (x, example.attacked)]
        assert said == [example.clean, example.under_attack]
        right = [word == label for word in (*example.clean, *example.under_attack)]
        wanted = {"easy": [True] * 3, "first": [True, True, False, True], "second": [True, True, True, False]}
        assert right[:3] == wanted[kind] if kind == "easy" else kind == "hard" or right == wanted[kind]
        assert kind != "hard" or not all(right[:2])


class OnePixel(torch.nn.Module):
    """Two classes: 1 above a threshold. Attacked, an image is moved by `step`."""

    def __init__(self, threshold, step):
        super().__init__()
        self.threshold, self.step = torch.nn.Parameter(torch.tensor(threshold)), step

    def forward(self, x):
        score = x.flatten(1).mean(1, keepdim=True) - self.threshold
        return torch.cat([-score, score], 1)


def kinds_of(sides, pixels):
    """Kind -> indices of one-pixel images (in per cent), all of class 1."""
    images = torch.tensor(pixels, dtype=torch.float).mul(2.55).round().byte().reshape(-1, 1, 1, 1)
    test = Split(images, torch.ones(len(pixels), dtype=torch.int64))
    data, found = types.SimpleNamespace(test=test, class_names=("0", "1")), {kind: [] for kind in KINDS}
    for kind, example in examples_of(sides, data, range(len(pixels)), lambda network, x, y, draw: x + network.step):
        found[kind].append(example.index)
    return found


def test_kinds_of_images_by_hand():
    """The first model calls 1 what is above 40 and is attacked by -20, the second above 60 and by -5."""
    config = load_config(None, ["evaluation.attack.epsilon=0.2"])
    sides = [Side("a", OnePixel(0.40, -0.20), config), Side("b", OnePixel(0.60, -0.05), config)]
    found = kinds_of(sides, [95, 50, 30, 63, 58, 62, 90])
    assert found["easy"] == [0, 6], "95 and 90 stay above 40 and 60"
    assert found["hard"] == [1, 2, 4], "below 60 or 40 without any attack"
    assert found["first"] == [], "no image of the first's attack (43, 42) is above 60 for the second"
    assert found["second"] == [3, 5], "63 and 62 less 5 are below 60, and above 40, also less 20"
    assert kinds_of(sides[::-1], [95, 50, 30, 63, 58, 62, 90])["first"] == [3, 5]
    sides = [Side("a", OnePixel(0.50, -0.20), config), Side("b", OnePixel(0.60, -0.05), config)]
    assert kinds_of(sides, [68])["first"] == [], "68 less 20 fools the first, but the second too, though 63 does not"


def test_a_gallery_of_what_is_not_there(lab, tmp_path):
    for text, message in (
        (lab / "nothing", "expected a run folder or a model file in a run"),
        (lab / "digits/learners/l2.pt", "expected a run folder or a model file in a run"),
        (tmp_path, "expected a run folder or a model file in a run"),
    ):
        with pytest.raises(InputError, match=message):
            side_of(str(text))
