"""Our Square against the authors' package: the same candidates, the same points, the same verdicts."""

import pytest
import torch
import torch.nn.functional as F
from pyautoattack.square import SquareAttack
from torch import nn

from genray.attacks import auto
from genray.attacks.auto import PACKAGE_NORMS, run_member
from genray.attacks.native import square as module
from genray.attacks.native.square import square
from genray.attacks.native.square_moves import Patterns, Squares, bump
from genray.data.datasets import load_image_data
from genray.models import build_model
from genray.models.attack_copy import AttackCopy

pytestmark = pytest.mark.slow  # runs the package beside ours

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.07, "l2": 0.4, "l1": 1.5}  # breaks about half of the digits
QUERIES = {"linf": 2000, "l2": 800, "l1": 600}  # of 5,000: the package takes its time


@pytest.fixture(scope="module")
def trained():
    """A small network trained on the digits, and test digits."""
    data = load_image_data("digits", test_examples=120)
    x, y = data.train.images.float() / 255, data.train.labels
    model = build_model(
        "small_cnn", num_classes=10, in_channels=1, image_size=(8, 8), width=4, batch_norm=True, dropout=0.0, seed=0
    )
    steps, stream = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), torch.Generator().manual_seed(0)
    for _ in range(150):
        of = torch.randint(len(x), (64,), generator=stream)
        noise = 0.2 * torch.rand((64, 1, 8, 8), generator=stream) - 0.1
        steps.zero_grad()
        F.cross_entropy(model((x[of] + noise).clamp(0, 1)), y[of]).backward()
        steps.step()
    return model.eval().requires_grad_(False), data.test.images.float() / 255, data.test.labels


@pytest.fixture
def victim(trained):
    """The network and 36 digits, most of which it gets right."""
    model, x, y = trained
    return model, x[:36], y[:36]


def how(norm, seed=3, epsilon=None):
    return {"norm": norm, "epsilon": epsilon or EPSILON[norm], "seed": seed, "num_classes": 10}


def right(model, x, y):
    return (model(x).argmax(1) == y).tolist()


def package_points(model, x, y, norm, queries, seed=3):
    """The package's best points of all examples, broken or not."""
    attack = SquareAttack(
        model, PACKAGE_NORMS[norm], queries, EPSILON[norm], seed=seed, resc_schedule=False, device="cpu"
    )
    attack.init_hyperparam(x)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return attack.attack_single_run(x, y)[1]


# --- the package ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_same_verdicts_as_the_package(norm, victim, monkeypatch):
    """Each engine with its own arithmetic: ours on folded weights."""
    model, x, y = victim
    standard = auto._standard

    def shorter(*args):
        attack = standard(*args)
        assert attack.n_queries == 5000
        attack.n_queries = QUERIES[norm]
        return attack

    monkeypatch.setattr(auto, "_standard", shorter)
    theirs = run_member(model, x, y, member="square", **how(norm))
    ours = square(AttackCopy(model), x, y, **how(norm), num_queries=QUERIES[norm])
    assert right(model, ours, y) == right(model, theirs, y)
    robust = sum(right(model, ours, y))
    assert 5 < robust < 30, "both kinds of verdict should occur"


@pytest.fixture(params=["digits", "colour"])
def some(request, victim):
    """A network with correctly classified images: digits, or random ones of three channels under random weights."""
    if request.param == "digits":
        model, x, y = victim
        correct = model(x).argmax(1) == y
        return model, x[correct], y[correct]
    model = build_model("resnet18", num_classes=10, in_channels=3, image_size=(15, 16), width=2, seed=0)
    model.eval().requires_grad_(False).linear.weight *= 20
    x = torch.rand((8, 3, 15, 16), generator=torch.Generator().manual_seed(1))
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("queries", [1, 12, 150])
def test_same_points_as_the_package(norm, queries, some):
    """Of the broken as returned; of the others where the search stands. (Later, ties are decided by rounding.)"""
    model, x, y = some
    theirs = package_points(model, x, y, norm, queries)
    numbers = torch.Generator().manual_seed(3)
    moves = (Squares if norm == "linf" else Patterns)(x, EPSILON[norm], numbers, norm)
    run = module._SearchState(model, model, moves, y)
    with torch.no_grad():
        points = run(queries)
    points[run.at] = run.images
    # The package's l1 projection is off by up to 4e-5 of the radius, which adds up.
    assert (points - theirs).abs().amax() < (3e-4 if norm == "l1" else 1e-5)
    assert len(run.at) > 0 and (points != x).flatten(1).any(1).all()
    assert len(run.at) < len(x) or queries < 150 or x.shape[1] == 3, "some digits should fall"


