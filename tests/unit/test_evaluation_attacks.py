"""The evaluation suite: momentum and margin loss, the registry of columns, the cascade."""

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from genray.attacks import ExampleDraw, GradientAttack, StreamDraw
from genray.attacks.losses import LOSSES, cross_entropy
from genray.core.rng import key_seed
from genray.errors import ConfigError, InputError
from genray.evaluation import suite
from genray.evaluation.suite import (
    COLUMNS,
    AttackSettings,
    block_seed,
    build_evaluation_attack,
    cascade,
    expand_names,
)
from genray.types import ThreatModel

NORMS = ("linf", "l2", "l1")


def settings(norm="linf", epsilon=0.1, num_classes=10, seed=0, **others):
    return AttackSettings(ThreatModel(norm, epsilon), num_classes, seed, **others)


def built(name, *args, **how):
    return build_evaluation_attack(name, settings(*args, **how))


def network(dtype=torch.float32, num_classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(36, num_classes)
        return nn.Sequential(*layers).to(dtype).eval()


def batch(model, size, dtype=torch.float32):
    """Random images with the model's own answers as labels, but for the last one."""
    x = torch.from_numpy(np.random.default_rng(2).random((size, 1, 8, 8))).to(dtype)
    y = model(x).argmax(1)
    y[-1] = (y[-1] + 1) % model[-1].out_features
    return x, y


def linear(dtype=torch.float64):
    """A two-class linear model of 1 x 8 x 8 images, and w with w.(x - 1/2) = z_0 - z_1."""
    layer = nn.Linear(64, 2).to(dtype)
    layer.weight.data = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 64))).to(dtype)
    layer.bias.data = -layer.weight.data @ torch.full((64,), 0.5, dtype=dtype)
    return nn.Sequential(nn.Flatten(), layer).eval(), layer.weight.data[0] - layer.weight.data[1]


def draw(seed=0):
    return StreamDraw(torch.Generator().manual_seed(seed))


# --- momentum -------------------------------------------------------------------------------------------------------


def slow_mim(model, x, y, start, *, norm, epsilon, step_size, num_steps, mu):
    """Methods D3 in numpy, one example and one step at a time."""
    results = []
    for image, label, point in zip(x.numpy(), y, start.numpy()):
        g = np.zeros_like(image)
        for _ in range(num_steps):
            leaf = torch.from_numpy(point[None].copy()).requires_grad_()
            nn.functional.cross_entropy(model(leaf), label[None]).backward()
            gradient = leaf.grad[0].numpy()
            g = mu * g + gradient / np.mean(np.abs(gradient))
            direction = np.sign(g) if norm == "linf" else g / np.sqrt(np.sum(g**2))
            delta = point + step_size * direction - image
            if norm == "linf":
                delta = np.clip(delta, -epsilon, epsilon)
            else:
                delta = delta * min(1.0, epsilon / np.sqrt(np.sum(delta**2)))
            point = np.clip(image + delta, 0, 1)
        results.append(point)
    return torch.from_numpy(np.stack(results))


@pytest.mark.parametrize("mu", [0.5, 1.0])
@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.6)])
def test_mim_is_the_slow_loop(norm, epsilon, mu):
    model = network(torch.float64)
    x, y = batch(model, 5, torch.float64)
    attack = GradientAttack(norm, epsilon, epsilon / 4, 12, momentum=mu)
    begun = GradientAttack(norm, epsilon, 0.0, 1)(model, x, y, draw())  # the start itself: a step of length 0
    expected = slow_mim(model, x, y, begun, norm=norm, epsilon=epsilon, step_size=epsilon / 4, num_steps=12, mu=mu)
    found = attack(model, x, y, draw())
    assert (found - expected).abs().max() < 1e-9
    without = GradientAttack(norm, epsilon, epsilon / 4, 12)(model, x, y, draw())
    assert (found - without).abs().max() > 1e-3


class FlatFar(nn.Module):
    """Gradient w up to a margin of 0, none below."""

    def forward(self, x):
        margin = (x.flatten(1).sum(1) - 1).clamp_min(0)
        return torch.stack([margin, -margin], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradients_are_harmless(norm):
    x = torch.stack([torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 0.6)])  # the first has no gradient at all
    attack = GradientAttack(norm, 0.5, 0.2, 6, start="zero", momentum=1.0)
    found = attack(FlatFar(), x, torch.tensor([0, 0]), draw())
    assert torch.equal(found[0], x[0]) and found.isfinite().all() and found[1].mean() < 0.4


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_confident_networks_tiny_gradients_count(mu):
    """Gradients of 1e-40, below the smallest normal number, still have a direction."""
    x = torch.full((1, 1, 8, 8), 0.5)

    class Tiny(nn.Module):
        def forward(self, x):
            total = x.flatten(1).sum(1) * 1e-40
            return torch.stack([total, -total], 1)

    found = GradientAttack("linf", 0.1, 0.1, 1, start="zero", momentum=mu)(Tiny(), x, torch.tensor([0]), draw())
    assert found.flatten().tolist() == pytest.approx([0.4] * 64)


