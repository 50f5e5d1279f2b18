"""The tasks of an evaluation: which there are, when they become known, and how their flags are put together."""

from fractions import Fraction

import numpy as np
import pytest

import genray
from genray.evaluation.job import BlockResult, Request, Task, Todo, cost, expected_cost, run_here, tasks
from genray.evaluation.record import join, protocol
from genray.evaluation.suite import CASCADE, cascade
from genray.types import ThreatModel

LINF, L2 = ThreatModel("linf", Fraction(1, 5)), ThreatModel("l2", Fraction(1))


def finished(todo, standing):
    """Finishes all that can be taken; `standing`: attack -> the examples that it leaves."""
    for task in todo.take():
        examples = task.examples or range(todo.num_examples)[task.block * 4 : task.block * 4 + 4]
        flags = np.array([example in standing[task.attack] for example in examples], dtype=bool)
        todo.results[task] = BlockResult({task.attack: flags})


def packed(todo, member, norm="linf"):
    return [task.examples for task in todo.known() if (task.attack, task.norm) == (f"aa_{member}", norm)]


def test_survivors_are_packed_into_full_blocks_again():
    todo = Todo(Request((LINF,), ("pgd20", "aa"), {}, block_size=4), 10)
    assert packed(todo, "apgd_ce") == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert packed(todo, "apgd_t") == []
    everything = {"natural": range(10), "pgd20": range(10), "aa_apgd_ce": {0, 3, 4, 6, 7, 9}, "aa_apgd_t": {3, 9}}
    finished(todo, everything)
    assert packed(todo, "apgd_t") == [(0, 3, 4, 6), (7, 9)]
    assert packed(todo, "fab_t") == []
    finished(todo, everything)
    assert packed(todo, "fab_t") == [(3, 9)]
    finished(todo, everything | {"aa_fab_t": set()})
    assert packed(todo, "square") == []
    assert todo.take() == []
    flags = join(todo.results)
    assert [int(flags["linf", f"aa_{member}"].sum()) for member in CASCADE] == [6, 2, 0, 0]
    assert flags["linf", "aa_apgd_ce"].nonzero()[0].tolist() == [0, 3, 4, 6, 7, 9]
    assert flags["linf", "aa"].tolist() == [False] * 10
    assert flags["none", "natural"].all() and flags["linf", "pgd20"].all()


def test_a_member_waits_for_all_blocks_of_the_one_before_in_its_norm_only():
    todo = Todo(Request((LINF, L2), ("aa",), {}, block_size=4), 8)
    first = [task for task in todo.take() if task.attack != "natural"]
    assert {task.norm for task in first} == {"linf", "l2"} and len(first) == 4
    for task in first[:3]:  # both of linf, one of l2
        todo.results[task] = BlockResult({task.attack: np.ones(4, dtype=bool)})
    assert [task.norm for task in todo.take()] == ["linf", "linf"]
    assert packed(todo, "apgd_t", "l2") == []


def test_stored_results_are_taken_over_stage_by_stage():
    request, standing = Request((LINF,), ("aa",), {}, block_size=4), {"natural": range(8)}
    standing |= {"aa_apgd_ce": {1, 2, 5}, "aa_apgd_t": {1, 5}, "aa_fab_t": {1, 5}, "aa_square": {5}}
    whole = Todo(request, 8)
    for _ in CASCADE:
        finished(whole, standing)
    asked = []

    def stored(wanted):
        asked.extend(wanted)
        return {task: whole.results[task] for task in wanted if task.attack != "aa_square"}

    again = Todo(request, 8, stored)
    assert again.take() == [Task("aa_square", "linf", 0, (1, 5))]
    assert len(asked) == len(set(asked)) == len(whole.results)
    assert again.take() == []


def test_one_block_is_the_cascade(trained_run, digits):
    model, (x, y) = genray.load_model(trained_run), (digits[0][:30].float() / 255, digits[1][:30])
    todo = Todo(Request((LINF,), ("aa",), {}, seed=3, block_size=30, engine="genray"), 30)
    for task, result in run_here(todo, model, x, y, 10, "cpu"):
        todo.results[task] = result
    found, natural = join(todo.results), model(x).argmax(1) == y
    indices = natural.nonzero().flatten().tolist()
    _, expected = cascade(
        model, x[natural], y[natural], indices, norm="linf", epsilon=0.2, num_classes=10, seed=3, engine="genray"
    )
    sizes = []
    for member in CASCADE:
        assert found["linf", f"aa_{member}"][indices].tolist() == expected[member].tolist()
        sizes.append(int(expected[member].sum()))
    assert len(indices) > sizes[0] >= sizes[-1] > 0  # some fall, some reach the end
    assert not found["linf", "aa"][~natural.numpy()].any()


def test_the_expected_cost_falls_with_the_survivors():
    todo = Todo(Request((LINF,), ("aa",), {}, block_size=4), 8)
    stated = protocol(todo.request, {}, 10, {})
    price = {member: cost(f"aa_{member}", "linf", stated) for member in CASCADE}
    assert price["square"] > price["apgd_ce"] > 300
    done, total = expected_cost(todo, stated)
    assert (done, total) == (0, 8 * (1 + sum(price.values())))
    standing = {"natural": range(8), "aa_apgd_ce": {1, 2, 5}, "aa_apgd_t": set()}
    finished(todo, standing)
    done, total = expected_cost(todo, stated)
    assert done == 8 * (1 + price["apgd_ce"])
    assert total == pytest.approx(done + 3 * (price["apgd_t"] + price["fab_t"] + price["square"]))
    finished(todo, standing)
    done, total = expected_cost(todo, stated)
    assert done == total == 8 * (1 + price["apgd_ce"]) + 3 * price["apgd_t"]


def test_without_correct_examples_nothing_is_attacked(trained_run, digits):
    model, x = genray.load_model(trained_run), digits[0][:6].float() / 255
    wrong = (model(x).argmax(1) + 1) % 10
    todo = Todo(Request((LINF,), ("aa",), {}, block_size=4), 6)
    for task, result in run_here(todo, model, x, wrong, 10, "cpu"):
        todo.results[task] = result
    assert tasks(todo.request, 6, todo.results) == todo.known()
    assert not join(todo.results)["linf", "aa"].any()
