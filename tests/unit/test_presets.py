"""Every shipped preset loads, says how to run it, stands alone and marks where each of its facts is from."""

import csv
import re
from pathlib import Path

import pytest
import yaml
from presets import ALIASES, CONFIGS, PAPER, PRESETS, header, launch_line, load, overrides_in

from genray.config.load import load_config, read_yaml, to_yaml
from genray.config.objectives import OBJECTIVES, MsdObjective
from genray.config.optimizers import OPTIMIZERS
from genray.config.schema import AttackConfig, AwpConfig
from genray.evaluation.published import FOLDER

# Row of the papers' tables -> end of the preset's name.
ROWS = {
    "NT": "nt",
    "AT (beta=1)": "at",
    "AT (beta=1/2)": "at_half",
    "TRADES (lambda=6)": "trades_6",
    "TRADES (lambda=1)": "trades_1",
    "TRADES": "trades",
    "FAT": "fat",
    "IAT": "iat",
    "RST": "rst",
    "Generalist": "generalist",
}
# The CVPR paper's tables of accuracy; the others have numbers of other papers, or of cost and learning rates.
TABLES = ("cifar10_resnet18", "cifar10_wrn32_10", "cifar100_resnet18", "mnist_resnet18", "svhn_resnet18")
TABLE_ROWS = [
    (f"paper/{table}_{ROWS[row['method']]}.yaml", row)
    for table in TABLES
    for row in csv.DictReader((FOLDER / f"{table}.csv").read_text().splitlines())
]
# Of Generalist++, as another paper copies them (arXiv 2510.13361, tables I and II): natural, PGD-20, AutoAttack.
SECOND_HAND = {
    "paper/cifar10_resnet18_generalistpp_d_norm.yaml": ("86.94", "50.46", "46.24"),
    "paper/cifar100_resnet18_generalistpp_d_norm.yaml": ("60.90", "29.43", "24.23"),
    "paper/cifar100_wrn32_10_generalist.yaml": ("66.66", "26.86"),
    "paper/cifar100_wrn32_10_generalistpp_d_norm.yaml": ("64.85", "27.29"),
}
# Of the readme of the MSD code: clean, Linf, L2, L1, union.
MSD_PAPER = {
    "paper/cifar10_preact_resnet18_p_inf.yaml": ("83.3", "50.7", "57.3", "16.0", "15.6"),
    "paper/cifar10_preact_resnet18_p_2.yaml": ("90.2", "28.3", "61.6", "46.6", "27.5"),
    "paper/cifar10_preact_resnet18_p_1.yaml": ("73.3", "0.2", "0.0", "7.9", "0.0"),
    "paper/cifar10_preact_resnet18_max.yaml": ("81.0", "44.9", "61.7", "39.4", "34.9"),
    "paper/cifar10_preact_resnet18_avg.yaml": ("84.6", "42.5", "65.0", "54.0", "40.6"),
    "paper/cifar10_preact_resnet18_msd.yaml": ("81.7", "47.6", "64.3", "53.4", "46.1"),
    "paper/mnist_small_cnn_p_inf.yaml": ("99.1", "90.3", "13.6", "4.2", "3.7"),
    "paper/mnist_small_cnn_p_2.yaml": ("99.2", "0.4", "69.2", "43.4", "0.4"),
    "paper/mnist_small_cnn_p_1.yaml": ("99.3", "0.0", "38.5", "70.0", "0.0"),
    "paper/mnist_small_cnn_max.yaml": ("98.6", "51.0", "61.9", "52.6", "42.1"),
    "paper/mnist_small_cnn_avg.yaml": ("99.1", "65.2", "60.1", "39.2", "34.9"),
    "paper/mnist_small_cnn_msd.yaml": ("98.3", "62.7", "67.9", "65.0", "58.4"),
}
MARK = re.compile(r"\[([A-Za-z][A-Za-z+, -]*)\]")


def left_out(cls, raw):
    """Fields of a section that the YAML leaves to their defaults."""
    return [name for name in cls.model_fields if name not in raw and name != "name"]


def test_every_row_of_the_papers_tables_has_a_preset():
    assert len(TABLE_ROWS) == 3 * 9 + 2 * 3
    assert {name for name, _ in TABLE_ROWS} | set(SECOND_HAND) | set(MSD_PAPER) <= set(PAPER)


def test_the_name_in_the_readme_is_the_papers_preset():
    assert "cifar10_resnet18_generalist.yaml" in ALIASES
    for name in ALIASES:
        assert (CONFIGS / name).resolve() == CONFIGS / "paper" / Path(name).name