# --- margin loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_margin_loss_by_numpy(num_classes):
    rng = np.random.default_rng(num_classes)
    logits, labels = rng.normal(size=(50, num_classes)) * 40, rng.integers(0, num_classes, 50)
    expected = []
    for z, label in zip(logits, labels):
        margin = z[label] - max(value for j, value in enumerate(z) if j != label)
        expected.append(-max(margin + 50, 0))
    found = LOSSES["margin"](torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert 0 < expected.count(0) < 50, "both sides of the clamp"


def test_margin_gradient_is_the_difference_of_two_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [100.0, 0.0, 0.0]], requires_grad=True)
    LOSSES["margin"](logits, torch.tensor([0, 0, 1])).sum().backward()
    assert logits.grad.tolist() == [[-1, 0, 1], [-1, 1, 0], [0, 0, 0]]  # the last is lost by more than 50


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, norm",
    [("pgd20", n) for n in NORMS] + [("pgd100", n) for n in NORMS] + [("mim", "linf"), ("mim", "l2"), ("cw", "linf")],
)
def test_own_attacks_reach_the_closed_form(name, norm):
    """Methods H.2: the margin of a linear model falls by epsilon times the dual norm of w, when no wall is near."""
    model, w = linear()
    dual = {"linf": w.abs().sum(), "l2": w.norm(), "l1": w.abs().amax()}[norm]
    x = 0.5 + 0.05 * torch.from_numpy(np.random.default_rng(5).normal(size=(6, 1, 8, 8)))
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    attack, _ = built(name, norm, 0.1, num_classes=2, seed=4)
    found = attack(model, x, y, range(6))
    fall = ((x - found).flatten(1) @ w) * torch.where(y == 0, 1.0, -1.0)
    # Four pixels share each l1 step, so l1 comes close only; l2 closes in on the optimum step by step.
    low = {"linf": 1 - 1e-9, "l2": 0.995, "l1": 0.75}[norm]
    assert ((fall / (0.1 * dual) <= 1 + 1e-9) & (fall / (0.1 * dual) >= low)).all()


@pytest.mark.parametrize("num_classes", [2, 3])
def test_cascade_with_few_classes_is_the_closed_form(num_classes):
    """A third class that never wins changes nothing; the members that need more classes are replaced."""
    model, w = linear(torch.float32)
    reach = 0.02 * float(w.abs().sum())
    margins = torch.tensor([-0.1, 0.6, 0.97, 1.02, 1.5]) * reach
    x = 0.5 + margins.view(-1, 1, 1, 1) * (w / w.square().sum()).view(1, 1, 8, 8)
    y = torch.zeros(5, dtype=torch.int64)
    if num_classes == 3:
        model[1] = wider(model[1])
    found, flags = cascade(model, x, y, range(5), settings(epsilon=0.02, num_classes=num_classes))
    assert flags["natural"].tolist() == [False, True, True, True, True]
    assert flags["square"].tolist() == [False, False, False, True, True]
    assert (model(found).argmax(1) == y).tolist() == flags["square"].tolist()
    assert torch.equal(found[[0, 3, 4]], x[[0, 3, 4]])


def wider(layer):
    wide = nn.Linear(64, 3)
    wide.weight.data = torch.cat([layer.weight.data, torch.zeros(1, 64)])
    wide.bias.data = torch.cat([layer.bias.data, torch.tensor([-30.0])])
    return wide


# --- the registry ---------------------------------------------------------------------------------------------------


def test_columns_are_in_the_papers_order():
    order = ["pgd20", "pgd100", "mim", "cw", "apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square", "aa"]
    assert list(COLUMNS) == order and expand_names(["paper"], "linf") == order
    assert expand_names(["standard"], "l1") == ["aa"]
    assert expand_names(["aa", "pgd100", "standard", "pgd20", "aa"], "l2") == ["pgd20", "pgd100", "aa"]
    assert expand_names(["paper"], "l2") == [n for n in order if n != "cw"]
    assert expand_names(["paper"], "l1") == [n for n in order if n not in ("mim", "cw")]


