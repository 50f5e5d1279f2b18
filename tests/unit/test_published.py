"""Published rows beside our own numbers: the right row, digit for digit, and none where there is none."""

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


@pytest.mark.parametrize(
    ("config", "natural"),
    [
        ("cifar10_resnet18_generalist", 89.09),
        ("cifar10_resnet18_generalist_official", 89.09),
        ("cifar10_wrn32_10_generalist", 91.03),
        ("cifar100_resnet18_generalist", 62.97),
        ("mnist_resnet18_generalist", 99.24),
        ("svhn_resnet18_generalist", 94.11),
        ("cifar10_resnet18_nt", 93.04),
        ("cifar10_resnet18_at", 84.32),
    ],
)
def test_a_preset_finds_its_row(config, natural):
    config = load_config(ROOT / "configs" / f"{config}.yaml")
    assert row_of_run(config, "linf")["values"]["natural"] == natural
    assert row_of_run(config, "l2") is None


@pytest.mark.parametrize(
    "change",
    ["model.width=8", "data.train_examples=1000", "base_learners.linf.objective.beta=0.5", "model.name=wrn_28_10"],
)
def test_another_run_has_no_row(change):
    assert row_of_run(load_config(ROOT / "configs/cifar10_resnet18_generalist.yaml", [change]), "linf") is None
    assert row_of_run(load_config(), "linf") is None
