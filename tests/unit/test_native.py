"""What holds for each of our members of AutoAttack; what is particular to one: test_native_apgd, _fab and _square."""

from functools import partial

import pytest
import torch
from torch import nn
from victims import Watched, correct, trained_on_digits

from genray.attacks.native.apgd import apgd
from genray.attacks.native.fab import fab_t
from genray.attacks.native.square import square
from genray.core.geometry import BALLS

pytestmark = pytest.mark.slow

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.15, "l2": 0.9, "l1": 2.0}  # breaks some of four classes' images
MEMBERS = {"apgd_ce": partial(apgd, member="apgd_ce"), "apgd_t": partial(apgd, member="apgd_t"), "fab_t": fab_t}
MEMBERS["square"] = partial(square, num_queries=300)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("member", MEMBERS)
def test_points_are_legal_and_nothing_else_changes(member, norm):
    model, x, y = trained_on_digits(4)
    x, y = x.clone(), y.clone()
    x[:6] = x[:6].round()  # on the walls
    y[6] = (model(x[6:7]).argmax(1) + 1) % 4  # wrong from the start
    images, labels, randomness = x.clone(), y.clone(), torch.get_rng_state()
    found = MEMBERS[member](model, x, y, norm=norm, epsilon=EPSILON[norm], seed=1, num_classes=4)
    assert torch.equal(torch.get_rng_state(), randomness) and torch.equal(x, images) and torch.equal(y, labels)
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
    length = BALLS[norm].length((found - x).double())
    assert (length <= EPSILON[norm] * (1 + 1e-6) + 2**-24).all() and found.min() >= 0 and found.max() <= 1
    moved, right = length > 0, correct(model, found, y)
    assert torch.equal(moved, ~right & correct(model, x, y)) and torch.equal(found[~moved], x[~moved])
    assert moved.any() and right.any() and not found.requires_grad


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("member", MEMBERS)
def test_no_example_radius_zero_and_all_wrong(member, norm):
    model, x, y = trained_on_digits(4)
    attack, how = MEMBERS[member], {"norm": norm, "seed": 0, "num_classes": 4}
    assert attack(None, x[:0], y[:0], epsilon=0.1, **how).shape == (0, 1, 8, 8)
    if member != "square":
        assert torch.equal(attack(model, x, y, epsilon=0.0, **how), x)
    wrong = (model(x).argmax(1) + 1) % 4
    assert torch.equal(attack(model, x, wrong, epsilon=0.1, **how), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("member", ["apgd_ce", "fab_t"])
def test_memory_format_is_the_incoming_one(member, norm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 4)).eval()
    x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, how = model(x).argmax(1), {"norm": norm, "seed": 2, "num_classes": 4}
    how["epsilon"] = {"linf": 0.02, "l2": 0.15, "l1": 1.0}[norm]
    plain, watched = MEMBERS[member](model, x, y, **how), Watched(model)
    last = MEMBERS[member](watched, x.contiguous(memory_format=torch.channels_last), y, **how)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in watched.seen)
    assert correct(model, plain, y).tolist() == correct(model, last, y).tolist()
