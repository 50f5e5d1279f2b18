"""Between the first and the last step of a window no training step waits for the device, whatever the objective.

The learners compute on a CPU as on a GPU (`reads_are_free` says no) under a guard that refuses what would wait there.
"""

import sys
from unittest import mock

import pytest
import torch
from all_objectives import L1, L2, LEARNERS, LINF, make_learner, partly_labelled
from small_learners import small_network
from waits import Waits, no_waiting, of_host

from genray.attacks import StreamDraw
from genray.attacks.friendly import FriendlyAttack
from genray.core import geometry
from genray.data.order import Batches
from genray.objectives import OBJECTIVES
from genray.objectives.e_at import Count

# Their numbers are in host memory on a GPU too: the order of the examples, what E-AT has counted (copied as the device
# gets there), and Adam's number of steps.
ON_HOST = (
    (Batches, "__call__"),
    (Count, "read"),
    (sys.modules["torch.optim.adam"], "_get_value"),
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("genray.core.waiting.reads_are_free", lambda tensor: False)


@pytest.fixture(scope="module")
def train():
    return partly_labelled()


def run_guarded(learner, steps=4):
    """Takes `steps` steps, all but the first under the guard; returns how many were guarded."""
    take, guarded = learner._take_step, []

    def under_guard(step):
        if step == 0:
            return take(step)
        guarded.append(step)
        with no_waiting():
            return take(step)

    patches = [mock.patch.object(owner, name, of_host(getattr(owner, name))) for owner, name in ON_HOST]
    with mock.patch.object(learner, "_take_step", under_guard):
        for patch in patches:
            patch.start()
        try:
            learner.run_window(0, steps)
        finally:
            for patch in patches:
                patch.stop()
    return len(guarded)


def test_every_objective_is_here():
    named = [learner["objective"] for learner in LEARNERS.values()]
    assert {name if isinstance(name, str) else name["name"] for name in named} == set(OBJECTIVES)


@pytest.mark.parametrize("name", LEARNERS)
def test_no_step_waits(name, train):
    learner = make_learner(LEARNERS[name], train)
    before = learner.flat.weights.clone()
    assert run_guarded(learner) == 3
    assert not torch.equal(learner.flat.weights, before)


def test_dropout_does_not_wait(train):
    assert run_guarded(make_learner({"objective": "natural"}, train, dropout=0.5)) == 3


# --- the guard sees what would wait ---------------------------------------------------------------------------------

READS = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "bool": lambda t: bool((t > 0).all()),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.detach().numpy(),
    "mask": lambda t: t[t > 0.5],
    "masked assignment": lambda t: t.clone().__setitem__(t > 0.5, t[:0].sum()),
    "nonzero": lambda t: (t > 0.5).nonzero(),
    "where": lambda t: torch.where(t > 0.5),
    "new tensor": lambda t: torch.tensor([1.0], device=t.device),
}


@pytest.mark.parametrize("name", READS)
def test_the_guard_sees(name, train):
    learner = make_learner(LEARNERS["adversarial"], train)
    inner = learner.objective.__class__.__call__

    def reading(objective, step):
        READS[name](step.x)
        return inner(objective, step)

    with mock.patch.object(learner.objective.__class__, "__call__", reading), pytest.raises(Waits):
        run_guarded(learner)


# --- without waiting, the same --------------------------------------------------------------------------------------


@pytest.mark.parametrize("omega", [0.0, 0.01])
@pytest.mark.parametrize("tau", [0, 1, 2, 5])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_friendly_images_are_those_of_shrinking_batches(monkeypatch, norm, tau, omega):
    options = {"linf": LINF, "l2": L2, "l1": L1}[norm] | {"num_steps": 5}
    attack, network = FriendlyAttack(**options, step_noise=omega), small_network().eval().double()
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = network(x).argmax(1)
    y[::5] = (y[::5] + 1) % 10
    found = []
    for free in (True, False):
        monkeypatch.setattr("genray.core.waiting.reads_are_free", lambda tensor, free=free: free)
        found.append(attack(network, x, y, StreamDraw(torch.Generator().manual_seed(3)), tau=tau))
    assert torch.allclose(*found, rtol=0, atol=1e-12)
    assert (found[0] - x).abs().amax((1, 2, 3)).min() > 0 or tau == 0


def l1_cases():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(32, 300, generator=generator, dtype=torch.float64)
    noise = torch.randn(32, 300, generator=generator, dtype=torch.float64)
    sparse = torch.where(torch.rand(32, 300, generator=generator) < 0.05, noise, torch.zeros(()).double())
    walls = (x > 0.5).double()
    return {"noise": (x, noise), "sparse": (x, sparse), "walls": (walls, noise), "small": (x, noise * 1e-3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", l1_cases())
def test_l1_projections_are_the_same(monkeypatch, name, dtype):
    x, move = (tensor.to(dtype) for tensor in l1_cases()[name])
    fixed = geometry.l1_shrinkage(x, move, 2.0)
    monkeypatch.setattr("genray.core.waiting.reads_are_free", lambda tensor: True)
    assert torch.allclose(
        fixed, geometry.l1_shrinkage(x, move, 2.0), rtol=0, atol=1e-5 if dtype.itemsize == 4 else 1e-12
    )


def test_l1_moves_of_all_sizes_end_in_the_ball():
    """Where twenty steps are too few."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.empty(64, 3072, dtype=torch.float64).uniform_(-9, 3, generator=generator)
    x, move = torch.rand(64, 3072, generator=generator).double(), 10**powers
    with mock.patch.object(geometry, "FIXED_STEPS", 5):
        moved = move + geometry.l1_shrinkage(x, move, 1e-3)
    assert (moved.sum(1) <= 1e-3 * (1 + 1e-9)).all() and (moved >= -1e-12).all() and (x + moved <= 1 + 1e-12).all()
    assert moved.sum(1).min() > 0.99e-3
