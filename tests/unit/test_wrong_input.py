"""Wrong configurations, grids and records: one line each that says where, what was expected and what came; exit 2."""

import json
import re
import shutil

import pytest
from conftest import ROOT

from genray.cli import evaluate, report, train, tune
from genray.cli.parser import run_command

OLD = ROOT / "tests/data/old_run"
L, N = "base_learners.linf", "base_learners.natural"
KIND = r"(expected .+|unknown key( \(did you mean \w+\?\))?|missing.*|has no effect .+|.+ is not .+)"

# Field -> values that it refuses, each as an override.
FIELDS = {
    "training.epochs": "0|ten|1.5|true|null|",
    "training.batch_size": "-8|1:20|1_000|1e400|[]",
    "training": "3|[1]",
    "training.epoch": "3",
    "training.schedules_by": "minute",
    "trainig": "{epochs: 3}",
    "seed": "010|0x10|-1|1.0|.nan",
    "compute.compile": "yes|1",
    "compute.precision": "float32|tf16",
    "name": "../evil|''|a b",
    "device": "tpu",
    "model.width": "0",
    "model.mean": "3",
    "data.source": "",
    "data.path": "/tmp",
    "data.label_column": "label",
    "data.image_size": "[8, 8]|[8]",
    "data.train_examples": "99999|1.5",
    "data.validation_examples": "5000|0",
    "evaluation": "[1, 2]",
    "evaluation.examples": "100000",
    "evaluation.select_on": "train",
    "evaluation.attack.epsilon": "8",
    "global_learner.gamma": "1.5|-0.1|[[0, 1], [2, 0]]",
    "global_learner.sync_every": "0",
    "global_learner.sync_unit": "epoch",
    "global_learner.warmup_epochs": "1000",
    "global_learner.decay": "1",
    "global_learner.zzz": "2",
    "checkpoint.keep": "0",
    "runtime.startup_timeout_s": "0",
    "base_learners": "{}",
    f"{L}.atack": "{norm: l2}",
    f"{L}.attack": "null",
    f"{L}.attacks": "{l2: {norm: l2, epsilon: 1, step_size: 1}}",
    f"{L}.attack.norm": "l3|Linf",
    f"{L}.attack.epsilon": "8|0|8/0|.nan|1 0|eight",
    f"{L}.attack.step_size": "-0.1|010|08/255",
    f"{L}.attack.num_steps": "0",
    f"{L}.attack.step_noise": "0.001",
    f"{L}.attack.sparsity": "1.5",
    f"{L}.attack.tau": "-1",
    f"{N}.attack": "{norm: linf, epsilon: 0.1, step_size: 0.1}",
    f"{N}.attacks": "{l2: {norm: l2, epsilon: 1, step_size: 1}}",
    f"{L}.objective.beta": "2",
    f"{L}.optimizer.beta1": "0.9",
    f"{L}.lr": "-0.1|null|fast|[[0, 0.1], [2, 0.1]]|[[0.5, 1], [0.2, 1]]|[]|[[0, 1], [0.5]]|[[0, 1e400], [1, 0]]",
    f"{L}.augmentation.crop_padding": "8",
    f"{L}.augmentation.cutout": "-1|2.5",
    f"{L}.awp": "3",
    f"{L}.averaging.decay": "1",
    f"{L}.resources.num_gpus": "1.5|all",
    f"{L}.resources.num_cpus": "0",
    f"{L}.resources.accelerator_type": "NVIDIA A100",
    f"{L}.resources.label_selector.zone": "in()",
}
# Overrides -> where the mistake is, where that is not the field that was set.
ELSEWHERE = {
    "device=cuda": "device",
    "model.name=resnet19": "model.name",
    "model.name=resnet_18": "model.name",
    "model.mean=[0.5]": "model.mean, model.std",
    "model.mean=[0.5,0.5]|model.std=[1,1]": "model.mean, model.std",
    "model.mean=[0.5,0.5]|model.std=[1]": "model.std",
    "model.name=resnet18|model.batch_norm=true": "model.batch_norm",
    "data.source=imagenet": "data.source",
    "data.source=parquet": "data.path",
    f"{L}.objective=trade": f"{L}.objective.name",
    f"{L}.objective=a.b::C": f"{L}.objective.name",
    f"{L}.objective={{name: nowhere.at:C, options: {{x: .nan}}}}": f"{L}.objective.options",
    f"{L}.attack.algorithm=nowhere:C|{L}.attack.tau=1": f"{L}.attack.tau",
    f"{L}.attack.options={{x: 1}}": f"{L}.attack.options",
    "model={name: nowhere:f, options: {x: .nan}}": "model.options",
    "data.source=arrays|data.path=folder": "data.path",
    "data.source=arrays|data.home=mapped": "data.home",
    f"{L}.objective=trades|{L}.attack.start=zero": f"{L}.attack.start",
    f"{L}.attack.tau=1|compute.compile=true": f"{L}.attack.tau",
    f"{L}.objective=anchor": f"{L}.objective.target",
    f"{L}.objective={{name: anchor, target: {{}}}}": f"{L}.objective.target.learner",
    f"{L}.objective={{name: anchor, target: {{learner: linf}}}}": f"{L}.objective.target.learner",
    f"{L}.objective={{name: anchor, target: {{learner: natural}}, temperature: 2}}": f"{L}.objective.temperature",
    f"{L}.objective={{name: anchor, target: {{learner: natural}}}}|{L}.attack.tau=1": f"{L}.attack.tau",
    f"{L}.starts_from=nobody|{L}.from_epoch=1": f"{L}.starts_from",
    f"{L}.starts_from=natural": f"{L}.from_epoch",
    f"{L}.from_epoch=1": f"{L}.from_epoch",
    f"{L}.until_epoch=31": f"{L}.until_epoch",
    f"{L}.starts_from=natural|{L}.from_epoch=30": f"{L}.from_epoch",
    f"{L}.objective={{name: mart, beta: -0.1}}": f"{L}.objective.beta",
    f"{L}.objective={{name: iat, alpha: 0}}": f"{L}.objective.alpha",
    f"{L}.optimizer.name=lion": f"{L}.optimizer.name",
    f"{L}.awp.gamma=-0.01": f"{L}.awp.gamma",
    f"{N}=null": "global_learner.gamma",
    "global_learner.gamma=null": "global_learner.mixing_weights",
    "global_learner.mixing_weights={linf: 1, natural: rest}": "global_learner.gamma",
    "base_learners.global={objective: natural, lr: 0.1}|global_learner.gamma=null|"
    "global_learner.mixing_weights={linf: 1, natural: 0, global: 0}": "base_learners.global",
    "training.epochs=[1": "training.epochs",
    "model.mean=[x]": "model.mean[0]",
    "seed.sub.key=3": "seed.sub.key",
    "training.epochs": "'training.epochs'",
    "=3": "'=3'",
    "": "''",
    f"seed=1{'0' * 5000}": "seed",
    "training..epochs=3": "'training..epochs=3'",
}
CONFIGS = [([f"{path}={value}"], path) for path, values in FIELDS.items() for value in values.split("|")]
CONFIGS += [(text.split("|"), path) for text, path in ELSEWHERE.items()]