@pytest.mark.parametrize("name", PRESETS)
def test_header_examples_are_valid_overrides(name):
    launch, examples = overrides_in(launch_line(name)), [line for line in header(name) if overrides_in(line)]
    assert examples, f"{name}: expected an example override in its header"
    for line in examples:
        before = [] if line.startswith("python -m") else launch
        changed = load_config(CONFIGS / name, [*before, *overrides_in(line)])
        assert changed != load(name) or line == launch_line(name)


@pytest.mark.parametrize("name", PRESETS)
def test_loads_and_round_trips(name):
    config = load(name)
    text = to_yaml(config)
    again = load_config(yaml.safe_load(text))
    assert again == config and to_yaml(again) == text


@pytest.mark.parametrize("name", PRESETS)
def test_run_name_is_the_file_name(name):
    assert load(name).name == Path(name).stem


def quoted_figures(name):
    """The numbers of the header's line below "Published (...), per cent:", standard deviations left out."""
    text = "\n".join(header(name))
    assert text.count("\nPublished (") == 1
    row = text.split("\nPublished (")[1].split("per cent:\n")[1].split("\n")[0]
    return tuple(re.findall(r"(?<!\+- )(?<!epsilon )\b\d+\.\d+", row))


@pytest.mark.parametrize(("name", "row"), TABLE_ROWS)
def test_header_quotes_the_published_row(name, row):
    assert quoted_figures(name) == (row["NAT"], row["PGD20"], row["AA"])


@pytest.mark.parametrize(("name", "figures"), (SECOND_HAND | MSD_PAPER).items())
def test_header_quotes_the_other_papers_figures(name, figures):
    assert quoted_figures(name) == figures


@pytest.mark.parametrize("name", PAPER)
def test_stands_alone(name):
    """A published constant is in the file itself, so that a changed default cannot change the preset."""
    raw = read_yaml(CONFIGS / name)
    assert {"seed", "data", "model", "training", "base_learners", "global_learner", "evaluation"} <= set(raw)
    assert {"epochs", "batch_size", "drop_last", "schedules_by"} <= set(raw["training"])
    assert {"source", "validation_examples"} <= set(raw["data"])
    if "extra" in raw["data"]:
        assert set(raw["data"]["extra"]) == {"source", "path", "batch_share"} and "train_examples" in raw["data"]
    several = len(raw["base_learners"]) > 1
    for learner in raw["base_learners"].values():
        _learner_stands_alone(learner, several)
    mixing = {"mix", "decay", "sync_unit"}
    if several:
        weights = {"gamma", "mixing_weights"} & set(raw["global_learner"])
        assert len(weights) == 1
        mixing |= {"warmup_epochs", "sync_every", "batch_norm", *weights}
    assert set(raw["global_learner"]) == mixing
    assert set(raw["evaluation"]) == {"attack", "every_epochs", "select_on", "natural_floor"}
    assert set(raw["evaluation"]["attack"]) == {"norm", "epsilon", "step_size", "num_steps"}


def _learner_stands_alone(learner, several):
    kind = OBJECTIVES[learner["objective"]["name"]]
    assert left_out(kind, learner["objective"]) == []
    assert left_out(OPTIMIZERS[learner["optimizer"]["name"]], learner["optimizer"]) == []
    assert set(learner["averaging"]) == {"enabled", "decay"}
    assert {"crop_padding", "flip"} <= set(learner["augmentation"])
    assert "pad_mode" in learner["augmentation"] or learner["augmentation"]["crop_padding"] == 0
    assert "lr" in learner
    assert "data_order" in learner or not several
    if "awp" in learner:
        assert left_out(AwpConfig, learner["awp"]) == []
    attacks = learner.get("attacks", {}) | ({"": learner["attack"]} if "attack" in learner else {})
    for attack in attacks.values():
        adaptive = attack.get("algorithm") == "apgd"
        assert set(left_out(AttackConfig, attack)) <= {"algorithm", "sparsity", "tau", "step_noise"} | (
            {"step_size"} if adaptive else set()
        )
        assert ("sparsity" in attack) == (attack["norm"] == "l1" and kind is not MsdObjective)
        assert ("tau" in attack) == ("step_noise" in attack)


@pytest.mark.parametrize("name", PAPER)
def test_every_fact_says_where_it_is_from(name):
    """Each value carries a mark, and the header says what the marks mean."""
    text = (CONFIGS / name).read_text(encoding="utf-8")
    explained = set(re.findall(MARK.pattern + ":", "\n".join(header(name))))
    body = text[text.index("\nname:") + 1 :].splitlines()
    valued = [line for line in body if re.match(r" *\w+: *[^ #]", line) and not line.startswith("name:")]
    unmarked = [line for line in valued if not MARK.search(line.partition("#")[2])]
    assert [line.split(":")[0].strip() for line in unmarked] in ([], ["sync_unit"])  # of one learner: nothing to choose
    used = {mark for line in body for marks in MARK.findall(line.partition("#")[2]) for mark in marks.split(", ")}
    assert used <= explained
