"""Our FAB-T: against the authors' package on a trained network, closed forms, and its projections."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from victims import Watched, correct, one_run_after_another, trained_on_digits

from genray.attacks.auto import run_member
from genray.attacks.native import outcome, projections
from genray.attacks.native.fab import fab_t
from genray.attacks.native.projections import hyperplane_move

pytestmark = pytest.mark.slow  # runs the package beside ours

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.1, "l2": 0.55, "l1": 1.3}  # breaks about half of the trained network's images


@pytest.fixture(scope="module")
def trained():
    """(classes) -> (network trained for a second on digits of these classes, 40 test images, labels)."""
    return trained_on_digits


# --- the package ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, num_classes", [("linf", 10), ("l2", 3), ("l1", 3), *((n, 2) for n in NORMS)])
def test_verdicts_are_the_packages(trained, norm, num_classes):
    model, x, y = trained(num_classes)
    how = {"norm": norm, "seed": 5, "num_classes": num_classes}
    how["epsilon"] = EPSILON[norm] * (1 if num_classes > 3 else 2)
    expected, found = run_member(model, x, y, member="fab_t", **how), fab_t(model, x, y, **how)
    assert correct(model, found, y).tolist() == correct(model, expected, y).tolist()
    assert 4 <= int(correct(model, found, y).sum()) <= 36, "the radius should break some"


@pytest.mark.parametrize("norm", NORMS)
def test_iterates_are_the_packages(trained, norm):
    """Of an example that no run breaks; the package checks the clean image and ranks the targets before each run."""
    model, x, y = trained(3)
    how = {"norm": norm, "epsilon": 0.25 * EPSILON[norm], "seed": 3, "num_classes": 3}
    robust = correct(model, fab_t(model, x[:4], y[:4], **how), y[:4]).nonzero().flatten()[:1]
    ours, theirs = Watched(model), Watched(model)
    fab_t(ours, x[robust], y[robust], **how), run_member(theirs, x[robust], y[robust], member="fab_t", **how)
    kept = [p for i, p in enumerate(theirs.seen) if i == 0 or 2 <= (i - 1) % 203 < 202]
    assert {len(p) for p in ours.seen[1:]} == {2}, "both targets at once"
    alone = one_run_after_another(ours.seen)
    assert len(alone) == len(kept) == 1 + 2 * 200
    assert max(float((a - b).abs().max()) for a, b in zip(alone[:100], kept)) < 1e-4
    assert max(float((a - b).abs().max()) for a, b in zip(alone[201:300], kept[201:300])) < 1e-4


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_classes", [2, 5])
def test_linear_model_is_broken_from_the_true_distance_on(norm, num_classes):
    """The least radius that flips a linear model, walls included, from a float64 reference; its steps stop 2 % off."""
    rng = np.random.default_rng(3)
    layer = nn.Linear(64, num_classes)
    layer.weight.data = torch.from_numpy(rng.normal(size=(num_classes, 64)).astype(np.float32))
    layer.bias.data = torch.zeros(num_classes)
    model = nn.Sequential(nn.Flatten(), layer)
    x = torch.from_numpy((rng.random((5, 1, 8, 8)) ** 3).astype(np.float32))  # many pixels near a wall
    y, z = model(x).argmax(1), model(x).detach()
    distances = []
    for i in range(5):
        others = [j for j in range(num_classes) if j != y[i]]
        w = [(layer.weight[j] - layer.weight[y[i]]).detach().double().numpy() for j in others]
        flat = x[i].flatten().double().numpy()
        distances.append(min(reference_length(norm, flat, v, float(z[i, j] - z[i, y[i]])) for v, j in zip(w, others)))
    for i, distance in enumerate(distances):
        broken = []
        for factor in (0.999, 1.02):
            how = {"norm": norm, "epsilon": factor * distance, "seed": 0, "num_classes": num_classes}
            broken.append(not correct(model, fab_t(model, x[i : i + 1], y[i : i + 1], **how), y[i : i + 1]))
        assert broken == [False, True], (i, distance)


@pytest.mark.parametrize("norm", NORMS)
def test_an_example_does_not_depend_on_when_others_leave(trained, norm):
    model, x, y = trained(3)
    how = {"norm": norm, "epsilon": 2 * EPSILON[norm], "seed": 0, "num_classes": 3}
    together = fab_t(model, x[:8], y[:8], **how)
    alone = torch.cat([fab_t(model, x[i : i + 1], y[i : i + 1], **how) for i in range(8)])
    assert correct(model, together, y[:8]).tolist() == correct(model, alone, y[:8]).tolist()
    assert (together - alone).abs().max() < 1e-4 and 0 < int((together != x[:8]).flatten(1).any(1).sum()) < 8


@pytest.mark.parametrize("full", [1, 1000])
def test_broken_examples_leave_the_batch(trained, full, monkeypatch):
    """With all their rows, where both targets are sought at once."""
    monkeypatch.setitem(outcome.FULL_BATCH, "cpu", full)
    runs = 2 if full > 1 else 1
    model, x, y = trained(3)
    x, y = x[correct(model, x, y)], y[correct(model, x, y)]
    watched = Watched(model)
    found = fab_t(watched, x, y, norm="linf", epsilon=0.16, seed=0, num_classes=3)
    robust = int(correct(model, found, y).sum())
    sizes = [len(p) for p, graded in zip(watched.seen, watched.graded) if graded]
    assert len(sizes) == 200 // runs and sizes[0] == runs * len(x) and sizes[-1] == runs * robust < runs * len(x)
    assert all(a >= b for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_gradient_nothing_moves(trained, norm):
    _, x, y = trained(3)
    how = {"norm": norm, "seed": 0, "num_classes": 3}
    flat = fab_t(lambda v: v.flatten(1)[:, :3] * 0 + torch.arange(3.0), x, y * 0 + 2, epsilon=0.5, **how)
    assert torch.equal(flat, x)


# --- projections ----------------------------------------------------------------------------------------------------


def reference_move(norm, point, w, residual):
    """Linf and l2: bisection on the multiplier in float64; l1: greedy in float64. One point (d,)."""
    w = np.where(np.abs(w) > (0 if norm == "linf" else 1e-8), w, 0)
    size, room = np.abs(w), np.where(w * np.sign(residual) < 0, 1 - point, point)
    if norm == "l1":
        moved, left = np.zeros_like(room), abs(residual)
        for i in np.argsort(-size):
            if size[i] > 0:
                moved[i] = min(room[i], left / size[i])
                left -= moved[i] * size[i]
    else:
        speed = (size > 0) * 1.0 if norm == "linf" else size
        low, high = 0.0, 1 / max(speed[speed > 0].min(), 1e-9) if (speed > 0).any() else 1.0
        for _ in range(200):
            middle = (low + high) / 2
            enough = (size * np.minimum(middle * speed, room)).sum() >= abs(residual)
            low, high = (low, middle) if enough else (middle, high)
        moved = np.minimum(high * speed, room) * (size > 0)
    return -np.sign(w * np.sign(residual)) * moved


def reference_length(norm, point, w, residual):
    move = reference_move(norm, point, w, residual)
    return float({"linf": np.abs(move).max(), "l2": np.sqrt((move**2).sum()), "l1": np.abs(move).sum()}[norm])


CASE = {
    "d": st.integers(1, 300),
    "share": st.floats(0, 0.99)
    | st.floats(1.01, 1.3),  # of what the box can give; above 1 the hyperplane is out of reach
    "scale": st.sampled_from([1e-4, 1.0, 50.0]),
    "walls": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def case(d, share, scale, walls, seed):
    """(points (2, 3, d), weights (3, d), residuals (2, 3)) of both signs; with `walls` many ties and zeros."""
    rng = np.random.default_rng(seed)
    points, w = rng.random((2, 3, d)), rng.normal(size=(3, d)) * scale
    if walls:
        points, w = np.round(points * 3) / 3, np.round(w / scale * 2) / 2 * scale
    points, w = points.astype(np.float32), w.astype(np.float32)
    sign = rng.choice([-1.0, 1.0], (2, 3))
    room = np.where(w * sign[..., None] < 0, 1 - points.astype(float), points)
    return points, w, (sign * share * (np.abs(w) * room).sum(-1)).astype(np.float32)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=40, deadline=None)
@given(**CASE)
def test_move_against_a_slow_reference(norm, d, share, scale, walls, seed):
    points, w, residual = case(d, share, scale, walls, seed)
    found = hyperplane_move(norm, *map(torch.from_numpy, (points, w, residual))).double().numpy()
    for m in range(2):
        for i in range(3):
            here, v, r = points[m, i].astype(float), w[i].astype(float), float(residual[m, i])
            move, best = found[m, i], reference_move(norm, here, v, r)
            assert (here + move >= -1e-6).all() and (here + move <= 1 + 1e-6).all() and not move[v == 0].any()
            given, wanted = float(v @ move), float(v @ best)
            assert abs(given - wanted) <= 3e-6 * abs(r) + 1e-12
            length = {"linf": lambda u: np.abs(u).max(), "l2": np.linalg.norm, "l1": lambda u: np.abs(u).sum()}[norm]
            assert abs(length(move) - length(best)) <= 1e-5 * length(best) + 1e-12
            if 0 < share < 0.9 and not walls and norm != "l1":
                assert np.abs(move - best).max() <= 1e-5 * np.abs(best).max()


def test_l1_move_looks_beyond_the_largest_weights(monkeypatch):
    """Rows that need more coordinates than are looked at first, beside rows that need few."""
    points, w, residual = case(300, 0.8, 1.0, False, 4)
    residual[:, 1] *= 0.01
    inputs = [torch.from_numpy(v) for v in (points, w, residual)]
    several = hyperplane_move("l1", *inputs)
    monkeypatch.setattr(projections._greedy_move, "__defaults__", (300,))
    assert torch.allclose(several, hyperplane_move("l1", *inputs), atol=1e-7)
    assert (several[:, 0] != 0).sum() > 64 > (several[:, 1] != 0).sum()


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_to_do_and_nothing_possible(norm):
    points, w = torch.full((1, 3, 4), 0.25), torch.tensor([[1.0, -2.0, 0.0, 0.5], [0.0] * 4, [1.0, 1.0, -1.0, 0.0]])
    move = hyperplane_move(norm, points, w, torch.tensor([[0.0, 5.0, 9.0]]))
    assert torch.equal(move[0, 0], torch.zeros(4)) and torch.equal(move[0, 1], torch.zeros(4))
    assert torch.equal(move[0, 2], torch.tensor([-0.25, -0.25, 0.75, 0.0]))


def test_newton_needs_few_steps(monkeypatch):
    monkeypatch.setattr(projections, "MOST_STEPS", 12)
    for share in (0.01, 0.3, 0.9):
        points, w, residual = case(3000, share, 1.0, False, 1)
        for norm in ("linf", "l2"):
            move = hyperplane_move(norm, *map(torch.from_numpy, (points, w, residual)))
            given = torch.linalg.vecdot(move, torch.from_numpy(w))
            assert torch.allclose(given, -torch.from_numpy(residual), rtol=1e-5)
