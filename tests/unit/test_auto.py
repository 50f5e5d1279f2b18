"""The members of AutoAttack: against closed forms, against the package run by itself, and what they leave alone."""

import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.square import SquareAttack
from torch import nn
from victims import linear

from genray.attacks.auto import MEMBERS, _square_fits, passes, run_member, targets
from genray.errors import ConfigError, InputError

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.03, "l2": 0.12, "l1": 0.5}
PACKAGE = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LENGTH = {
    "linf": lambda v: v.double().flatten(1).abs().amax(1),
    "l2": lambda v: v.double().flatten(1).norm(dim=1),
    "l1": lambda v: v.double().flatten(1).abs().sum(1),
}


def network(num_classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(36, num_classes))
        model[1].running_mean.uniform_(-0.2, 0.2)
        model[1].running_var.uniform_(0.05, 0.2)
    return model.eval()


def batch(model, size):
    """Random images whose labels are the model's own answers, but for the last one."""
    x = torch.from_numpy(np.random.default_rng(2).random((size, 1, 8, 8), dtype=np.float32))
    x[0] = x[0].round()  # on the walls
    y = model(x).argmax(1)
    y[-1] = (y[-1] + 1) % model[-1].out_features
    return x, y


def correct(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).tolist()


# --- closed forms ---------------------------------------------------------------------------------------------------


# --- the package by itself ------------------------------------------------------------------------------------------


def directly(model, x, y, norm, members=None, seed=11):
    suite = AutoAttack(model, norm=PACKAGE[norm], eps=EPSILON[norm], seed=seed, version="standard")
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 4  # of five classes
    if members:
        suite.attacks_to_run = members
    with torch.random.fork_rng():
        return suite.run_standard_evaluation(x, y)[0]


# Square in l2 and l1, where the package takes its time: test_native_square.py.
PAIRS = [(norm, member) for norm in NORMS for member in MEMBERS if member != "square" or norm == "linf"]


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "member"), PAIRS)
def test_a_member_is_the_package_and_leaves_everything_alone(norm, member):
    """Same points as AutoAttack's own run; in ball and box; modes, gradients, buffers and randomness untouched."""
    model = network(5)
    x, y = batch(model, 6)
    expected = directly(network(5), x, y, norm, [member.replace("_", "-")])
    model.train()
    model[1].eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i != 2)
        p.grad = torch.full_like(p, 0.25) if i % 2 else None
    state, images, labels = snapshot(model), x.clone(), y.clone()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    randomness = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = run_member(model, x, y, member=member, norm=norm, epsilon=EPSILON[norm], seed=11, num_classes=5)
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert np.random.get_state()[1].tolist() == randomness[1] and random.getstate() == randomness[2]
    assert torch.equal(x, images) and torch.equal(y, labels) and same(snapshot(model), state)
    assert not found.requires_grad and found.dtype == x.dtype and torch.is_grad_enabled()
    assert found.min() >= 0 and found.max() <= 1
    assert (LENGTH[norm](found - x) <= EPSILON[norm] * (1 + 1e-6) + 2**-24).all()
    model.eval()
    assert correct(model, found, y) == correct(model, expected, y) and (found - expected).abs().max() < 1e-6
    assert 0 < sum(correct(model, found, y)) < 5, "the radius should break some"


def snapshot(model):
    return [
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [v.clone() for v in model.state_dict().values()],
    ]


def same(one, two):
    flat = [(a, b) for left, right in zip(one, two) for a, b in zip(left, right)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b for a, b in flat)


def test_state_comes_back_after_an_error():
    model = network(3)  # fewer outputs than announced: the package fails in its target loop
    x, y = batch(model, 3)
    before, rng = snapshot(model.train()), torch.get_rng_state()
    with pytest.raises(IndexError):
        run_member(model, x, y, member="fab_t", norm="linf", epsilon=1e-4, seed=0, num_classes=10)
    assert same(snapshot(model), before) and torch.equal(torch.get_rng_state(), rng)
    assert not logging.getLogger("auto-attack").disabled and torch.is_grad_enabled()


