"""The time that is left: against evaluations whose true length is known, on a clock that the test turns."""

import io
import time
from fractions import Fraction

import numpy as np
import pytest

from genray.evaluation.estimate import TimeLeft, resisting_cost
from genray.evaluation.job import BlockResult, Request, Task
from genray.evaluation.task_queue import TaskQueue
from genray.recording import progress
from genray.types import ThreatModel

LINF, L2 = ThreatModel("linf", Fraction(1, 5)), ThreatModel("l2", Fraction(1))
# Forward passes that an example costs which resists, ours and 10 classes: 100 steps are 100 passes of 3, nine targets.
PRICE = {"natural": 0, "pgd20": 60, "aa_apgd_ce": 301, "aa_apgd_t": 2709, "aa_fab_t": 3601, "aa_square": 5002}


def test_the_cost_of_images_that_all_resist():
    once = sum(PRICE[f"aa_{member}"] for member in ("apgd_ce", "apgd_t", "fab_t", "square"))
    assert resisting_cost(Request((LINF,), ("aa",), {}), 7, 10) == pytest.approx(7 * (1 + once), rel=0.002)
    assert resisting_cost(Request((LINF,), ("pgd20",), {}), 7, 10) == 7 * (1 + 61)
    both = resisting_cost(Request((LINF, L2), ("pgd20", "aa"), {}), 7, 10)
    assert both == pytest.approx(7 * (1 + 2 * (61 + once)), rel=0.002)


def simulated(request, examples, *, survive, second, fallen, slower, rng):
    """(task, result) of an evaluation that behaves as told, with the true seconds of each task.

    Args:
        survive: attack -> share of the examples that it leaves.
        second: of a forward pass of an example.
        fallen: share of its cost that an example takes that falls.
        slower: attack -> how many times longer its passes take.
    """
    alive = {"natural": rng.random(examples) < survive["natural"]}
    todo = TaskQueue(request, examples)
    while batch := todo.take():
        for task in batch:
            at = np.array(task.examples or range(examples)[task.block * request.block_size :][: request.block_size])
            attacked = alive["natural"][at] if task.attack != "natural" else np.ones(len(at), dtype=bool)
            left = attacked & (rng.random(len(at)) < survive[task.attack])
            left = alive["natural"][at] if task.attack == "natural" else left
            passes = PRICE[task.attack] * (left.sum() + (attacked.sum() - left.sum()) * fallen) + len(at)
            result = BlockResult({task.attack: left}, seconds=second * passes * slower.get(task.attack, 1.0))
            todo.finish(task, result)
            yield task, result


NETWORKS = {
    "robust": {"survive": {"natural": 0.99, "aa_apgd_ce": 0.66, "aa_apgd_t": 0.95}, "fallen": 0.1},
    "weak": {"survive": {"natural": 0.8, "aa_apgd_ce": 0.25, "aa_apgd_t": 0.8}, "fallen": 0.3},
    "slow": {"survive": {"natural": 0.9, "aa_apgd_ce": 0.6}, "fallen": 0.2, "second": 5e-3},
    "steps of FAB and Square slower": {
        "survive": {"natural": 0.9, "aa_apgd_ce": 0.6}, "fallen": 0.2, "slower": {"aa_fab_t": 1.2, "aa_square": 1.2}},
}  # fmt: skip


@pytest.mark.parametrize("attacks", [("aa",), ("pgd20", "aa")])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_estimate_is_right_within_30_per_cent_once_3_per_cent_are_done(network, attacks):
    how = {"second": 1e-3, "slower": {}} | NETWORKS[network]
    how["survive"] = {"pgd20": 0.7, "aa_apgd_t": 0.95, "aa_fab_t": 1.0, "aa_square": 0.99} | how["survive"]
    request, now = Request((LINF,), attacks, {}), [0.0]
    work = list(simulated(request, 1000, **how, rng=np.random.default_rng(0)))
    whole, left = sum(result.seconds for _, result in work), TimeLeft(request, 1000, 10, clock=lambda: now[0])
    began = 0.0
    for task, result in work:
        for now[0] in np.linspace(began, began + result.seconds, 5):
            if 0.03 * whole < now[0] < 0.97 * whole:
                assert left.left() == pytest.approx(whole - now[0], rel=0.3), (task, now[0] / whole)
        left.finished(task, result)
        began += result.seconds
    assert left.left() == 0 and left.share() == 1