@pytest.mark.parametrize(
    "name, norm, message",
    [
        ("pgd2", "linf", r"got 'pgd2' \(did you mean pgd20\?\)"),
        ("apgd-ce", "linf", r"did you mean apgd_ce\?"),
        ("zzz", "linf", r"expected one of pgd20, .*, aa, .*got 'zzz'$"),
        ("cw", "l2", "cw: expected norm linf, got 'l2'"),
        ("mim", "l1", "mim: expected norm linf or l2, got 'l1'"),
        ("aa", "linfty", "got 'linfty'"),
    ],
)
def test_wrong_names_and_norms(name, norm, message):
    for call in (
        lambda: built(name, norm),
        lambda: expand_names([name], norm),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)


def test_groups_of_an_unknown_norm():
    with pytest.raises(ConfigError, match="got 'linfty'"):
        expand_names(["paper"], "linfty")


@pytest.mark.parametrize("name", COLUMNS[:4])
def test_own_columns_are_what_they_say(name, monkeypatch):
    """Forward calls, step size and loss, seen from the model's side."""
    monkeypatch.setattr(
        "genray.evaluation.suite.lean_copy", lambda model: model
    )  # the copy has no hooks of the model's
    model, seen = network(), []
    x, y = batch(model, 3)
    x = 0.4 + 0.2 * x
    attack, described = built(name, epsilon=8 / 255)
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    found = attack(model, x, y, [7, 8, 9])
    handle.remove()
    steps = {"pgd20": 20, "pgd100": 100, "mim": 20, "cw": 20}[name]
    assert len(seen) == described.passes == described.num_steps == steps and described.queries == 0
    assert described.step_size == pytest.approx(2 / 255) and described.restarts == 1 and described.notes == ()
    assert described.loss == {"cw": "margin (confidence 50)"}.get(name, "cross-entropy")
    moves = [float((b - a).abs().amax()) for a, b in zip(seen, seen[1:] + [found])]
    assert max(moves) == pytest.approx(2 / 255, rel=1e-4)
    assert not torch.equal(seen[0], x) and (seen[0] - x).abs().max() <= 8 / 255 + 1e-7
    first = {"cw": LOSSES["margin"]}.get(name, cross_entropy)
    leaf = seen[0].clone().requires_grad_()
    first(model(leaf), y).sum().backward()
    by_hand = torch.clamp(seen[0] + 2 / 255 * leaf.grad.sign() - x, -8 / 255, 8 / 255) + x
    assert torch.allclose(seen[1], by_hand, atol=1e-6)
    assert built(name, step_size=0.03)[1].step_size == 0.03