@pytest.mark.slow
def test_no_example_and_radius_zero():
    model = network()
    x, y = batch(model, 3)
    how = {"norm": "linf", "seed": 0, "num_classes": 10}
    for member in ("apgd_ce", "apgd_dlr", "apgd_t", "fab_t"):
        nobody = None  # a model need not take an empty batch
        assert run_member(nobody, x[:0], y[:0], member=member, epsilon=0.1, **how).shape == (0, 1, 8, 8)
        assert torch.equal(run_member(model, x, y, member=member, epsilon=0.0, **how), x)


class Saturated(nn.Module):
    """Its logits do not move with the image: the package warns of zero gradients."""

    def forward(self, x):
        return x.flatten(1)[:, :5] * 0 + torch.arange(5.0)


def test_no_output(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([4, 4])
    run_member(Saturated(), x, y, member="apgd_dlr", norm="linf", epsilon=0.1, seed=0, num_classes=5)
    assert capfd.readouterr() == ("", "") and not caplog.records


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [5])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("member", ["apgd_ce", "apgd_dlr", "apgd_t", "fab_t"])
def test_passes_are_what_an_unbroken_example_costs(member, norm, num_classes):
    model, _ = linear(num_classes)
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y, calls = model(x).argmax(1), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run_member(model, x, y, member=member, norm=norm, epsilon=1e-6, seed=0, num_classes=num_classes)
    assert (sum(calls), len(calls) - sum(calls)) == passes(member, norm, num_classes)


@pytest.mark.slow
def test_passes_of_square():
    model, _ = linear()
    x = torch.full((1, 1, 8, 8), 0.4)
    y, calls = model(x).argmax(1), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run_member(model, x, y, member="square", norm="linf", epsilon=1e-6, seed=0, num_classes=2)
    assert len(calls) == 5003 and not any(calls) and passes("square", "linf", 2) == (0, 5003)


# --- few classes and odd sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("member, num_classes", [("apgd_dlr", 2), ("apgd_t", 2), ("apgd_t", 3)])
def test_too_few_classes_are_refused_by_name(member, num_classes):
    model, _ = linear(num_classes)
    x = torch.full((1, 1, 8, 8), 0.4)
    with pytest.raises(InputError, match=f"{member}: .* got {num_classes}"):
        run_member(
            model, x, torch.tensor([0]), member=member, norm="linf", epsilon=0.1, seed=0, num_classes=num_classes
        )


def test_number_of_targets():
    wanted = {("apgd_t", "linf", 100): 9, ("apgd_t", "l1", 100): 5, ("fab_t", "l1", 100): 9, ("apgd_t", "l2", 4): 3}
    wanted |= {("fab_t", "l2", 2): 1, ("apgd_t", "l1", 5): 4, ("apgd_t", "l1", 6): 5, ("fab_t", "linf", 10): 9}
    assert {key: targets(*key) for key in wanted} == wanted


@pytest.mark.parametrize("size", [(n, n) for n in range(3, 33)] + [(28, 30), (28, 20), (8, 14), (32, 64)])
def test_square_refuses_just_the_sizes_the_package_fails_on(size):
    x = torch.full((1, 1, *size), 0.5)
    attack = SquareAttack(lambda v: torch.eye(2)[[0] * len(v)], "L2", n_queries=1, eps=0.1, device="cpu")
    try:
        with torch.random.fork_rng():
            attack.perturb(x, torch.tensor([0]))
        fits = True
    except (RuntimeError, ZeroDivisionError):
        fits = False
    assert _square_fits(*size) == fits
    if not fits:
        with pytest.raises(ConfigError, match=f"square: .* {size[0]} x {size[1]}"):
            run_member(None, x, None, member="square", norm="l1", epsilon=0.1, seed=0, num_classes=2)


@pytest.mark.slow
def test_package_is_imported_only_when_it_runs():
    code = "import sys; sys.modules['pyautoattack'] = None; import genray.attacks, genray.evaluation.suite"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
