"""Published rows beside our own numbers: the right row, digit for digit, and none where there is none."""

from fractions import Fraction

import pytest
from conftest import ROOT

from genray.config import load_config
from genray.evaluation.published import published_row, row_of_run


def test_rows_digit_for_digit():
    """Against figures copied here from the slides and the appendix."""
    assert published_row("cifar10_resnet18", "Generalist")["values"] == {
        "natural": 89.09, "pgd20": 50.01, "pgd100": 50.00, "mim": 52.19, "cw": 50.04, "apgd_ce": 46.53,
        "apgd_dlr": 48.70, "apgd_t": 46.37, "fab_t": 47.32, "square": 56.68, "aa": 46.07,
    }  # fmt: skip
    assert published_row("cifar10_wrn32_10", "TRADES (lambda=6)")["values"]["aa"] == 52.19
    assert published_row("cifar100_resnet18", "AT (beta=1)")["values"]["apgd_t"] == 21.98
    assert published_row("mnist_resnet18", "FAT")["values"] == {"natural": 99.18, "pgd20": 93.54, "aa": 90.04}
    assert published_row("svhn_resnet18", "Generalist")["values"] == {"natural": 94.11, "pgd20": 55.29, "aa": 45.41}


def beside(config, norm="linf", epsilon=None):
    """The published row, for an evaluation within the run's own radius where none is given."""
    return row_of_run(config, norm, config.evaluation.attack.epsilon if epsilon is None else epsilon)


# End of the preset's name -> the row of the papers' tables.
ROWS = {
    "nt": "NT",
    "at": "AT (beta=1)",
    "at_half": "AT (beta=1/2)",
    "trades_6": "TRADES (lambda=6)",
    "trades_1": "TRADES (lambda=1)",
    "trades": "TRADES",
    "fat": "FAT",
    "iat": "IAT",
    "rst": "RST",
    "generalist": "Generalist",
    "generalist_official": "Generalist",
}
TABLES = ("cifar10_resnet18", "cifar10_wrn32_10", "cifar100_resnet18", "mnist_resnet18", "svhn_resnet18")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_finds_its_row_and_only_that(path):
    found = beside(load_config(path))
    table = next((table for table in TABLES if path.stem.startswith(f"{table}_")), "")
    row = ROWS.get(path.stem.removeprefix(f"{table}_"))
    if not table or row is None:
        assert found is None
    else:
        assert found == published_row(table, row) and found["row"] == f"published {row}"
    assert beside(load_config(path), "l2") is None
    assert beside(load_config(path), "linf", Fraction(4, 255)) is None, "evaluated within another radius"


ANOTHER_LEARNER = ["linf.attack.epsilon=4/255", "linf.attack.num_steps=7", "linf.attack.norm=l2"]
ANOTHER_LEARNER += ["linf.awp.gamma=0.01", "linf.augmentation.cutout=8", "linf.augmentation.policy=trivialaugment"]
ANOTHER_LEARNER += ["linf.attack.scale=[[0, 0], [1, 1]]", "linf.attack.radius_clip=[0.5, 1.5]"]
ANOTHER_RUN = [
    "model.activation=silu",
    "model.width=8",
    "model.name=wrn_28_10",
    "data.train_examples=1000",
    "data.test_examples=1000",
]
AVERAGED = ["global_learner.mix=averaged", "global_learner.decay=0.999"]


OTHERS = {  # preset -> changes after which the published row is not its
    "generalist": [*ANOTHER_RUN, "linf.objective.beta=0.5", "linf.objective={name: trades}", "linf.attack.tau=1",
                   "natural.objective.mixup=1", "natural.objective.label_smoothing=0.1",
                   "global_learner.sync_unit=never", *ANOTHER_LEARNER],
    "nt": ["natural.objective.label_smoothing=0.1"],
    "at": [*AVERAGED, *ANOTHER_LEARNER, "linf.objective.label_smoothing=0.1",
           "data.train_examples=25000", "data.extra={source: npz, path: images.npz}"],
    "at_half": ["linf.objective.beta=0.7"],
    "trades_1": AVERAGED,
    "trades_6": [*ANOTHER_LEARNER, "linf.objective.beta=3", "linf.attack.tau=1"],
    "iat": [*AVERAGED, "linf.objective.alpha=0.5"],
    "rst": [*ANOTHER_LEARNER, "linf.objective.natural_weight=0.5", "data.train_examples=null"],
    "fat": [*ANOTHER_LEARNER, "linf.attack.tau=10", "linf.objective.beta=0.5"],
}  # fmt: skip


@pytest.mark.parametrize(("preset", "change"), [(preset, change) for preset in OTHERS for change in OTHERS[preset]])
def test_another_run_has_no_row(preset, change):
    path = ROOT / f"configs/paper/cifar10_resnet18_{preset}.yaml"
    assert beside(load_config(path)) is not None
    if change.startswith(("linf.", "natural.")):
        change = f"base_learners.{change}"
    assert beside(load_config(path, [change])) is None


def test_a_change_of_lambda_finds_the_other_row():
    path = ROOT / "configs/paper/cifar10_resnet18_trades_6.yaml"
    row = beside(load_config(path, ["base_learners.linf.objective.beta=1"]))
    assert row == published_row("cifar10_resnet18", "TRADES (lambda=1)")


def test_other_data_have_no_row():
    assert beside(load_config()) is None
    assert beside(load_config(ROOT / "configs/cifar10_cpu.yaml", ["data.path=/data"])) is None
