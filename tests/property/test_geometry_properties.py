"""Properties of the projections for random shapes, places and radii."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genray.core.geometry import BALLS

SETTINGS = settings(max_examples=120, deadline=None, derandomize=True)
ULP = 2.0**-24  # images in [0, 1] are stored to half of this

norms = st.sampled_from(["linf", "l2", "l1"])


@st.composite
def cases(draw, dtype=np.float32):
    """x (N, ...) in the box, part of it on the walls; u anywhere, part of it equal to x; epsilon."""
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.random(shape)
    walls = rng.random(shape) < draw(st.sampled_from([0, 0.3, 1.0]))
    x = np.where(walls, np.round(x), x)
    delta = rng.normal(size=shape) * 10.0 ** draw(st.integers(-3, 2))
    delta *= rng.random(shape) >= draw(st.sampled_from([0, 0.5, 1.0]))
    epsilon = draw(st.sampled_from([1 / 255, 8 / 255, 0.1, 0.5, 2.0, 12.0, 1000.0]))
    return torch.from_numpy(x.astype(dtype)), torch.from_numpy((x + delta).astype(dtype)), epsilon


def length(norm, delta):
    flat = np.abs(delta.double().numpy()).reshape(len(delta), -1)
    return {"linf": flat.max(1), "l2": np.sqrt((flat**2).sum(1)), "l1": flat.sum(1)}[norm]


def rounding(norm, x):
    """Length of a vector with one storage error in each coordinate."""
    size = x[0].numel()
    return ULP * {"linf": 1, "l2": size**0.5, "l1": size}[norm]


@SETTINGS
@given(cases(), norms)
def test_in_ball_and_box(case, norm):
    x, u, epsilon = case
    result = BALLS[norm].project(x, u, epsilon)
    assert result.shape == x.shape and result.dtype == x.dtype
    assert result.min() >= 0 and result.max() <= 1
    assert (length(norm, result.double() - x.double()) <= epsilon * (1 + 1e-6) + rounding(norm, x)).all()


@SETTINGS
@given(cases(), norms)
def test_idempotent(case, norm):
    x, u, epsilon = case
    once = BALLS[norm].project(x, u, epsilon)
    twice = BALLS[norm].project(x, once, epsilon)
    assert (once - twice).abs().max() <= 4 * ULP + epsilon * 1e-6 * (norm == "l2")


@SETTINGS
@given(cases(), norms)
def test_allowed_images_stay(case, norm):
    x, u, epsilon = case
    inside = (x + (u - x) * 1e-6).clamp(0, 1)
    if (length(norm, inside - x) < epsilon * 0.999).all():
        assert (BALLS[norm].project(x, inside, epsilon) - inside).abs().max() <= 2 * ULP


@SETTINGS
@given(cases(np.float64), st.sampled_from(["linf", "l1"]), st.integers(0, 2**32))
def test_nearest_point(case, norm, seed):
    """p is the nearest point of a convex set to u iff <u - p, z - p> <= 0 for all z of the set. (l2 says it is not.)"""
    x, u, epsilon = case
    p = BALLS[norm].project(x, u, epsilon)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        z = allowed_point(x.numpy(), epsilon, norm, rng)
        slack = ((u - p) * (torch.from_numpy(z) - p)).flatten(1).sum(1)
        assert (slack <= 1e-9 * (1 + u.abs().max() ** 2)).all()


def allowed_point(x, epsilon, norm, rng):
    """A point of ball and box: towards a random corner of the box, on few or many coordinates, up to the ball."""
    delta = (rng.integers(0, 2, x.shape) - x) * (rng.random(x.shape) < rng.choice([0.2, 0.6, 1.0]))
    size = length(norm, torch.from_numpy(delta)).reshape(-1, *[1] * (x.ndim - 1))
    if norm == "linf":
        return x + np.clip(delta, -epsilon, epsilon)
    return x + delta * np.minimum(1, epsilon / np.maximum(size, 1e-300))


@SETTINGS
@given(cases(), norms)
def test_projection_uses_the_budget(case, norm):
    """Where the ball cut something, the result lies on the sphere, or every coordinate that moved lies on a wall."""
    x, u, epsilon = case
    result = BALLS[norm].project(x, u, epsilon)
    if norm == "l2":  # the clip may shorten
        return
    moved = length(norm, result.double() - x.double())
    wanted = length(norm, u.clamp(0, 1).double() - x.double())
    expected = np.minimum(wanted, epsilon)
    assert np.abs(moved - expected).max() <= 1e-6 * epsilon + 2 * rounding(norm, x)


@SETTINGS
@given(st.integers(0, 2**32), st.integers(1, 60), norms, st.floats(0.01, 1.0))
def test_steps_have_norm_one_and_ascend(seed, size, norm, sparsity):
    g = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, size)).astype(np.float32))
    step = BALLS[norm].step(g, sparsity)
    assert length(norm, step) == pytest.approx(np.ones(3), rel=1e-5)
    assert ((g.double() * step.double()).sum(1) > 0).all()
