"""APGD as a training attack: against the authors' package from the same start, and what it promises."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, L1_projection
from torch import nn
from victims import Watched

from genray.attacks import AdaptiveAttack, StreamDraw, build_attack
from genray.attacks.losses import cross_entropy, kl_from_clean
from genray.attacks.native import ascent
from genray.config.schema import AttackConfig

EPSILON = {"linf": 0.1, "l2": 0.7, "l1": 3.0}
PACKAGE_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def draw(seed=0):
    return StreamDraw(torch.Generator().manual_seed(seed))


def victim(dtype=torch.float32, batch_norm=False):
    """A smooth network whose loss has turns within the balls, and images with some pixels at the walls."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 5)).to(dtype)
    for p in network.parameters():
        p.data *= 6
    if batch_norm:
        network.insert(1, nn.BatchNorm2d(8))
    rng = np.random.default_rng(0)
    x = torch.from_numpy((1.2 * rng.random((12, 2, 6, 6)) - 0.1).clip(0, 1)).to(dtype)
    return network.eval(), x, torch.from_numpy(rng.integers(0, 5, 12))


def packages_best(network, x, y, norm, num_steps):
    """(point of the largest loss, its loss) of one run of the package from the images themselves."""
    attack = APGDAttack(network, num_steps, PACKAGE_NORMS[norm], eps=EPSILON[norm], loss="ce", device="cpu")
    attack.init_hyperparam(x)
    points, _, losses, _ = attack.attack_single_run(x, y, x_init=None if norm == "l1" else x)
    return points.detach(), losses


@pytest.mark.parametrize("num_steps", [1, 5, 10, 17, 60])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_best_points_are_the_packages(norm, num_steps):
    """In float64, where rounding decides nothing."""
    network, x, y = victim(torch.float64)
    expected, losses = packages_best(network, x, y, norm, num_steps)
    found = AdaptiveAttack(norm, EPSILON[norm], num_steps)(network, x, y, draw())
    assert (found - expected).abs().max() < 1e-5
    assert torch.allclose(cross_entropy(network(found), y), losses, atol=1e-5)


@pytest.mark.parametrize("num_steps", [5, 10, 17, 60])
def test_best_l1_points_are_the_packages(num_steps, monkeypatch):
    """Without noise it starts at the image, with a share of 0.2. Its rounding sets the sparsity, so we take its own."""
    network, x, y = victim()
    monkeypatch.setattr(ascent, "l1_shrinkage", L1_projection)
    with monkeypatch.context() as silent:
        silent.setattr(torch, "randn", lambda *shape, **_: torch.zeros(*shape))
        expected, losses = packages_best(network, x, y, "l1", num_steps)
    found = AdaptiveAttack("l1", EPSILON["l1"], num_steps, sparsity=0.2)(network, x, y, draw())
    same = (found - expected).abs().flatten(1).amax(1) < 1e-4
    assert same.sum() >= (12 if num_steps < 60 else 11)  # in float32 a late decision may differ
    assert torch.allclose(cross_entropy(network(found), y), losses, rtol=1e-2)


def test_first_l1_step_moves_the_share_that_was_asked_for():
    network, x, y = victim()
    x = x.clamp(0.2, 0.8)
    for sparsity, pixels in ((None, 4), (0.25, 18), (1.0, 72)):  # of 72: 5 % are 3.6
        config = AttackConfig(algorithm="apgd", norm="l1", epsilon=Fraction(1, 10), num_steps=1, sparsity=sparsity)
        watched = Watched(network)
        build_attack(config)(watched, x, y, draw())
        start, first = watched.seen
        assert torch.equal(start, x) and ((first - x) != 0).flatten(1).sum(1).tolist() == [pixels] * 12
        assert (first - x).abs().flatten(1).sum(1).tolist() == pytest.approx([0.1] * 12, rel=1e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("norm", EPSILON)
def test_the_best_of_all_points_is_returned(norm, start, loss):
    """Of the start and every step, judged anew by a slow maximum; all lie in ball and box; nothing else changes."""
    network, x, y = victim(batch_norm=True)
    network.train()
    state, randomness = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    images, watched = x.clone(), Watched(network).train()
    config = AttackConfig(algorithm="apgd", norm=norm, epsilon=EPSILON[norm], num_steps=8, start=start)
    found = build_attack(config, loss)(watched, x, y, draw(3))
    assert network.training and torch.equal(x, images) and not found.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters()) and torch.equal(torch.get_rng_state(), randomness)

    points = watched.seen[1:] if loss == "kl" else watched.seen  # the first pass is the clean one
    graded = watched.graded[-len(points) :]
    assert len(points) == 9 and all(graded[:8]) and not graded[8]
    assert torch.equal(points[0], x) == (start == "zero")
    network.eval()
    with torch.no_grad():
        target = network(x) if loss == "kl" else y
        losses = [(kl_from_clean if loss == "kl" else cross_entropy)(network(p), target).tolist() for p in points]
    for n in range(12):
        at = max(range(9), key=lambda i: losses[i][n])
        assert (found[n] - points[at][n]).abs().max() < 1e-6
    delta = (found - x).double().flatten(1)
    length = {"linf": delta.abs().amax(1), "l2": delta.norm(dim=1), "l1": delta.abs().sum(1)}[norm]
    assert (length <= EPSILON[norm] * (1 + 1e-6) + 72 * 2**-24).all() and found.min() >= 0 and found.max() <= 1
    assert length.max() > 0.9 * EPSILON[norm]


def test_draws_are_of_the_stream():
    network, x, y = victim()
    attack = AdaptiveAttack("l2", 0.7, 4, start="uniform")
    one, again, other = (attack(network, x, y, draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("norm", EPSILON)
def test_mode_and_memory_format(norm):
    network, x, y = victim(batch_norm=True)
    watched = Watched(network)
    x = x.contiguous(memory_format=torch.channels_last)
    AdaptiveAttack(norm, EPSILON[norm], 3, mode="train")(watched, x, y, draw())
    assert network[1].num_batches_tracked == 4 and not network.training
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in watched.seen)
