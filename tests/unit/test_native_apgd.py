"""Our APGD: against the authors' package on a trained network, closed forms, and what it must never do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import L1_projection
from torch import nn
from victims import Watched, at_margins, correct, linear, one_run_after_another, trained_on_digits

from genray.attacks.auto import run_member
from genray.attacks.native import apgd as apgd_file
from genray.attacks.native import ascent, outcome
from genray.attacks.native.apgd import apgd
from genray.attacks.native.outcome import AttackState
from genray.core.geometry import BALLS, l1_shrinkage
from genray.models.attack_copy import AttackCopy

pytestmark = pytest.mark.slow  # runs the package beside ours

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.12, "l2": 0.7, "l1": 1.5}  # breaks about half of the trained network's images
DUAL = {"linf": lambda w: w.abs().sum(-1), "l2": lambda w: w.norm(dim=-1), "l1": lambda w: w.abs().amax(-1)}


@pytest.fixture(scope="module")
def trained():
    """(classes) -> (network trained for a second on digits of these classes, 40 test images, labels)."""
    return trained_on_digits


# --- the package ----------------------------------------------------------------------------------------------------


@pytest.fixture
def packages_rounding(monkeypatch):
    """The rounding of its l1 projection decides which pixels count as changed, and so how many the steps move."""
    monkeypatch.setattr(ascent, "l1_shrinkage", L1_projection)
    monkeypatch.setattr(ascent, "ROUNDING", 0.0)


CASES = {
    "linf": [("apgd_ce", 10), ("apgd_t", 4), ("apgd_dlr", 3), ("apgd_ce", 2)],
    "l2": [("apgd_ce", 10), ("apgd_dlr", 3), ("apgd_t", 4)],
    "l1": [("apgd_ce", 10), ("apgd_dlr", 3), ("apgd_t", 4)],
}


@pytest.mark.parametrize("norm, member, num_classes", [(norm, *case) for norm in NORMS for case in CASES[norm]])
def test_verdicts_are_the_packages(trained, norm, member, num_classes, packages_rounding):
    model, x, y = trained(num_classes)
    epsilon = EPSILON[norm] * (1 if num_classes > 3 else 1.6)
    how = {"member": member, "norm": norm, "epsilon": epsilon, "seed": 5, "num_classes": num_classes}
    expected, found = run_member(model, x, y, **how), apgd(model, x, y, **how)
    assert correct(model, found, y).tolist() == correct(model, expected, y).tolist()
    robust = int(correct(model, found, y).sum())
    assert 4 <= robust <= 36, "the radius should break some"


def test_l1_is_as_strong_with_our_projection(trained):
    """The package differs by as much from itself with another seed (4 to 7 % of the images at such a radius)."""
    model, x, y = trained(10)
    how = {"member": "apgd_t", "norm": "l1", "epsilon": EPSILON["l1"], "seed": 5, "num_classes": 10}
    expected = correct(model, run_member(model, x, y, **how), y)
    found = correct(model, apgd(model, x, y, **how), y)
    assert int((found != expected).sum()) <= 6 and abs(int(found.sum()) - int(expected.sum())) <= 3


@pytest.mark.parametrize("norm, member", [("linf", "apgd_t"), ("l2", "apgd_ce"), ("l2", "apgd_t"), ("l1", "apgd_t")])
def test_iterates_are_the_packages(trained, norm, member, packages_rounding):
    """Of an example that no run breaks: checkpoints, stages and restarts included."""
    model, x, y = trained(4)
    how = {"member": member, "norm": norm, "epsilon": 0.25 * EPSILON[norm], "seed": 3, "num_classes": 4}
    robust = correct(model, apgd(model, x[:6], y[:6], **how), y[:6]).nonzero().flatten()[:1]
    ours, theirs = Watched(model), Watched(model)
    apgd(ours, x[robust], y[robust], **how), run_member(theirs, x[robust], y[robust], **how)
    # The package ranks the targets before each run; ours from the clean pass.
    ranked = [p for i, p in enumerate(theirs.seen) if member != "apgd_t" or i == 0 or theirs.graded[i]]
    assert max(len(p) for p in ours.seen) == (2 if member == "apgd_t" else 1), "the last two targets at once"
    alone = one_run_after_another(ours.seen)
    assert len(alone) == len(ranked) > 100
    far = [float((a - b).abs().max()) > 1e-5 for a, b in zip(alone, ranked)]
    # In l2 rounding may grow late in a run, where a checkpoint or a ReLU decides otherwise.
    assert not any(sum((far[i : i + 60] for i in range(1, len(far), 101)), []) if norm == "l2" else far)


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["apgd_ce", "apgd_dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_linear_model_is_broken_up_to_the_closed_form(norm, member):
    """Epsilon times the dual norm of w is what a margin can fall by, when no wall is near."""
    model, weight = linear()
    w, epsilon = weight[0] - weight[1], {"linf": 0.02, "l2": 0.1, "l1": 0.1}[norm]
    reach = epsilon * float(DUAL[norm](w))
    x, y = at_margins(w, [0.5 * reach, 0.97 * reach, 1.02 * reach, 2 * reach]), torch.zeros(4, dtype=torch.int64)
    if member == "apgd_dlr":
        model = WithThirdClass(model)
    how = {"norm": norm, "epsilon": epsilon, "seed": 1, "num_classes": 3 if member == "apgd_dlr" else 2}
    found = apgd(model, x, y, member=member, **how)
    assert correct(model, found, y).tolist() == [False, False, True, True]
    assert torch.equal(found[2:], x[2:])


class WithThirdClass(nn.Module):
    """Adds a class that never wins: the DLR loss is then a falling function of the margin."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        z = self.model(x)
        return torch.cat([z, torch.full_like(z[:, :1], -30)], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_example_does_not_depend_on_when_others_leave(trained, norm):
    model, x, y = trained(10)
    how = {"member": "apgd_ce", "norm": norm, "epsilon": EPSILON[norm], "seed": 5, "num_classes": 10}
    robust = correct(model, apgd(model, x, y, **how), y)
    hard, easy = robust.nonzero().flatten(), (correct(model, x, y) & ~robust).nonzero().flatten()
    other_x, other_y = x.clone(), y.clone()
    other_x[easy], other_y[easy] = x[hard[:1]], y[hard[:1]]  # nobody leaves early any more
    first, second = Watched(model), Watched(model)
    apgd(first, x, y, **how), apgd(second, other_x, other_y, **how)
    # The last point of those who stayed to the end, in both runs.
    stayed = len(first.seen[-1]), len(second.seen[-1])
    assert stayed[0] == len(hard) < stayed[1]
    among = (robust | ~correct(model, x, y))[correct(model, x, y)].nonzero().flatten()
    assert torch.allclose(first.seen[-1], second.seen[-1][among], atol=1e-5)


def test_broken_examples_leave_the_batch(trained):
    """Passes shrink with each break; the last iterate has no gradient; a break costs one pass of its own."""
    model, x, y = trained(10)
    x, y = x[correct(model, x, y)], y[correct(model, x, y)]
    watched = Watched(model)
    found = apgd(watched, x, y, member="apgd_ce", norm="linf", epsilon=0.12, seed=5, num_classes=10)
    robust = int(correct(model, found, y).sum())
    sizes = [len(p) for p, graded in zip(watched.seen, watched.graded) if graded]
    assert len(sizes) == 100 and sizes[0] == len(x) and sizes[-1] == robust
    assert all(a >= b for a, b in zip(sizes, sizes[1:]))
    alone = [len(p) for p, graded in zip(watched.seen, watched.graded) if not graded]
    assert sum(alone) == len(x) + (len(x) - robust) + robust  # clean, confirmations, last iterate


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_runs_at_once_begin_where_they_would_one_by_one(trained, norm, monkeypatch):
    """Also those after a run that breaks somebody: fewer examples then draw other noise."""
    model, x, y = trained(10)
    how = {"member": "apgd_t", "norm": norm, "epsilon": EPSILON[norm], "seed": 5, "num_classes": 10}
    found, sizes = [], []
    for full in (1, 1000):
        monkeypatch.setitem(outcome.FULL_BATCH, "cpu", full)
        watched = Watched(model)
        found.append(apgd(watched, x, y, **how))
        sizes.append([len(p) for p, graded in zip(watched.seen, watched.graded) if graded])
    assert len(sizes[1]) < 0.8 * len(sizes[0])
    ends = [small for large, small in zip(sizes[1], sizes[1][1:]) if small < large - 3]
    assert ends, "somebody should fall while several runs are made"
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_of_runs_that_begin_again_is_drawn_again(norm):
    """Three runs are drawn at once, the first is valid: the second then draws for those who are left."""
    x = torch.zeros(6, 1, 4, 4)
    at_once, one_by_one = (apgd_file.StartNoise(norm, 5, x) for _ in range(2))
    three = at_once(3, (6, 1, 4, 4))
    at_once.rewind(1)
    assert torch.equal(three[:6], one_by_one(1, (6, 1, 4, 4)))
    assert torch.equal(at_once(1, (4, 1, 4, 4)), one_by_one(1, (4, 1, 4, 4)))
    assert not torch.equal(three[6:12], three[:6])


def test_runs_after_one_that_breaks_somebody_end():
    """Three runs on examples 0, 1, 2; the second breaks example 2."""
    model, w = linear()
    w = w[0] - w[1]
    x, y = at_margins(w, [1.0, 1.0, 1.0]), torch.zeros(3, dtype=torch.int64)
    at, loss = torch.arange(3).repeat(3), apgd_file.LOSSES["apgd_ce"]
    ascent_run = ascent.ApgdRun(AttackState(model, x, y, "linf", 1.0), at, y.repeat(3), loss, model, 3)
    start = x.repeat(3, 1, 1, 1).flatten(1)
    start[3 + 2] = at_margins(w, [-0.5]).flatten()
    ascent_run.ascend(start, 1.0, 0)
    assert ascent_run.valid == 2
    assert ascent_run.at.tolist() == [0, 1, 0, 1] and ascent_run.order.tolist() == [0, 0, 1, 1]
    assert ascent_run.outcome.broken.tolist() == [False, False, True]


def test_only_the_point_inside_the_ball_counts():
    """Two points beyond the boundary and outside the ball; only one image is in reach of it from inside."""
    model, weight = linear()
    w = weight[0] - weight[1]
    reach = 0.02 * float(w.abs().sum())
    x, y = at_margins(w, [0.5 * reach, 1.5 * reach]), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        outcome = AttackState(model, x, y, "linf", 0.02)
        far = outcome.x - 0.04 * w.sign()
        assert not correct(model, far, y).any()
        assert outcome.settle(torch.arange(2), far, torch.tensor([False, False])) is None
        both = torch.tensor([0, 1, 0])  # two runs attack the first
        staying, lost = outcome.settle(both, far[both], torch.tensor([True, True, True]))
    assert staying.tolist() == outcome.unbroken().tolist() == [1] and lost.tolist() == [0, 2]
    found = outcome.images()
    assert (found - x).abs().max() <= 0.02 * (1 + 1e-6) and correct(model, found, y).tolist() == [False, True]


def test_nobody_leaves_in_the_wider_l1_stages(trained):
    """A break within 3 or 2 epsilon is none, whatever its projection gives; the last steps need no gradients there."""
    model, x, y = trained(2)
    x, y = x[correct(model, x, y)][:12], y[correct(model, x, y)][:12]
    watched = Watched(model)
    apgd(watched, x, y, member="apgd_ce", norm="l1", epsilon=3.5, seed=5, num_classes=2)
    sizes = [len(p) for p, graded in zip(watched.seen, watched.graded) if graded]
    assert sizes[:60] == [len(x)] * 60 and sizes[99 if len(sizes) > 99 else -1] < len(x)


# --- search in less precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_what_only_the_search_sees_broken_is_not_reported(norm):
    """A search that calls everything broken: the example stays, and is found when it really breaks."""
    model, weight = linear()
    w, epsilon = weight[0] - weight[1], {"linf": 0.02, "l2": 0.1, "l1": 0.1}[norm]
    reach = epsilon * float(DUAL[norm](w))
    x, y = at_margins(w, [0.97 * reach, 1.02 * reach]), torch.zeros(2, dtype=torch.int64)
    how = {"member": "apgd_ce", "norm": norm, "epsilon": epsilon, "seed": 1, "num_classes": 2}
    found = apgd(model, x, y, search=lambda v: model(v) - torch.tensor([9.0, 0.0]), **how)
    assert correct(model, found, y).tolist() == [False, True] and torch.equal(found[1:], x[1:])


def test_a_search_that_sees_nothing_finds_nothing(trained):
    model, x, y = trained(10)
    how = {"member": "apgd_ce", "norm": "linf", "epsilon": 0.3, "seed": 1, "num_classes": 10}
    x, y = x[y == y[0]], y[y == y[0]]
    assert not torch.equal(apgd(model, x, y, **how), x)
    blind = apgd(model, x, y, search=lambda v: model(v) * 0 + 9 * F.one_hot(y[:1], 10), **how)
    assert torch.equal(blind, x)


@pytest.mark.parametrize("member", ["apgd_ce", "apgd_t"])
def test_half_precision_search(trained, member):
    """Gradients come from the search alone, every break from the model; the result is nearly the same."""
    model, x, y = trained(4)
    search, watched = AttackCopy(model, dtype=torch.bfloat16), Watched(model)
    how = {"member": member, "norm": "linf", "epsilon": EPSILON["linf"], "seed": 5, "num_classes": 4}
    found, full = apgd(watched, x, y, search=search, **how), apgd(model, x, y, **how)
    assert not any(watched.graded)
    moved = (found != x).flatten(1).any(1)
    assert not correct(model, found, y)[moved].any()
    assert int((correct(model, found, y) != correct(model, full, y)).sum()) <= 2


# --- limits ---------------------------------------------------------------------------------------------------------


# --- step sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drift, start, num_steps, periods",
    [
        (0.0, 0.0, 100, (22, 3, 6)),
        (1.5, 0.0, 100, (22, 3, 6)),
        (1.5, 500.0, 100, (22, 3, 6)),
        (0.7, 20.0, 100, (22, 3, 6)),
        (1.0, 0.0, 40, (8, 1, 2)),
        (1.0, 0.0, 10, (2, 1, 1)),
        (1.0, 0.0, 3, (1, 1, 1)),
    ],
)
def test_step_sizes_halve_at_the_checkpoints_of_the_paper(drift, start, num_steps, periods):
    """Condition 1: rises in at most 75 % of the steps; 2: not halved last time and the best loss did not improve."""
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(drift, 1, (num_steps, 6)), 0).astype(np.float32)
    ascent_run = ascent.ApgdRun.__new__(ascent.ApgdRun)
    ascent_run.value, ascent_run.step_size = torch.full((6,), start), torch.ones(6, 1)
    ascent_run.point = ascent_run.gradient = ascent_run.best_point = ascent_run.best_gradient = torch.zeros(6, 2)
    ascent_run.best_loss, ascent_run.num_steps = ascent_run.value, num_steps
    ascent_run.begin()
    for i in range(num_steps - 1):
        ascent_run.value = torch.from_numpy(values[i])
        ascent_run.best_loss = torch.maximum(ascent_run.best_loss, ascent_run.value)
        ascent_run.review(i)
    best = np.maximum.accumulate(np.concatenate([np.full((1, 6), start, np.float32), values]))
    before = np.concatenate([np.zeros((1, 6), np.float32), values])
    expected, last, halved, length = np.ones(6), -1, np.ones(6, bool), periods[0]
    while last + length < num_steps - 1:
        now = last + length
        few = (before[last + 2 : now + 2] > before[last + 1 : now + 1]).sum(0) <= 0.75 * length
        halved = few | (~halved & (best[now + 1] <= best[last + 1]))
        expected, last, length = np.where(halved, expected / 2, expected), now, max(length - periods[1], periods[2])
    assert ascent_run.step_size[:, 0].tolist() == expected.tolist()