def test_a_task_that_is_late_says_that_the_rest_will_be():
    request, now = Request((LINF,), ("pgd20",), {}), [0.0]
    left = TimeLeft(request, 400, 10, clock=lambda: now[0])
    assert left.left() is None  # nothing is known of the model's speed
    work = list(simulated(request, 400, survive={"natural": 1, "pgd20": 1}, second=0.1, fallen=1, slower={},
                          rng=np.random.default_rng(0)))  # fmt: skip
    for task, result in work[:4]:
        now[0] += result.seconds
        left.finished(task, result)
    expected = 400 * 61 * 0.1
    assert left.left() == pytest.approx(expected, rel=0.05)
    now[0] += expected / 4
    assert left.left() == pytest.approx(expected * 3 / 4, rel=0.05)
    now[0] += expected / 4  # the first of four blocks still runs
    assert left.left() > expected


def test_tasks_that_run_together_share_the_time_as_far_as_there_are_blocks():
    request = Request((LINF,), ("pgd20",), {})
    alone, several = TimeLeft(request, 400, 10), TimeLeft(request, 400, 10, together=8)
    for left in (alone, several):
        left.finished(Task("natural", "none", 0), BlockResult({"natural": np.ones(400, dtype=bool)}, seconds=400.0))
        left.moved = None
    assert alone.left() == pytest.approx(400 * 61) and several.left() == pytest.approx(alone.left() / 4)


def test_stored_results_count_as_done():
    request = Request((LINF,), ("aa",), {})
    survive = {"natural": 0.9, "aa_apgd_ce": 0.6, "aa_apgd_t": 1, "aa_fab_t": 1, "aa_square": 1}
    work = list(simulated(request, 300, survive=survive, second=1e-3, fallen=0.2, slower={},
                          rng=np.random.default_rng(0)))  # fmt: skip
    fresh, resumed = TimeLeft(request, 300, 10, clock=lambda: 0.0), TimeLeft(request, 300, 10, clock=lambda: 0.0)
    for task, result in work[:8]:
        fresh.finished(task, result)
    assert resumed.stored(dict(work[:8])) == dict(work[:8])
    assert resumed.left() == fresh.left() > 0 and resumed.share() == fresh.share() > 0


# --- what is shown --------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_the_time_left_of_training_includes_what_comes_after_it(clock):
    shown = progress.Progress(io.StringIO())
    shown.phase("training", 100, done=20, later=40)
    clock[0] += 300
    shown.steps(50)  # 30 in 300 s: 50 and 40 are left
    assert shown.stream.getvalue() == "training 50/100 steps  about 15:00 left\n"
    clock[0] += 500
    shown.steps(100)
    assert shown.stream.getvalue().endswith("training 100/100 steps  about 06:40 left\n")


def test_the_time_left_that_is_told_is_shown(clock):
    shown = progress.Progress(io.StringIO())
    shown.phase("evaluating", 100, unit="%")
    clock[0] += 31
    shown.steps(3.0, 3725.0)
    assert shown.stream.getvalue() == "evaluating 3/100 %  about 1:02:05 left\n"
    clock[0] += 31
    shown.steps(2.0, 4000.0)  # it may rise; what is done does not fall
    assert shown.stream.getvalue().endswith("evaluating 3/100 %  about 1:06:40 left\n")


def test_repeated_calls_end_with_the_block():
    calls = []
    with progress.repeated(lambda: calls.append(1), 0.01):
        while len(calls) < 3:
            time.sleep(0.01)
    number = len(calls)
    time.sleep(0.05)
    assert len(calls) == number
