"""Norm balls: starts, steps and projections against their definitions; that they are nearest is in tests/property."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from genray.attacks import StreamDraw
from genray.core import geometry
from genray.core.geometry import BALLS

NORMS = ("linf", "l2", "l1")


def draw(seed=0):
    return StreamDraw(torch.Generator().manual_seed(seed))


def images(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(shape).astype(np.float32))


def length(norm, delta):
    """Norms of a batch in float64, from the definition."""
    flat = np.abs(np.asarray(delta, np.float64)).reshape(len(delta), -1)
    return {"linf": flat.max(1), "l2": np.sqrt((flat**2).sum(1)), "l1": flat.sum(1)}[norm]


def project(norm, x, u, epsilon):
    x, u = torch.as_tensor(x), torch.as_tensor(u)
    return BALLS[norm].project(x, u, epsilon).numpy()


# --- lengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_length(norm):
    delta = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]], [[-1.0, 1.0]]])
    expected = {"linf": [4, 0, 1], "l2": [5, 0, 2**0.5], "l1": [7, 0, 2]}[norm]
    assert BALLS[norm].length(delta).tolist() == pytest.approx(expected)


# --- projections -------------------------------------------------------------------------------------------------


def test_linf_projection_by_hand():
    x = [[0.5, 0.5, 0.5, 0.05, 0.95, 0.0, 1.0]]
    u = [[0.7, 0.3, 0.55, -0.4, 1.4, -1.0, 2.0]]
    assert project("linf", x, u, 0.1)[0].tolist() == pytest.approx([0.6, 0.4, 0.55, 0.0, 1.0, 0.0, 1.0], abs=1e-7)


def test_l2_projection_rescales_then_clips():
    x, u = images(6, 2, 3, 3, seed=1).numpy(), 3 * images(6, 2, 3, 3, seed=2).numpy() - 1
    u[0] = x[0] + 0.01  # inside the ball
    u[1] = x[1]
    delta = u.astype(np.float64) - x
    factor = np.minimum(1, 0.5 / np.maximum(length("l2", delta), 1e-30)).reshape(-1, 1, 1, 1)
    assert factor[0] == 1 and factor[2] < 1
    assert np.abs(project("l2", x, u, 0.5) - np.clip(x + factor * delta, 0, 1)).max() < 2e-7


def bisected_l1_projection(x, u, epsilon):
    """Methods D5, by bisection in float64."""
    delta = u - x
    room = np.where(delta >= 0, 1 - x, x)

    def moved(shrink):
        return np.clip(np.abs(delta) - shrink, 0, room)

    shrink = 0.0
    if moved(0.0).sum() > epsilon:
        shrink = optimize.brentq(lambda s: moved(s).sum() - epsilon, 0, np.abs(delta).max() + 1, xtol=1e-15, rtol=1e-14)
    return x + np.sign(delta) * moved(shrink)


def l1_cases():
    """Name -> (x, u, epsilon): random ones and every corner of methods H.3."""
    rng = np.random.default_rng(5)
    cases = {}
    for i in range(8):
        x = rng.random(5)
        cases[f"random {i}"] = x, x + rng.normal(size=5) * rng.choice([0.3, 1, 5]), rng.choice([0.1, 0.5, 1.5])
    x = np.array([0.0, 1.0, 0.0, 1.0, 0.5])
    cases["on the walls, outwards"] = x, x + [-1, 1, -2, 2, 0.3], 0.2
    cases["on the walls, inwards"] = x, x + [1, -1, 2, -2, 0.3], 0.7
    cases["on the walls, both ways"] = x, x + [-3, -1, 2, 2, 0.9], 0.7
    x = rng.random(5)
    cases["inside the ball"] = x, np.clip(x + 0.01, 0, 1), 0.5
    cases["inside the ball, outside the box"] = np.array([0.9, 0.5]), np.array([1.2, 0.55]), 0.5
    cases["ball larger than the box"] = x, x + 10 * rng.normal(size=5), 50.0
    cases["no change"] = x, x.copy(), 0.3
    cases["ties"] = np.full(4, 0.5), np.array([0.9, 0.9, 0.1, 0.1]), 0.8
    cases["wall frees budget"] = np.array([0.95, 0.5]), np.array([3.0, 0.8]), 0.3
    return cases


@pytest.mark.parametrize("name", l1_cases())
def test_l1_projection_equals_a_bisection(name):
    x, u, epsilon = l1_cases()[name]
    fast = project("l1", x[None].astype(np.float64), u[None], epsilon)[0]
    assert np.abs(fast - bisected_l1_projection(x, u, epsilon)).max() < 1e-9


@pytest.mark.parametrize("norm", NORMS)
def test_examples_of_a_batch_do_not_touch_each_other(norm):
    x, u = images(6, 2, 5, 5, seed=1), 4 * images(6, 2, 5, 5, seed=2) - 1.5
    together = BALLS[norm].project(x, u, 0.7)
    alone = torch.cat([BALLS[norm].project(x[i : i + 1], u[i : i + 1], 0.7) for i in range(6)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)


# --- steps -------------------------------------------------------------------------------------------------------


def gradients():
    return torch.from_numpy(np.random.default_rng(8).normal(size=(7, 3, 4, 5)).astype(np.float32))


def inner(a, b):
    return (a.double() * b.double()).flatten(1).sum(1).numpy()


@pytest.mark.parametrize(("norm", "dual"), [("linf", "l1"), ("l2", "l2"), ("l1", "linf")])
def test_steps_are_steepest(norm, dual):
    """max <g, s> over ||s|| <= 1 is the dual norm of g; for l1 with one pixel a step."""
    g = gradients()
    step = BALLS[norm].step(g, 1e-9)
    assert length(norm, step.numpy()) == pytest.approx(np.ones(7), rel=1e-6)
    assert inner(g, step) == pytest.approx(length(dual, g.numpy()), rel=1e-6)


@pytest.mark.parametrize(("sparsity", "pixels"), [(0.05, 3), (0.051, 4), (0.5, 30), (1.0, 60), (1e-6, 1)])
def test_l1_step_takes_the_share_of_largest(sparsity, pixels):
    """ceil(sparsity d) coordinates with the largest |g|, their signs, divided by their number (methods D4.7)."""
    g = gradients()
    step = BALLS["l1"].step(g, sparsity).flatten(1).numpy()
    for row, gradient in zip(step, g.flatten(1).numpy(), strict=True):
        chosen = np.argsort(-np.abs(gradient))[:pixels]
        expected = np.zeros_like(gradient)
        expected[chosen] = np.sign(gradient[chosen]) / pixels
        assert np.abs(row - expected).max() < 1e-7


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_gives_a_zero_step(norm):
    g = gradients()
    g[2] = 0
    step = BALLS[norm].step(g, 0.05)
    assert torch.count_nonzero(step[2]) == 0 and torch.isfinite(step).all()
    assert torch.count_nonzero(step[3]) > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-6, 1e-14, 1e-25, 1e-36, 1e12, 1e25])
def test_steps_do_not_depend_on_the_size_of_the_gradient(norm, scale):
    """A confident network has gradients of 1e-14; its attack must not be weaker for that."""
    g = gradients()
    step = BALLS[norm].step((g * scale), 0.05)
    assert torch.allclose(step, BALLS[norm].step(g, 0.05), rtol=0, atol=1e-5)


# --- starts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [8 / 255, 0.5, 12.0])
def test_start_lies_in_the_ball(norm, epsilon):
    x = images(50, 3, 8, 8)
    start = BALLS[norm].start(x, epsilon, draw())
    assert start.shape == x.shape
    assert (length(norm, start.numpy()) <= epsilon * (1 + 1e-6) + 64 * 3 * 2**-25).all()
    assert (length(norm, start.numpy()) > 0).all()


def test_linf_start_is_uniform():
    start = BALLS["linf"].start(images(200, 1, 10, 10), 0.3, draw(1)).double()
    assert stats.kstest(start.flatten().numpy(), stats.uniform(-0.3, 0.6).cdf).pvalue > 0.01
    flat = start.flatten(1).numpy()
    assert np.abs(np.corrcoef(flat.T) - np.eye(100)).max() < 0.35  # 200 samples: standard deviation 0.07


def test_l2_start_has_a_uniform_radius_and_an_even_direction():
    start = BALLS["l2"].start(images(4000, 1, 2, 3), 0.5, draw(2)).flatten(1).double().numpy()
    radius = np.linalg.norm(start, axis=1)
    assert stats.kstest(radius, stats.uniform(0, 0.5).cdf).pvalue > 0.01
    direction = start / radius[:, None]
    assert np.abs(direction.mean(0)).max() < 0.03  # standard deviation 1 / sqrt(6 * 4000) = 0.0065
    assert np.abs(direction.T @ direction / 4000 - np.eye(6) / 6).max() < 0.02
    # One coordinate of an even direction in R^6: (1 + t) / 2 is Beta(5/2, 5/2).
    assert stats.kstest((1 + direction[:, 0]) / 2, stats.beta(2.5, 2.5).cdf).pvalue > 0.01


def test_l1_start_is_projected_noise():
    x = images(20, 1, 6, 6, seed=9)
    start = BALLS["l1"].start(x, 1.5, draw(3)).numpy()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).numpy()
    for i in range(20):
        origin = x[i].numpy().ravel().astype(np.float64)
        slow = bisected_l1_projection(origin, origin + noise[i].ravel(), 1.5) - origin
        assert np.abs(start[i].ravel() - slow).max() < 1e-6
    assert length("l1", start) == pytest.approx(np.full(20, 1.5), rel=1e-5)
    moved = x.numpy() + start
    assert moved.min() >= -1e-7 and moved.max() <= 1 + 1e-7


@pytest.mark.parametrize("norm", NORMS)
def test_same_stream_same_start_other_stream_other_start(norm):
    x = images(3, 1, 4, 4)
    first, again, other = (BALLS[norm].start(x, 0.2, draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_without_a_copy_are_those_with_one(dtype):
    """Those of a GPU, which leave channels_last tensors where they are."""
    v = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    v = v.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(geometry._reduced(torch.linalg.vector_norm, v), geometry._l2(v), rtol=1e-6)
    assert torch.equal(geometry._reduced(torch.amax, v.abs()), geometry._largest(v))