def test_an_unbroken_example_costs_one_forward_a_query_and_two_more():
    calls = []

    def model(x):
        calls.append(len(x))
        return torch.stack([x.sum((1, 2, 3)) + 1000, -x.sum((1, 2, 3))], 1)

    x, y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    assert torch.equal(square(model, x, y, **how("l2"), num_queries=7), x)
    assert calls == [2] + [1] * 8


# --- what it returns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("others", [0.0, -1.0])
def test_no_margin_above_zero_at_the_start(norm, others):
    """The package stops with an error in l2 and l1. A tie is no break: the first class wins it."""

    def model(x):
        moved = (x - 0.5).abs().amax((1, 2, 3)) > 0
        low = torch.tensor([0.0, others])[(x.mean((1, 2, 3)) > 2).long()]
        first = torch.where(moved & (x[:, 0, 0, 0] != 0.25), low, 1.0)
        return torch.stack([first, torch.zeros_like(first)], 1)

    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(square(model, x, y, **how(norm), num_queries=5), x)


def test_linf_takes_any_size():
    x = torch.full((1, 3, 14, 9), 0.5)
    found = square(
        lambda v: torch.stack([1.1 - v[:, 0, 3, 3] * 2, 0 * v[:, 0, 0, 0]], 1), x, torch.tensor([0]), **how("linf")
    )
    assert found[0, 0, 3, 3] > 0.55


# --- a cheaper network searches -------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Takes examples of class y for broken too early: the logit of the class is lower than it should be."""

    def __init__(self, model, y, by):
        super().__init__()
        self.model, self.y, self.by = model, y, by

    def forward(self, x):
        return self.model(x) - self.by * F.one_hot(self.y, 10)


@pytest.mark.parametrize("norm", NORMS)
def test_a_search_that_claims_too_much_changes_nothing(norm, trained):
    """With all margins shifted the search goes the same way, and its early claims are neither believed nor final."""
    model, x, y = trained
    eights = y == 8
    x, y = x[eights], y[eights]
    search = Shifted(model, torch.tensor(8), by=1.0)
    true = square(model, x, y, **how(norm), num_queries=400)
    found = square(model, x, y, search=search, **how(norm), num_queries=400)
    assert 0 < sum(right(model, true, y)) < len(y)
    assert (found - true).abs().amax() < 1e-6


def test_a_liar_reports_nothing(victim):
    model, x, y = victim
    found = square(model, x, y, search=lambda v: -model(v), **how("linf", epsilon=1e-4), num_queries=50)
    assert torch.equal(found, x)


@pytest.mark.parametrize("norm", NORMS)
def test_who_only_looks_broken_is_scored_by_the_model(norm, victim):
    """No later candidate would ever beat a score that is too low, as the lowest of many rounded scores is."""
    model, x, y = victim
    true = square(model, x, y, **how(norm), num_queries=100)
    found = square(model, x, y, search=lambda v: torch.zeros(len(v), 10), **how(norm), num_queries=100)
    assert (found - true).abs().amax() < 1e-6 and not torch.equal(true, x)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_search_finds_as_many(norm, victim):
    model, x, y = victim
    count = sum(right(model, square(model, x, y, **how(norm), num_queries=300), y))
    search = AttackCopy(model, dtype=torch.bfloat16)
    found = square(model, x, y, search=search, **how(norm), num_queries=300)
    assert abs(sum(right(model, found, y)) - count) <= 2
    moved = (found != x).flatten(1).any(1)
    assert not any(right(model, found[moved], y[moved])) and moved.any()


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, power", [("l2", 2), ("l1", 4)])
@pytest.mark.parametrize("size", [(0, 1), (1, 1), (1, 3), (2, 5), (7, 7), (6, 13), (14, 27)])
def test_bump_is_the_sum_of_its_rectangles(size, norm, power):
    height, width = size
    expected = torch.zeros(size, dtype=torch.float64)
    for k in range(1, max(height, width) // 2 + 2):
        top, left = max(height // 2 - k + 1, 0), max(width // 2 - k + 1, 0)
        expected[top : height // 2 + k, left : width // 2 + k] += k**-power
    length = expected.norm() if norm == "l2" else expected.sum()
    assert torch.allclose(bump(*size, norm), expected / length, atol=1e-12)