def test_own_columns_do_not_depend_on_the_batch():
    model = network(torch.float64)
    x, y = batch(model, 7, torch.float64)
    for name in COLUMNS[:4]:
        attack, _ = built(name, epsilon=0.05)
        whole = attack(model, x, y, range(100, 107))
        parts = [attack(model, x[p], y[p], list(range(100, 107))[p]) for p in (slice(0, 3), slice(3, 7))]
        assert (torch.cat(parts) - whole).abs().max() < 1e-10
        assert not torch.equal(attack(model, x, y, range(7)), whole)
    by_name = {"pgd20": {}, "mim": {"momentum": 1.0}, "cw": {"loss": "margin"}}  # pgd20: as in training's evaluation
    for name, setting in by_name.items():
        attack, _ = built(name, epsilon=0.05)
        expected = GradientAttack("linf", 0.05, 0.0125, 20, **setting)(model, x, y, ExampleDraw(0, name, range(7)))
        assert torch.equal(attack(model, x, y, range(7)), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_descriptions_of_the_members(norm):
    made = {n: built(n, norm, engine="pyautoattack")[1] for n in COLUMNS[4:]}
    assert [(d.name, d.norm, d.epsilon, d.step_size, d.notes) for d in made.values()] == [
        (n, norm, 0.1, None, ()) for n in COLUMNS[4:]
    ]
    if norm != "l1":  # methods H
        wanted = [(1, 101, 1), (1, 101, 1), (9, 909, 10), (9, 900, 928), (1, 0, 5003), (20, 1910, 5942)]
    else:
        wanted = [(5, 515, 1), (5, 515, 1), (5, 515, 6), (9, 900, 928), (1, 0, 5003), (20, 1930, 5938)]
    assert [(d.restarts, d.passes, d.queries) for d in made.values()] == wanted


def test_few_classes_are_noted():
    def notes(name, num_classes):
        return built(name, num_classes=num_classes)[1].notes

    for name, few, enough in (("apgd_dlr", 2, 3), ("apgd_t", 2, 4), ("apgd_t", 3, 10)):
        (note,) = notes(name, few)
        assert note.startswith(f"{name}: ") and f"there are {few}" in note and "margin loss" in note
        assert not any("margin loss" in note for note in notes(name, enough))
    assert notes("fab_t", 3) == ("fab_t: 2 targets, one less than the classes",) and notes("fab_t", 10) == ()
    assert len(notes("aa", 3)) == 2 and notes("apgd_ce", 2) == notes("square", 2) == notes("aa", 10) == ()


@pytest.mark.parametrize("name, num_classes", [("apgd_dlr", 2), ("apgd_t", 3)])
def test_replaced_members_are_the_margin_attack(name, num_classes):
    model = network(num_classes=num_classes)
    x, y = batch(model, 3)
    attack, described = built(name, "l2", num_classes=num_classes, seed=5)
    expected = GradientAttack("l2", 0.1, 0.025, 100, loss="margin")(model, x, y, ExampleDraw(5, name, [4, 5, 6]))
    assert torch.equal(attack(model, x, y, [4, 5, 6]), expected)
    assert (described.num_steps, described.passes, described.step_size) == (100, 100, 0.025)


def test_members_seeds_are_keyed_by_attack_and_first_index(monkeypatch):
    used = []

    def record(model, x, y, *, member, seed, **others):
        used.append((member, seed))
        return x

    monkeypatch.setitem(suite.ENGINES, "genray", record)
    model = network()
    x, y = (part.flip(0) for part in batch(model, 3))  # the first is misclassified: no survivor, but still the key
    for name in ("apgd_ce", "fab_t"):
        built(name, seed=3)[0](model, x, y, [40, 41, 9])
    assert used == [(n, key_seed(3, "attack", n, 40)) for n in ("apgd_ce", "fab_t")]
    used.clear()
    cascade(model, x, y, [40, 41, 9], settings(seed=3))
    assert used == [(n, key_seed(3, "attack", "aa", 0)) for n in ("apgd_ce", "apgd_t", "fab_t", "square")]


# --- the cascade ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm, package, epsilon, picked",
    [
        ("linf", "Linf", 0.02, [0, 11, 17, 1, 3, 63]),
        ("l2", "L2", 0.12, [0, 11, 17, 1, 3, 63]),  # nothing is left for Square here and below: it is slow in l2 and l1
        ("l1", "L1", 0.5, [14, 20, 32, 0, 1, 63]),
    ],
)
def test_cascade_is_the_packages_standard_version(norm, package, epsilon, picked):
    """Same survivors and the same points, on one block and with the same seed."""
    model = network()
    x, y = (part[picked] for part in batch(model, 64))
    indices = torch.arange(20, 26)
    found, flags = cascade(model, x, y, indices, settings(norm, epsilon, seed=2, engine="pyautoattack"))
    reference = AutoAttack(model, norm=package, eps=epsilon, seed=block_seed(2, "aa", 0), version="standard")
    with torch.random.fork_rng():
        expected = reference.run_standard_evaluation(x, y)[0]
    assert flags["square"].tolist() == (model(expected).argmax(1) == y).tolist()
    assert (found - expected).abs().max() < 1e-6
    assert list(flags) == ["natural", "apgd_ce", "apgd_t", "fab_t", "square"]
    for earlier, later in zip(list(flags.values()), list(flags.values())[1:]):
        assert not (later & ~earlier).any()
    assert [int(values.sum()) for values in flags.values()][:2] == [5, 3], "APGD-CE should leave some"
    assert int(flags["apgd_t"].sum()) < 3, "of which APGD-T should break some"


def test_aa_column_is_the_cascade_and_takes_empty_blocks():
    model = network()
    x, y = batch(model, 4)
    attack, _ = built("aa", epsilon=0.3)
    assert torch.equal(attack(model, x, y, range(4)), cascade(model, x, y, range(4), settings(epsilon=0.3))[0])
    for name in COLUMNS:
        empty = built(name, epsilon=0.3)[0](model, x[:0], y[:0], [])
        assert empty.shape == (0, 1, 8, 8)
    _, flags = cascade(model, x[:0], y[:0], [], settings(epsilon=0.3))
    assert all(len(values) == 0 for values in flags.values())
