"""The tasks of an evaluation: which there are, when they become known, and how their flags are put together."""

import sys
from collections import Counter, deque
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import genray
from genray.evaluation.job import BlockResult, Request, Task, block_size_on, doubled, pass_bytes, run_here
from genray.evaluation.record import join
from genray.evaluation.suite import CASCADE, cascade
from genray.evaluation.task_queue import TaskQueue
from genray.types import ThreatModel

LINF, L2 = ThreatModel("linf", Fraction(1, 5)), ThreatModel("l2", Fraction(1))


def finished(todo, standing):
    """Finishes all that can be taken; `standing`: attack -> the examples that it leaves."""
    for task in todo.take():
        examples = task.examples or range(todo.num_examples)[task.block * 4 : task.block * 4 + 4]
        flags = np.array([example in standing[task.attack] for example in examples], dtype=bool)
        todo.finish(task, BlockResult({task.attack: flags}))


def packed(todo, member, norm="linf"):
    return [task.examples for task in todo.known() if (task.attack, task.ball) == (f"aa_{member}", norm)]


def test_survivors_are_packed_into_full_blocks_again():
    todo = TaskQueue(Request((LINF,), ("pgd20", "aa"), {}, block_size=4), 10)
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
    flags = join(todo)
    assert [int(flags["linf", f"aa_{member}"].sum()) for member in CASCADE] == [6, 2, 0, 0]
    assert flags["linf", "aa_apgd_ce"].nonzero()[0].tolist() == [0, 3, 4, 6, 7, 9]
    assert flags["linf", "aa"].tolist() == [False] * 10
    assert flags["none", "natural"].all() and flags["linf", "pgd20"].all()


def test_a_member_waits_for_all_blocks_of_the_one_before_in_its_norm_only():
    todo = TaskQueue(Request((LINF, L2), ("aa",), {}, block_size=4), 8)
    first = [task for task in todo.take() if task.attack != "natural"]
    assert {task.ball for task in first} == {"linf", "l2"} and len(first) == 4
    for task in first[:3]:  # both of linf, one of l2
        todo.finish(task, BlockResult({task.attack: np.ones(4, dtype=bool)}))
    assert [task.ball for task in todo.take()] == ["linf", "linf"]
    assert packed(todo, "apgd_t", "l2") == []


def test_stored_results_are_taken_over_stage_by_stage():
    request, standing = Request((LINF,), ("aa",), {}, block_size=4), {"natural": range(8)}
    standing |= {"aa_apgd_ce": {1, 2, 5}, "aa_apgd_t": {1, 5}, "aa_fab_t": {1, 5}, "aa_square": {5}}
    whole = TaskQueue(request, 8)
    for _ in CASCADE:
        finished(whole, standing)
    asked = []

    def stored(wanted):
        asked.extend(wanted)
        return {task: whole.results[task] for task in wanted if task.attack != "aa_square"}

    again = TaskQueue(request, 8, stored)
    assert again.take() == [Task("aa_square", "linf", 0, (1, 5))]
    assert len(asked) == len(set(asked)) == len(whole.results)
    assert again.take() == []


@pytest.mark.slow
def test_one_block_is_the_cascade(trained_run, digits):
    model, (x, y) = genray.load_model(trained_run), (digits[0][:12].float() / 255, digits[1][:12])
    todo = TaskQueue(Request((LINF,), ("aa",), {}, seed=3, block_size=12, engine="genray"), 12)
    for task, result in run_here(todo, model, x, y, 10, "cpu"):
        todo.finish(task, result)
    found, natural = join(todo), model(x).argmax(1) == y
    indices = natural.nonzero().flatten().tolist()
    _, expected = cascade(model, x[natural], y[natural], indices, todo.request.settings("linf", 10))
    sizes = []
    for member in CASCADE:
        assert found["linf", f"aa_{member}"][indices].tolist() == expected[member].tolist()
        sizes.append(int(expected[member].sum()))
    assert len(indices) > sizes[0] >= sizes[-1] > 0  # some fall, some reach the end
    assert not found["linf", "aa"][~natural.numpy()].any()


