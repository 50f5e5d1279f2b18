"""Schedules, the warmed-up decay and the windows of a run, against numpy, published values and a slow recount."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genray.config import load_config
from genray.core.schedules import RedistributionRule, Window, ema_decay, piecewise_linear, plan_windows
from genray.run.plan import make_plan

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


# --- piecewise linear ------------------------------------------------------------------------------------------


@st.composite
def strict_knots(draw):
    positions = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True))
    values = draw(st.lists(st.floats(-10, 10), min_size=len(positions), max_size=len(positions)))
    return tuple((at / 1000, value) for at, value in zip(sorted(positions), values, strict=True))


@SETTINGS
@given(strict_knots(), st.floats(0, 1))
def test_piecewise_linear_equals_numpy(knots, position):
    positions, values = zip(*knots, strict=True)
    assert piecewise_linear(knots, position) == pytest.approx(np.interp(position, positions, values), abs=1e-9)


@SETTINGS
@given(strict_knots())
def test_at_a_knot_the_value_is_the_knots(knots):
    for position, value in knots:
        assert piecewise_linear(knots, position) == value


def test_jump_takes_the_later_value():
    knots = ((0.0, 1.0), (0.5, 1.0), (0.5, 3.0), (1.0, 4.0))
    assert piecewise_linear(knots, 0.5) == 3.0
    assert piecewise_linear(knots, 0.5 - 1e-12) == pytest.approx(1.0)
    assert piecewise_linear(knots, 0.75) == 3.5
    step = ((0.25, 1.0), (0.25, 2.0))
    assert [piecewise_linear(step, at) for at in (0.0, 0.24, 0.25, 1.0)] == [1.0, 1.0, 2.0, 2.0]


def test_constant_beyond_the_ends():
    knots = ((0.2, 5.0), (0.6, 1.0))
    assert [piecewise_linear(knots, at) for at in (0.0, 0.2, 0.6, 1.0)] == [5.0, 5.0, 1.0, 1.0]
    assert piecewise_linear(knots, 0.4) == pytest.approx(3.0, rel=1e-12)
    assert piecewise_linear(((0.0, 7.0),), 0.9) == 7.0


# --- decay -----------------------------------------------------------------------------------------------------


def test_published_decays():
    assert ema_decay(0, 0.999) == 0.1
    assert ema_decay(90, 0.999) == 0.91
    # (1 + s) / (10 + s) >= 0.999  <=>  s >= 8990: methods A1
    assert [ema_decay(s, 0.999) for s in (8989, 8990, 10**6)] == [pytest.approx(8990 / 8999, rel=1e-15), 0.999, 0.999]
    assert ema_decay(8989, 0.999) < 0.999
    assert ema_decay(5, 0.0) == 0.0


@SETTINGS
@given(st.integers(0, 10**7), st.floats(0, 0.9999))
def test_decay_never_falls_and_stays_under_its_limit(step, limit):
    assert 0 <= ema_decay(step, limit) <= ema_decay(step + 1, limit) <= limit


# --- the official schedule through a plan ------------------------------------------------------------------------

OFFICIAL = (
    "training.epochs=120",
    "training.batch_size=128",
    "training.schedules_by=epoch",
    "global_learner.gamma=[[0, 1], [1/3, 1], [2/3, 1], [1, 0.4]]",
    "global_learner.sync_unit=every_step_of_epoch",
    "global_learner.sync_every=5",
    "base_learners.linf.lr=[[0, 0.01], [1/3, 0.01], [2/3, 0.001], [1, 0.0001]]",
)
NUM_TRAIN, STEPS = 50_000, 391  # methods 0.6


@cache
def official_plan():
    return make_plan(load_config(overrides=OFFICIAL), NUM_TRAIN)


def test_schedules_by_step_are_read_at_the_fraction_of_steps():
    plan = make_plan(load_config(overrides=[*OFFICIAL, "training.schedules_by=step"]), NUM_TRAIN)
    total = 120 * STEPS
    for step in (0, 1, 2 * total // 3, 100 * STEPS, total - 1):
        expected = np.interp(step / total, [0, 1 / 3, 2 / 3, 1], [1, 1, 1, 0.4])
        assert plan.mixing_weight("linf", step) == pytest.approx(expected, abs=1e-12)
    assert plan.mixing_weight("linf", 80 * STEPS + 1) < 1.0 == plan.mixing_weight("linf", 80 * STEPS)


@SETTINGS
@given(st.integers(0, 120 * STEPS - 1))
def test_mixing_weights_sum_to_one_at_every_step(step):
    weights = [official_plan().mixing_weight(name, step) for name in ("natural", "linf")]
    assert sum(weights) == pytest.approx(1.0, abs=1e-12) and all(0 <= w <= 1 for w in weights)


@pytest.mark.parametrize(
    ("num_train", "batch_size", "drop_last", "expected"),
    [(50_000, 128, False, 391), (50_000, 128, True, 390), (256, 128, False, 2), (256, 128, True, 2), (5, 8, False, 1)],
)
def test_steps_per_epoch(num_train, batch_size, drop_last, expected):
    overrides = [f"training.batch_size={batch_size}", f"training.drop_last={str(drop_last).lower()}"]
    assert make_plan(load_config(overrides=overrides), num_train).steps_per_epoch == expected


# --- redistribution --------------------------------------------------------------------------------------------


def test_epoch_end_redistribution():
    rule = RedistributionRule(75, 5, "epoch_end")
    due = [s for s in range(1, 120 * 7 + 1) if rule.due(s, 7)]
    assert due == [e * 7 for e in range(75, 121, 5)]


def test_step_redistribution():
    """t >= t' and t mod c = 0, t counted in steps (slides' pseudo-code)."""
    rule = RedistributionRule(2.5, 4, "step")
    assert [s for s in range(1, 41) if rule.due(s, 10)] == [28, 32, 36, 40]  # t' = 25 steps
    assert [s for s in range(1, 11) if RedistributionRule(0, 1, "step").due(s, 10)] == list(range(1, 11))
    assert [s for s in range(1, 31) if RedistributionRule(1, 5, "step").due(s, 10)] == [10, 15, 20, 25, 30]


def test_fractional_warm_up_of_epoch_units():
    assert [s for s in range(1, 9) if RedistributionRule(2.5, 1, "epoch_end").due(s, 2)] == [6, 8]
    assert [s for s in range(1, 9) if RedistributionRule(3, 1, "every_step_of_epoch").due(s, 2)] == [5, 6, 7, 8]


def test_never():
    assert not any(RedistributionRule(0, 1, "never").due(s, 3) for s in range(1, 100))


def slow_due(unit, warmup, every, finished, steps_per_epoch):
    """The rules of methods A3 in the words they are written in."""
    epoch, last_of_epoch = -(-finished // steps_per_epoch), finished % steps_per_epoch == 0
    return {
        "never": False,
        "step": finished % every == 0 and finished >= warmup * steps_per_epoch,
        "epoch_end": last_of_epoch and epoch >= warmup and epoch % every == 0,
        "every_step_of_epoch": epoch >= warmup and epoch % every == 0,
    }[unit]


@SETTINGS
@given(
    epochs=st.integers(1, 8),
    steps=st.integers(1, 6),
    warmup=st.integers(0, 16).map(lambda n: n / 2),
    every=st.integers(1, 7),
    unit=st.sampled_from(["step", "epoch_end", "every_step_of_epoch", "never"]),
    evaluate_every=st.integers(1, 9),
    checkpoint_every=st.integers(1, 9),
)
def test_windows_tile_the_run(epochs, steps, warmup, every, unit, evaluate_every, checkpoint_every):
    rule = RedistributionRule(warmup, every, unit)
    windows = plan_windows(
        epochs=epochs,
        steps_per_epoch=steps,
        rule=rule,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
    )
    total = epochs * steps
    covered = [s for w in windows for s in range(w.start, w.stop)]
    assert covered == list(range(total))
    assert [w.index for w in windows] == list(range(len(windows)))
    ends = {w.stop: w for w in windows}
    for finished in range(1, total + 1):
        epoch_over = finished // steps if finished % steps == 0 else 0
        expected = (
            slow_due(unit, warmup, every, finished, steps),
            bool(epoch_over) and (epoch_over % evaluate_every == 0 or finished == total),
            bool(epoch_over) and (epoch_over % checkpoint_every == 0 or finished == total),
        )
        window = ends.get(finished)
        assert (window is not None) == any(expected)
        if window:
            assert (window.redistribute, window.evaluate, window.checkpoint) == expected
            assert window.hands_over and window.epoch == -(-finished // steps)
    assert windows[-1].evaluate and windows[-1].checkpoint


def test_hands_over():
    flags = {"redistribute": False, "evaluate": False, "checkpoint": False}
    assert not Window(0, 0, 1, 1, **flags).hands_over
    assert all(Window(0, 0, 1, 1, **flags | {name: True}).hands_over for name in flags)
