"""A radius per example: closed forms, one example at a time, and clip [1, 1] as the plain attack."""

import json
import math

import numpy as np
import pytest
import torch
from small_learners import BATCH, small_network, unit_config
from test_attack import TwoClasses, batch, draw, length
from test_attack import small_network as convolutions

import genray
from genray.attacks import AdaptiveAttack, FriendlyAttack, GradientAttack, StreamDraw
from genray.attacks.radii import radius_factors, steepness, with_radii
from genray.config import load_config
from genray.data.splits import Split
from genray.errors import ConfigError
from genray.learners.base_learner import BaseLearner
from genray.learners.crafting import Crafter
from genray.objectives import build_objective
from genray.run.plan import make_plan

EPSILON = {"linf": 0.11, "l2": 1.3, "l1": 4.7}
ATTACK = {"norm": "linf", "epsilon": 0.2, "step_size": 0.1, "num_steps": 2}


def attacks(norm):
    plain = {"norm": norm, "epsilon": EPSILON[norm], "num_steps": 3}
    stepping = {**plain, "step_size": EPSILON[norm] / 3}
    return {
        "pgd": GradientAttack(**stepping),
        "momentum": GradientAttack(**stepping, momentum=0.9),
        "friendly": FriendlyAttack(**stepping, step_noise=0.01),
        "apgd": AdaptiveAttack(**plain, start="uniform"),
    }


@pytest.mark.parametrize("training", [False, True])
def test_steepness_of_a_linear_model(training):
    """The gradient of CE is (1 - p_y) w."""
    x, y = batch(7, torch.float64)
    w = np.random.default_rng(1).normal(size=64)
    model, margins = TwoClasses(w, 0.3), x.flatten(1).numpy() @ w + 0.3
    expected = [np.linalg.norm(w) / (1 + math.exp(m if label == 0 else -m)) for m, label in zip(margins, y % 2)]
    assert steepness(model, x, y % 2, training).tolist() == pytest.approx(expected, rel=1e-12)


def test_factors_by_hand():
    g = [1.0, 2.0, 3.0, 10.0]  # mean 4: 4, 2, 4/3, 0.4, clipped 1.5, 1.5, 4/3, 0.5
    clipped = [1.5, 1.5, 4 / 3, 0.5]
    expected = [4 * f / sum(clipped) for f in clipped]
    assert radius_factors(torch.tensor(g).double(), (0.5, 1.5)).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("g", [[0.0, 0.0], [0.0, 1.0], [1e-310, 1e-300]])
def test_factors_of_vanishing_gradients(g):
    factors = radius_factors(torch.tensor(g, dtype=torch.float64), (0.5, 1.5))
    assert factors.mean().item() == pytest.approx(1) and bool(factors.isfinite().all()) and factors.min() > 0.3
    assert factors[0] >= factors[1]


@pytest.mark.parametrize("norm", EPSILON)
@pytest.mark.parametrize("kind", ["pgd", "momentum", "friendly", "apgd"])
def test_factors_of_one_are_the_plain_attack(kind, norm):
    (x, y), attack, model = batch(9), attacks(norm)[kind], convolutions()
    plain = attack(model, x, y, draw())
    assert torch.equal(with_radii(attack, torch.ones(9).double())(model, x, y, draw()), plain)
    assert not torch.equal(with_radii(attack, torch.full((9,), 0.5).double())(model, x, y, draw()), plain)


class Rows(StreamDraw):
    """Of the whole batch's numbers those of one example."""

    def __init__(self, row, total):
        super().__init__(torch.Generator().manual_seed(0))
        self.row, self.total = row, total

    def _rows(self, draw, like):
        shape = (self.total, *like.shape[1:])
        return draw(shape, generator=self.stream, dtype=like.dtype)[self.row : self.row + 1]


@pytest.mark.parametrize("norm", EPSILON)
@pytest.mark.parametrize("kind", ["pgd", "momentum", "friendly", "apgd"])
def test_each_example_is_attacked_as_alone_with_its_radius(kind, norm):
    (x, y), attack, model = batch(5, torch.float64), attacks(norm)[kind], convolutions(torch.float64)
    factors = torch.tensor([0.5, 1.4, 1.0, 0.7, 1.1], dtype=torch.float64)
    varied = with_radii(attack, factors)
    together = varied(model, x, y, draw())
    assert torch.all(length(norm, together - x) <= EPSILON[norm] * factors * (1 + 1e-6))
    for i, factor in enumerate(factors.tolist()):
        changes = {"epsilon": attack.epsilon * factor}
        if kind != "apgd":
            changes["step_size"] = float(varied.step_size[i])
        alone = type(attack)(**vars(attack) | changes)(model, x[i : i + 1], y[i : i + 1], Rows(i, 5))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-6), i


# --- in training -----------------------------------------------------------------------------------------------------