# --- losses and the l1 projection -----------------------------------------------------------------------------------


def test_losses_by_hand():
    z = torch.tensor([[1.0, 4.0, 3.0, -2.0, 0.0], [1.0, 4.0, 3.0, -2.0, 0.0]])
    y, t = torch.tensor([1, 2]), torch.tensor([0, 4])
    assert torch.allclose(apgd_file._dlr(z, y, t), torch.tensor([(3 - 4) / (4 - 1), (4 - 3) / (4 - 1)]))
    assert torch.allclose(apgd_file._targeted_dlr(z, y, t), torch.tensor([(1 - 4) / (4 - 0.5), (0 - 3) / (4 - 0.5)]))


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 400),
    epsilon=st.floats(1e-3, 50),
    size=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    sparse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_l1_shrinkage_in_float32_is_the_exact_projection(d, epsilon, size, sparse, seed):
    rng = np.random.default_rng(seed)
    x = (rng.integers(0, 256, (3, d)) / 255 if sparse else rng.random((3, d))).astype(np.float32)
    move = (rng.normal(size=(3, d)) * size * (rng.random((3, d)) < (0.2 if sparse else 1))).astype(np.float32)
    x, move = torch.from_numpy(x), torch.from_numpy(move)
    found = l1_shrinkage(x, move, epsilon).double() + move
    expected = BALLS["l1"].project(x.double(), x.double() + move, epsilon) - x
    scale = float(move.abs().max()) + epsilon
    assert (found - expected).abs().max() <= 2e-6 * scale
    assert found.abs().sum(1).max() <= epsilon + 1e-6 * scale * d**0.5


def test_l1_shrinkage_takes_back_whole_moves_exactly():
    x, move = torch.full((1, 4), 0.3), torch.tensor([[0.5, -0.1, 0.1, 0.0]])
    assert torch.equal(move + l1_shrinkage(x, move, 0.25), torch.tensor([[0.25, 0.0, 0.0, 0.0]]))