def test_without_correct_examples_nothing_is_attacked(trained_run, digits):
    model, x = genray.load_model(trained_run), digits[0][:6].float() / 255
    wrong = (model(x).argmax(1) + 1) % 10
    todo = TaskQueue(Request((LINF,), ("aa",), {}, block_size=4), 6)
    for task, result in run_here(todo, model, x, wrong, 10, "cpu"):
        todo.finish(task, result)
    assert [task.attack for task in todo.known()] == ["natural"] * 2 + ["aa_apgd_ce"] * 2
    assert not join(todo)["linf", "aa"].any()


def slow_tasks(request, num_examples, results):
    """All tasks that are known, worked out from the beginning each time."""
    size = request.block_size
    blocks = range(-(-num_examples // size))
    found = [Task("natural", "none", block) for block in blocks]
    for threat in request.threats:
        for attack in request.columns(threat.norm):
            if attack != "aa":
                found += [Task(attack, threat.norm, block) for block in blocks]
                continue
            alive = list(range(num_examples))
            for member in CASCADE:
                parts = [tuple(alive[start : start + size]) for start in range(0, len(alive), size)]
                stage = [Task(f"aa_{member}", threat.norm, block, part) for block, part in enumerate(parts)]
                found += stage
                if any(task not in results for task in stage):
                    break
                alive = [
                    e for task in stage for e, stands in zip(task.examples, results[task].flags[task.attack]) if stands
                ]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_known_tasks_are_those_of_a_slow_definition_in_any_order_of_the_work(seed):
    rng = np.random.default_rng(seed)
    request = Request((LINF, L2), ("pgd20", "aa"), {}, block_size=3)
    todo, queue, size = TaskQueue(request, 20), [], 3
    while queue := queue + todo.take():
        task = queue.pop(rng.integers(len(queue)))
        examples = task.examples or range(20)[task.block * size : task.block * size + size]
        todo.finish(task, BlockResult({task.attack: rng.random(len(examples)) < 0.7}))
        known = slow_tasks(request, 20, todo.results)
        assert todo.known() == known
    assert set(todo.results) == set(todo.known()) and len(todo.results) > 40


@pytest.mark.slow
def test_the_work_beside_the_attacks_grows_with_the_blocks_and_not_with_their_square(tmp_path, monkeypatch):
    def instantly(todo, *others):
        queue = deque(todo.take())
        while queue:
            task = queue.popleft()
            yield task, BlockResult({task.attack: np.ones(todo.size(task), dtype=bool)})
            queue.extend(todo.take())

    monkeypatch.setattr("genray.evaluation.run.run_tasks", instantly)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))

    def calls(blocks, profile):
        """Of all functions, Python's and C's."""
        counted = Counter()
        x, y = torch.rand(blocks, 1, 2, 2), torch.zeros(blocks, dtype=torch.int64)
        how = {"attacks": "pgd20,aa", "norms": "linf,l2", "num_classes": 10, "block_size": 1}
        sys.setprofile((lambda frame, event, argument: counted.update((event,))) if profile else None)
        try:
            genray.evaluate(model, x, y, **how, output=str(tmp_path / str(blocks)))
        finally:
            sys.setprofile(None)
        return counted["call"] + counted["c_call"]

    calls(2, profile=False)  # imports
    few, more, many = (calls(blocks, profile=True) for blocks in (10, 40, 160))
    assert many - more < 1.3 * 4 * (more - few), (few, more, many)  # 120 blocks are four times 30


# --- the block size ---------------------------------------------------------------------------------------------------


def test_blocks_are_doubled_while_there_is_room():
    assert [doubled(100, 10, room) for room in (0, 1_999, 2_000, 3_999, 4_000, 1 << 40)] == [
        100,
        100,
        200,
        200,
        400,
        3200,
    ]
    assert doubled(1000, 1, 1 << 40) == 2000  # 4,000 are more than any block has


def test_bytes_of_a_gradient_pass_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).requires_grad_(False)
    kept = 4 * 32  # what ReLU leaves; frozen linear layers need their weights only
    assert pass_bytes(model, (1, 8, 8), "cpu") == 2 * kept + 16 * 4 * 64
    assert model.training


def test_on_a_cpu_the_block_size_does_not_depend_on_the_machine(monkeypatch):
    model = nn.Linear(4, 2)
    monkeypatch.setattr("genray.evaluation.job.free_on", lambda device: 1 << 50)
    sizes = [block_size_on(torch.device("cpu"), model, shape) for shape in ((1, 8, 8), (3, 32, 32), (1, 2, 2))]
    assert sizes == [256, 100, 1000]