def learner(**changes):
    robust = {"objective": "adversarial", "lr": 0.05, "attack": {**ATTACK, **changes}}
    config = unit_config({"linf": robust}, evaluation={"attack": ATTACK})
    images = torch.randint(256, (80, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return BaseLearner("linf", make_plan(config, 80), small_network(), Split(images, torch.arange(80) % 10))


@pytest.mark.parametrize("norm", EPSILON)
@pytest.mark.parametrize("kind", ["pgd", "momentum", "friendly", "apgd"])
def test_a_radius_of_zero_leaves_the_images(kind, norm):
    (x, y), attack, model = batch(5), attacks(norm)[kind], convolutions()
    changes = {"epsilon": 0.0} | ({} if kind == "apgd" else {"step_size": 0.0})
    assert torch.allclose(type(attack)(**vars(attack) | changes)(model, x, y, draw()), x, atol=1e-7)


@pytest.mark.parametrize("radius_clip", [None, [0.5, 1.5]])
def test_a_scale_over_the_run(radius_clip):
    """Nine steps: at step 3 of [[0, 0], [2/3, 1]] half of the radius."""
    growing = learner(scale=[[0, 0], ["2/3", 1]], radius_clip=radius_clip)
    half = learner(epsilon=0.1, step_size=0.05, radius_clip=radius_clip)
    whole, seen = learner(radius_clip=radius_clip), []
    for one in (growing, half, whole):
        one.step = 3
        one.run_window(3, 4)
        seen.append(one.flat.weights.clone())
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    growing.load_state_dict({**half.state_dict(), "step": 6})
    whole.load_state_dict({**half.state_dict(), "step": 6})
    assert growing.run_window(6, 7).loss_sum == whole.run_window(6, 7).loss_sum


def test_each_of_several_attacks_has_its_scale():
    attacks = {"a": {**ATTACK, "scale": [[0, 0], [1, 1]]}, "b": {**ATTACK, "norm": "l2"}}
    config = unit_config({"linf": {"objective": "max", "lr": 0.1, "attacks": attacks}}, evaluation={"attack": ATTACK})
    crafter = Crafter("linf", make_plan(config, 80), build_objective(config.base_learners["linf"].objective))
    inner = crafter._attack("worst", 3).attacks
    assert [a.epsilon for a in inner] == pytest.approx([0.2 / 3, 0.2])
    assert [a.step_size for a in inner] == pytest.approx([0.1 / 3, 0.1])


@pytest.mark.parametrize("clip", [[1, 1], [0.5, 1.5]])
def test_a_window_of_the_learner(clip):
    plain, ours = learner(), learner(radius_clip=clip)
    without, stats = plain.run_window(0, 3), ours.run_window(0, 3)
    assert torch.equal(plain.flat.weights, ours.flat.weights) == (clip == [1, 1])
    assert without.radius_mean is None and stats.radius_mean == pytest.approx(0.2, rel=1e-12)
    assert stats.radius_spread == 0 if clip == [1, 1] else 0.01 < stats.radius_spread < 0.1


def test_radii_of_a_step_by_hand():
    """Those of the network before the step, over the batch: the largest change of an image is its radius."""
    ours, seen = learner(radius_clip=[0.5, 1.5], num_steps=20), {}
    x, y = ours.loader.batch(0)
    network = small_network().eval()
    inputs = x.clone().requires_grad_(True)
    losses = torch.nn.functional.cross_entropy(network(inputs), y, reduction="none")
    g = torch.autograd.grad(losses.sum(), inputs)[0].flatten(1).norm(dim=1)
    factors = (g.mean() / g).clamp(0.5, 1.5)
    objective = ours.objective

    def recorded(step):
        seen["images"] = step.craft("attack")
        return objective(step)

    ours.objective = recorded
    recorded.state_dict, recorded.load_state_dict = objective.state_dict, objective.load_state_dict
    stats = ours.run_window(0, 1)
    radii = 0.2 * factors / factors.mean()
    assert len(x) == BATCH and stats.radius_spread == pytest.approx(radii.std(correction=0).item(), rel=1e-4)
    assert torch.allclose((seen["images"] - x).flatten(1).abs().amax(1), radii, rtol=1e-3)


def test_the_metrics_of_a_run(small_run, tmp_path):
    overrides = [*small_run, "base_learners.linf.attack.radius_clip=[0.5, 1.5]"]
    genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    config = load_config(tmp_path / "digits" / "config.yaml")
    lines = [json.loads(line) for line in (tmp_path / "digits" / "metrics.jsonl").read_text().splitlines()]
    epsilon = float(config.base_learners["linf"].attack.epsilon)
    for line in lines:
        robust = line["learners"]["linf"]
        assert robust["radius_mean"] == pytest.approx(epsilon) and 0 < robust["radius_spread"] < epsilon
        assert "radius_mean" not in line["learners"]["natural"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["radius_clip=[1.1, 1.5]"], "attack.radius_clip: expected [smallest, largest] around 1, got [1.1, 1.5]"),
        (["radius_clip=[0.5, 0.9]"], "attack.radius_clip: expected [smallest, largest] around 1, got [0.5, 0.9]"),
        (["radius_clip=[0, 1]"], "attack.radius_clip[0]: expected a number above 0, got 0"),
        (["radius_clip=2"], "attack.radius_clip: expected a list of 2 numbers or null above 0, got 2"),
        (
            ["attack=null", "objective=avg", f"attacks.a={json.dumps({**ATTACK, 'radius_clip': [1, 1]})}"],
            "attacks: expected no radius_clip with objective avg, which has one radius a norm",
        ),
    ],
)
def test_wrong_input(overrides, line):
    where = "base_learners.linf."
    named = [where + ("attack." if o.startswith("radius") else "") + o for o in overrides]
    with pytest.raises(ConfigError) as error:
        load_config(None, named)
    assert str(error.value).splitlines()[-1].strip().removeprefix("- ") == where + line
