"""The gradient loop: closed-form optima on linear models, and that it leaves everything as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from genray.attacks import ExampleDraw, GradientAttack, StreamDraw, build_attack, temporary_mode
from genray.attacks.losses import cross_entropy
from genray.config.schema import AttackConfig, EvaluationAttackConfig

NORMS = ("linf", "l2", "l1")


def draw(seed=0):
    return StreamDraw(torch.Generator().manual_seed(seed))


class TwoClasses(nn.Module):
    """Logits (m, -m) / 2 with margin m = w.x + b of class 0."""

    def __init__(self, w, b=0.0):
        super().__init__()
        self.w, self.b = (
            nn.Parameter(torch.as_tensor(w)),
            nn.Parameter(torch.as_tensor(b, dtype=torch.as_tensor(w).dtype)),
        )

    def margin(self, x):
        return x.flatten(1) @ self.w + self.b

    def forward(self, x):
        m = self.margin(x)
        return torch.stack([m, -m], 1) / 2


def small_network(dtype=torch.float32):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 64, 10),
    ).to(dtype)
    network[1].running_mean.uniform_(-0.2, 0.2)
    network[1].running_var.uniform_(0.5, 2)
    return network


def batch(size, dtype=torch.float32, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((size, 1, 8, 8))).to(dtype), torch.from_numpy(rng.integers(0, 10, size))


def length(norm, delta):
    flat = delta.double().flatten(1)
    return {"linf": flat.abs().amax(1), "l2": flat.norm(dim=1), "l1": flat.abs().sum(1)}[norm]


# --- optima --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("norm", NORMS)
def test_linear_model_closed_form(norm, start):
    """Methods H.2: the margin falls by epsilon times the dual norm of w, when no wall is near."""
    rng = np.random.default_rng(3)
    w = torch.from_numpy(rng.normal(size=27))
    dual = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().max()}[norm]
    model, epsilon = TwoClasses(w, 0.3), 0.1
    x = torch.from_numpy(0.4 + 0.2 * rng.random((6, 3, 3, 3)))
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    attack = GradientAttack(norm, epsilon, 0.04, 60, start=start, sparsity=1e-6)
    adversarial = attack(model, x, y, draw())
    change = (model.margin(adversarial) - model.margin(x)).detach() * torch.where(y == 0, 1.0, -1.0)
    assert change.tolist() == pytest.approx([-epsilon * float(dual)] * 6, rel=1e-3 if norm == "l2" else 1e-6)
    assert (length(norm, adversarial - x) <= epsilon * (1 + 1e-6)).all()


def test_the_wall_limits_the_optimum():
    """Where a coordinate can move only up to its wall, the Linf optimum is the sum over the rooms that are left."""
    w = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    model = TwoClasses(w)
    x = torch.tensor([[0.02, 0.97, 0.5, 0.0]], dtype=torch.float64)
    adversarial = GradientAttack("linf", 0.1, 0.03, 20, start="zero")(model, x, torch.tensor([0]), draw())
    assert adversarial[0].tolist() == pytest.approx([0.0, 1.0, 0.4, 0.0], abs=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
def test_result_is_allowed_and_raises_the_loss(norm, start):
    model, (x, y) = small_network().eval(), batch(16)
    epsilon = {"linf": 0.1, "l2": 0.8, "l1": 4.0}[norm]
    attack = GradientAttack(norm, epsilon, epsilon / 4, 10, start=start)
    adversarial = attack(model, x, y, draw())
    assert adversarial.shape == x.shape and adversarial.dtype == x.dtype and not adversarial.requires_grad
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (length(norm, adversarial - x) <= epsilon * (1 + 1e-6) + 64 * 2**-24).all()
    before, after = cross_entropy(model(x), y), cross_entropy(model(adversarial), y)
    assert (after > before).all() and (after - before).mean() > 0.1


# --- what it must leave alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
def test_eval_mode_touches_nothing(norm, start):
    model, (x, y) = small_network(), batch(8)
    model.train()
    model[1].eval()  # flags of the sub-modules differ
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images, labels = x.clone(), y.clone()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    randomness = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    adversarial = GradientAttack(norm, 0.3, 0.1, 4, start=start)(model, x, y, draw())
    assert not torch.equal(adversarial, x)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.full_like(p, 0.25)) and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert np.random.get_state()[1].tolist() == randomness[1] and random.getstate() == randomness[2]
    assert torch.equal(x, images) and torch.equal(y, labels)


def test_parameters_without_gradient_get_none():
    model, (x, y) = small_network(), batch(4)
    GradientAttack("linf", 0.1, 0.02, 2)(model, x, y, draw())
    assert all(p.grad is None for p in model.parameters())


def test_train_mode_moves_batch_norm():
    model, (x, y) = small_network(), batch(8)
    model.eval()
    model[3].train()
    flags, before = [m.training for m in model.modules()], model[1].running_mean.clone()
    GradientAttack("linf", 0.1, 0.02, 5, mode="train")(model, x, y, draw())
    assert int(model[1].num_batches_tracked) == 5
    assert (model[1].running_mean - before).abs().max() > 1e-3
    assert [m.training for m in model.modules()] == flags


def test_works_inside_no_grad():
    model, (x, y) = small_network(), batch(4)
    attack = GradientAttack("linf", 0.1, 0.02, 3)
    with torch.no_grad():
        inside = attack(model, x, y, draw())
    assert torch.equal(inside, attack(model, x, y, draw()))


def test_modes_come_back_after_an_error():
    model = small_network()
    model[3].eval()
    flags = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), temporary_mode(model, training=False):
        assert not any(m.training for m in model.modules())
        raise RuntimeError("on purpose")
    assert [m.training for m in model.modules()] == flags and len(set(flags)) == 2


# --- random numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_the_same_for_every_batch_size(norm, start):
    """Methods H.6, in float64 so that rounding of the batched sums cannot turn a sign."""
    model, (x, y) = small_network(torch.float64).eval(), batch(32, torch.float64)
    epsilon = {"linf": 0.1, "l2": 0.8, "l1": 4.0}[norm]
    attack = GradientAttack(norm, epsilon, epsilon / 4, 5, start=start)

    def in_batches_of(size):
        parts = [slice(i, min(i + size, 32)) for i in range(0, 32, size)]
        return torch.cat([attack(model, x[p], y[p], ExampleDraw(3, "pgd5", range(32)[p])) for p in parts])

    whole = in_batches_of(32)
    for size in (1, 7):
        assert (in_batches_of(size) - whole).abs().max() < 1e-10
    assert (attack(model, x, y, ExampleDraw(4, "pgd5", range(32))) - whole).abs().max() > 1e-4


def test_example_draws_are_keyed_by_seed_attack_and_index():
    like = torch.empty(2, 1, 4, 4)
    first = ExampleDraw(0, "pgd20", [5, 9]).uniform(like)
    assert torch.equal(ExampleDraw(0, "pgd20", [9, 5]).uniform(like), first.flip(0))
    assert not torch.equal(first[0], first[1])
    for other in (ExampleDraw(1, "pgd20", [5, 9]), ExampleDraw(0, "pgd10", [5, 9]), ExampleDraw(0, "pgd20", [6, 10])):
        assert not (other.uniform(like) == first).any()
    assert ExampleDraw(0, "pgd20", [5, 9]).normal(like).abs().max() > 1


def test_draws_continue_their_stream():
    like = torch.empty(2, 3)
    for source in (draw(), ExampleDraw(0, "a", [1, 2])):
        one, two = source.uniform(like), source.uniform(like)
        assert not (one == two).any() and 0 <= one.min() and one.max() < 1


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
def test_num_steps_is_the_number_of_forwards(num_steps):
    """The official code ignores it (methods A5)."""
    model, (x, y) = small_network(), batch(4)
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(module.training))
    GradientAttack("linf", 0.1, 0.02, num_steps)(model, x, y, draw())
    assert calls == [False] * num_steps


def first_input(attack, x, y, seed=0):
    seen, model = [], small_network()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    attack(model, x, y, draw(seed))
    return seen[0]


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_start_fills_the_ball(norm):
    x, y = batch(64)
    x = 0.4 + 0.2 * x  # away from the walls
    delta = first_input(GradientAttack(norm, 0.1, 0.02, 1), x, y) - x
    sizes = length(norm, delta)
    assert sizes.max() <= 0.1 * (1 + 1e-4) and sizes.max() > 0.095
    if norm == "linf":
        assert delta.abs().mean() == pytest.approx(0.05, rel=0.05)


def test_gaussian_start_has_standard_deviation_one_thousandth():
    x, y = batch(64)
    x = 0.4 + 0.2 * x
    delta = first_input(GradientAttack("linf", 0.1, 0.02, 1, start="gaussian"), x, y) - x
    assert float(delta.std()) == pytest.approx(0.001, rel=0.05) and abs(float(delta.mean())) < 1e-4
    assert delta.abs().max() > 0.0025  # normal, not uniform


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_start_is_clipped_to_the_box(start):
    x, y = batch(16)
    x = x.round()
    begun = first_input(GradientAttack("linf", 0.3, 0.02, 1, start=start), x, y)
    assert begun.min() >= 0 and begun.max() <= 1 and not torch.equal(begun, x)


def test_build_attack_uses_every_field():
    config = AttackConfig(
        norm="l1", epsilon=12, step_size=1, num_steps=3, start="gaussian", mode="train", sparsity=0.25
    )
    assert build_attack(config) == GradientAttack("l1", 12.0, 1.0, 3, "gaussian", "train", "cross_entropy", 0.25)
    evaluation = EvaluationAttackConfig(norm="l2", epsilon=0.5, step_size=0.1, num_steps=4)
    assert build_attack(evaluation) == GradientAttack("l2", 0.5, 0.1, 4, "uniform", "eval", "cross_entropy", 0.05)


def test_sparsity_reaches_the_step():
    model, (x, y) = small_network(), batch(4)
    x = 0.4 + 0.2 * x
    moved = {
        s: GradientAttack("l1", 0.2, 0.1, 1, start="zero", sparsity=s)(model, x, y, draw()) - x for s in (0.05, 0.5)
    }
    assert [int((moved[0.05][i].abs() > 1e-6).sum()) for i in range(4)] == [4] * 4  # ceil(0.05 * 64)
    assert [int((moved[0.5][i].abs() > 1e-6).sum()) for i in range(4)] == [32] * 4
