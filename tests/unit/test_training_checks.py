"""What makes a run suspect while it is on: said once, kept in its records, and the run goes on."""

import json
import math
import re
from fractions import Fraction

import pytest
from conftest import ROOT, every_write_made

import genray
from genray.config import load_config
from genray.recording.training_checks import TrainingChecks
from genray.run.published_radii import PUBLISHED, kind_of, radius_warnings


def records(rates, losses=(1.0, 1.0), redistributed=True):
    """One a given robust accuracy; None for an epoch without an evaluation."""
    learners = {name: {"loss": loss} for name, loss in zip(("natural", "linf"), losses)}
    return [
        {
            "epoch": epoch,
            "learners": learners,
            "global": None if rate is None else {"natural": 0.9, "pgd20": rate},
            "redistributions": int(redistributed),
        }
        for epoch, rate in enumerate(rates, 1)
    ]


def said(found, epochs=20, examples=1000, is_robust=True, redistributes=True, classes=10):
    """All warnings of a run, epoch by epoch."""
    checks = TrainingChecks(epochs, classes, examples, is_robust, redistributes)
    return [line for end in range(1, len(found) + 1) for line in checks.warnings(found[:end])]


def test_robust_accuracy_that_halves_is_named_with_both_epochs():
    line = "epoch 4: the accuracy of theta_g under pgd20 fell to 20.0 % from 40.0 % (epoch 2)"
    assert said(records([0.3, 0.4, None, 0.2, 0.25])) == [line]
    assert said(records([0.3, 0.4, 0.21])) == []
    assert said(records([0.11, 0.05])) == [], "it was at chance before"


def test_robust_accuracy_at_chance_for_a_fifth_of_the_run_is_said_once():
    line = "epoch 4: the accuracy of theta_g under pgd20 has been that of guessing since epoch 1, 11.0 % of 10 classes"
    assert said(records([0.1, 0.115, 0.05, 0.11, 0.1, 0.1])) == [line]
    assert said(records([0.1, 0.115, 0.3, 0.3, 0.3, 0.3])) == []
    assert said(records([0.1, 0.115]), epochs=5) == [], "two evaluations are too few"
    # A recovery, then another stay: 0.3 to 0.1 is a fall by half too.
    again = said(records([0.1, 0.1, 0.3, 0.1, 0.1, 0.1]), epochs=15)
    assert [line.split(":")[0] for line in again] == ["epoch 4", "epoch 6"] and "since epoch 4" in again[1]


@pytest.mark.parametrize(("examples", "warns"), [(100, True), (10_000, False)])
def test_the_margin_is_two_standard_errors_of_the_evaluation(examples, warns):
    """0.1 + 2 sqrt(0.1 * 0.9 / n): 0.16 of 100 images, 0.106 of 10,000."""
    assert bool(said(records([0.15] * 4), examples=examples)) == warns


def test_where_robust_accuracy_is_not_expected_nothing_is_said():
    assert said(records([0.4, 0.1, 0.1, 0.1, 0.1]), is_robust=False) == []
    assert said(records([0.4, 0.1, 0.1, 0.1, 0.1], redistributed=False)) == []
    assert len(said(records([0.4, 0.1, 0.1, 0.1, 0.1], redistributed=False), redistributes=False)) == 2


def test_losses_of_guessing_are_said_once():
    guess = math.log(10)
    line = "epoch 1: the loss of natural and linf is that of guessing, ln 10 = 2.303"
    assert said(records([0.5, 0.5], losses=(guess * 1.009, guess * 0.991))) == [line]
    assert said(records([0.5, 0.5], losses=(guess, guess * 1.011))) == [], "one of them learns"


def test_a_run_that_learns_nothing_says_so_and_goes_on(small_run, tmp_path, capsys):
    """A new network of ours answers zeros, so at learning rate 0 its loss is ln 10 exactly."""
    change = [f"base_learners.{name}.lr=0" for name in ("natural", "linf")]
    change += ["training.epochs=5", "base_learners.linf.attack.epsilon=0.9", "evaluation.attack.num_steps=3"]
    with every_write_made():
        results = genray.train(None, [*small_run, *change], runtime="local", storage=str(tmp_path))
    radius, guessing, chance = results["warnings"]
    path = "base_learners.linf.attack.epsilon"
    assert radius == f"{path}: 0.9 in linf is above twice the published radius for 28x28 grey images, 0.3"
    assert guessing == "epoch 1: the loss of natural and linf is that of guessing, ln 10 = 2.303"
    assert chance.startswith("epoch 4: the accuracy of theta_g under pgd3 has been that of guessing since epoch 2")
    shown = capsys.readouterr().err
    assert all(shown.count(f"warning: {line}\n") == 1 for line in results["warnings"])
    epochs = [json.loads(line) for line in (tmp_path / "digits/metrics.jsonl").read_text().splitlines()]
    assert [record.get("warnings", []) for record in epochs] == [[guessing], [], [], [chance], []]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((1, 28, 28), "28x28 grey images"), ((3, 32, 32), "32x32 images"), ((3, 224, 224), "ImageNet")],
)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_radius_above_twice_the_published_one_is_named(shape, kind, norm):
    assert kind_of(shape) == kind
    radius = float(Fraction(PUBLISHED[kind][norm]))

    def found(factor):
        attack = {"norm": norm, "epsilon": factor * radius, "step_size": 0.1}
        config = load_config(None, {"base_learners.linf.attack": attack, "evaluation.attack": {"num_steps": 5}})
        return list(radius_warnings(config, shape))

    (line,) = found(2.01)
    published = f" in {norm} is above twice the published radius for {kind}, {PUBLISHED[kind][norm]}"
    assert line == f"base_learners.linf.attack.epsilon: {2.01 * radius!r}{published}"
    assert found(1.99) == []


def test_the_page_has_these_radii():
    rows = re.findall(r"^\| .* \(as \w+\) \| (.*) \|$", (ROOT / "docs/tracking.md").read_text(encoding="utf-8"), re.M)
    assert [row.split(" | ") for row in rows] == [list(radii.values()) for radii in PUBLISHED.values()]