def refused(capsys, main, parse_args, *argv):
    """The one line of a command that ends with exit code 2."""
    assert run_command(main, parse_args([str(arg) for arg in argv])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith("\n")
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(("overrides", "path"), CONFIGS, ids=[" ".join(o)[:60] for o, _ in CONFIGS])
def test_configurations(capsys, tmp_path, overrides, path):
    line = refused(
        capsys, train.main, train.parse_args, "--runtime", "local", "--storage", tmp_path / "runs", *overrides
    )
    assert re.fullmatch(rf"{re.escape(path)}: {KIND}", line), line
    assert not list(tmp_path.iterdir())


# The text of a grid file -> where the mistake is.
GRIDS = {
    "grid: {a.b: [1]}": "trial b-1_seed-0: a",
    "gird: {}": "gird",
    "grid: {}": "grid",
    "grid: {training.epochs: []}": "grid.training.epochs",
    "grid: {training.epochs: [x]}": "trial epochs-x_seed-0: training.epochs",
    "grid: [1]": "grid",
    "seeds: []": "seeds",
    "seeds: [-1]": "seeds[0]",
    "seeds: 3": "seeds",
    "metric: accuracy": "metric",
    "mode: best": "mode",
    "methods: {a: {b: 1}}": "methods.a.b",
    "methods: {a: [1]}": "methods.a",
    "uniform: {base_learners.linf.lr: [2, 1]}": "uniform.base_learners.linf.lr",
    "loguniform: {base_learners.linf.lr: [0, 1]}": "loguniform.base_learners.linf.lr",
    "samples: 3": "samples",
    "samples: true": "samples",
    "scheduler: pbt": "scheduler",
    "scheduler: {name: pb2}": "scheduler",
    "scheduler: hyperband": "scheduler.name",
    "scheduler: {name: asha, grace: 1}": "scheduler.grace",
    "scheduler: {name: asha, reduction_factor: 1}": "scheduler.reduction_factor",
    "scheduler: {name: asha, max_epochs: 3}": "scheduler.max_epochs",
    "scheduler: {name: asha, grace_period: 99}": "scheduler.grace_period",
    "scheduler: {name: asha, grace_period: 0}": "scheduler.grace_period",
    "search: bayes": "search",
    "search: random": "search",
    "search: optuna": "search",
    "{search: grid, choices: {seed: [1]}}": "search",
    "{search: optuna, choices: {seed: [1]}, grid: {training.batch_size: [8]}}": "search",
    "{search: optuna, choices: {training.epochs: [1]}, seeds: [1, 2]}": "search",
    "{search: optuna, choices: {training.epochs: [1, x]}}": "trial epochs-x_seed-0: training.epochs",
    "{search: optuna, choices: {training.epochs: []}}": "choices.training.epochs",
    "loggers: mlflow": "loggers",
    "loggers: [comet]": "loggers[0]",
    "loggers: {wandb: {api_key: abc}}": "loggers",
    "max_failures: -1": "max_failures",
    "evaluate: {attacks: [foo]}": "evaluate: evaluation attack",
    "evaluate: {attacks: aa}": "evaluate.attacks",
    "evaluate: {engine: foo}": "evaluate: engine",
    "evaluate: {norms: [l7]}": "evaluate: norms[0]",
    "evaluate: {examples: 0}": "evaluate.examples",
    "evaluate: {epsilon: {linf: -1}}": "evaluate: epsilon.linf",
    "evaluate: {epsilon: {linf: x}}": "evaluate.epsilon.linf",
    "name: a/b": "name",
}


@pytest.mark.parametrize("text", GRIDS)
def test_grids(capsys, tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    line = refused(capsys, tune.main, tune.parse_args, path, "--storage", tmp_path / "runs")
    assert re.fullmatch(rf"{re.escape(f'{path}: {GRIDS[text]}')}: {KIND}", line), line
    assert "abc" not in line.removeprefix(str(path)), "a secret"
    assert [*tmp_path.iterdir()] == [path]


# Options of an evaluation -> the line.
EVALUATIONS = {
    "--epsilon 2/255,2/255": "epsilon.linf: expected different radii, got 2/255 twice",
    "--epsilon 0.1,0.1000": "epsilon.linf: expected different radii, got 0.1 twice",
    "--epsilon 2/255,x": "epsilon.linf: expected .*'x'",
    "--epsilon 2/255,": "epsilon.linf: expected .*''",
    "--epsilon 2/255,8": "epsilon.linf: expected .*at most 1, got 8",
    "--epsilon linf=2/255,linf=8/255": "--epsilon: expected several radii as linf=2/255:8/255, got linf= twice",
    "--epsilon 0.1,0.2 --norms linf,l2": "--epsilon: expected norm=value for each of linf, l2, got .*",
    "--epsilon 0.1,0.2 --step-size 0.02": r"step_size.linf: expected none with several radii \(0.1, 0.2\): .*",
    "--step-size 0.02,0.03": "step_size.linf: expected .*",
    "--attacks transfer_from=": "evaluation attack transfer_from=: expected a run folder or a model file after =, .*",
    "--attacks transfers": r"evaluation attack: expected .*, got 'transfers' \(did you mean transfer\?\)",
    "--attacks transfer_from=/nowhere --examples 4": "/nowhere: no such file",
    "--attacks transfer --examples 4": ".*: expected base learners in learners/ for the column transfer, .*",
}


@pytest.mark.parametrize("options", EVALUATIONS)
def test_evaluations(capsys, tmp_path, options):
    run = shutil.copytree(OLD / "finished/digits", tmp_path / "run", ignore=shutil.ignore_patterns("learners"))
    before = sorted(path for path in tmp_path.rglob("*"))
    line = refused(capsys, evaluate.main, evaluate.parse_args, run, *options.split())
    assert re.fullmatch(EVALUATIONS[options], line), line
    assert sorted(path for path in tmp_path.rglob("*")) == before


# Folder and file -> (place in it, what stands there instead; where another one is named, that).
GONE, NAN, INF = object(), float("nan"), float("inf")
RECORDS = {
    ("run", "results.json"): [
        ("", [1]), ("models", 3), ("models.global.natural", GONE), ("models.global.natural.value", 1.5),
        ("models.linf.pgd2.low", NAN), ("models.global.pgd2.examples", True), ("models.global.pgd2.examples", 0),
        ("models.global.natural.high", 0.0, "models.global.natural.value"), ("protocol.epsilon", "1/0"),
        ("protocol.epsilon", "-8/255"), ("protocol.epsilon", 0.1), ("protocol.examples", "ten"), ("versions", [1]),
        ("protocol.attack", None), ("best_epoch", 1.0), ("wall_s", INF), ("seed", False),
    ],
    ("run", "metrics.jsonl"): [
        ("epoch", "1"), ("global.natural", -0.1), ("learners.linf.loss", "low"), ("mixing_weights.linf", INF),
        ("learners.linf.attack_seconds", NAN), ("learners.natural.waiting_seconds", GONE), ("redistributions", GONE),
        ("learners.linf.validation_pgd2", [1]), ("global", GONE), ("learners", []),
    ],
    ("evaluation", "results.json"): [
        ("natural", None), ("norms.linf.columns.pgd20", GONE), ("norms.linf.findings", "none"), ("protocol.hash", 7),
        ("protocol.threats", []), ("protocol.threats[0].attacks[0].num_steps", 1.5), ("protocol.data.examples", "40"),
        ("protocol.threats[0].epsilon_decimal", True), ("union", 0.5),
    ],
    ("evaluation", "request.json"): [("", None), ("model", GONE), ("protocol.seed", None)],
    ("mixtures", "results.json"): [
        ("batch_norm", "both"), ("chosen", 1), ("splits.test.rows", []), ("splits.test.rows[0].pareto", "yes"),
        ("splits.test.rows[0].weights.linf", "3/2"), ("splits.test.rows[1].weights", None),
        ("splits.test.rows[1].columns.linf.pgd20", GONE), ("gamma_of", "l2", "splits.validation.rows[0].weights.l2"),
    ],
    ("grid", "grid.json"): [
        ("trials", 3), ("trials.0_sync_every-1_seed-0.seed", "0"), ("trials.0_sync_every-1_seed-0.point", GONE),
        ("trials.0_sync_every-1_seed-0.config.data.source", 1),
    ],
}  # fmt: skip
FOLDERS = {name: f"finished/digits/{name}" for name in ("evaluation", "mixtures")} | {"run": "finished/digits"}
WRONG = [(*record, *case) for record, cases in RECORDS.items() for case in cases]


def put(content, place, value):
    """Plain data with another value in one place."""
    first, _, rest = place.replace("[", ".").replace("]", "").partition(".")
    if not place:
        return value
    content, key = content.copy(), int(first) if isinstance(content, list) else first
    if value is GONE and not rest:
        del content[key]
    else:
        content[key] = put(content[key] if rest else None, rest, value)
    return content


@pytest.mark.slow
def test_records(tmp_path, capsys):
    """Each in a folder of its own, and one intact run: a report of all leaves them out and says why."""
    ignored = shutil.ignore_patterns("evaluation", "mixtures")
    for number, (folder, name, place, value, *_) in enumerate(WRONG):
        file = shutil.copytree(OLD / FOLDERS.get(folder, folder), tmp_path / f"{number}", ignore=ignored) / name
        lines = file.read_text().splitlines() if name.endswith("l") else [file.read_text()]
        file.write_text("\n".join([json.dumps(put(json.loads(lines[0]), place, value)), *lines[1:]]))
    shutil.copytree(OLD / "finished/digits", tmp_path / "intact", ignore=ignored)
    line = [str(tmp_path), "--no-gallery", "--format", "csv", "--output", str(tmp_path / "report")]
    assert run_command(report.main, report.parse_args(line)) == 0
    notes = capsys.readouterr().err.splitlines()
    notes = [note for note in notes if "counted once" not in note]  # the same run again
    assert len(notes) == len(WRONG)
    for number, (_, name, place, value, *other) in enumerate(WRONG):
        (note,) = [note for note in notes if note.startswith(f"note: {tmp_path}/{number}: ")]
        where = re.escape(f"{(other or [place])[0]}: ".removeprefix(": "))
        assert re.search(rf"{name}.*: {where}{KIND}", note), (place, value, note)
