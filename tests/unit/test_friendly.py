"""The attacks of TRADES, MART and FAT against loops over single examples and coordinates, in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from genray.attacks import FriendlyAttack, GradientAttack, StreamDraw
from genray.config import load_config
from genray.learners.base_learner import BaseLearner
from genray.run.plan import make_plan
from genray.run.setup import prepare

N, SHAPE, SIZE, CLASSES, EPSILON, KAPPA = 40, (2, 3, 3), 18, 5, 0.1, 0.03


def setting():
    """A linear classifier whose margins are about what the attack can move: some fall, at different steps."""
    rng = np.random.default_rng(4)
    weights = rng.normal(size=(CLASSES, SIZE))
    x = rng.random((N, *SHAPE))
    y = (x.reshape(N, -1) @ weights.T).argmax(1)
    y[:6] = (y[:6] + 1) % CLASSES  # and some are misclassified from the start
    network = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, CLASSES, bias=False)).double()
    network[1].weight.data = torch.from_numpy(weights)
    return network, weights, x, y


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def gradient(weights, x, point, label, loss):
    """Of one example's loss at `point`, by hand: W^T (q - target)."""
    q = softmax(weights @ point.ravel())
    target = softmax(weights @ x.ravel()) if loss == "kl" else np.eye(CLASSES)[label]
    return (weights.T @ (q - target)).reshape(SHAPE)


def move(x, point, direction, noise=0.0):
    """One step, then the ball, then the box: coordinate by coordinate."""
    result = point + KAPPA * np.sign(direction) + noise
    for index in np.ndindex(*SHAPE):
        value = min(max(result[index], x[index] - EPSILON), x[index] + EPSILON)
        result[index] = min(max(value, 0.0), 1.0)
    return result


def start_of(kind, x, stream):
    images = torch.from_numpy(x)
    if kind == "gaussian":
        return np.clip(x + 0.001 * torch.randn(images.shape, generator=stream, dtype=images.dtype).numpy(), 0, 1)
    uniform = torch.rand(images.shape, generator=stream, dtype=images.dtype).numpy()
    return np.clip(x + EPSILON * (2 * uniform - 1), 0, 1)


def run(attack, network, x, y, seed=0, **values):
    draw = StreamDraw(torch.Generator().manual_seed(seed))
    return attack(network, torch.from_numpy(x), torch.from_numpy(y), draw, **values).numpy()


def options(**changes):
    return {"norm": "linf", "epsilon": EPSILON, "step_size": KAPPA, "num_steps": 6, **changes}


# --- ascent on KL and CE -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_each_step_from_a_gaussian_start(loss):
    """TRADES and MART: x + 0.001 N(0, 1), then signs of the gradient of KL(p(x) || p(x')) or of CE."""
    network, weights, x, y = setting()
    points = start_of("gaussian", x, torch.Generator().manual_seed(7))
    assert 0.0009 < (points - x)[(x > 0.01) & (x < 0.99)].std() < 0.0011
    for num_steps in range(1, 7):
        points = np.stack([move(x[i], p, gradient(weights, x[i], p, y[i], loss)) for i, p in enumerate(points)])
        attack = GradientAttack(**options(num_steps=num_steps, start="gaussian", loss=loss))
        assert np.abs(run(attack, network, x, y, seed=7) - points).max() < 1e-12
    assert np.abs(np.abs(points - x).max() - EPSILON) < 1e-12  # ball and box were both met
    assert (points == 0).any() and (points == 1).any()


def test_l2_steps_of_trades():
    network, weights, x, y = setting()
    points = start_of("gaussian", x, torch.Generator().manual_seed(7))
    for _ in range(4):
        for i, p in enumerate(points):
            g = gradient(weights, x[i], p, y[i], "kl")
            delta = p + 0.1 * g / np.sqrt((g**2).sum()) - x[i]
            delta *= min(1.0, 0.25 / np.sqrt((delta**2).sum()))
            points[i] = np.clip(x[i] + delta, 0, 1)
    attack = GradientAttack("l2", 0.25, 0.1, 4, start="gaussian", loss="kl")
    assert np.abs(run(attack, network, x, y, seed=7) - points).max() < 1e-9


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_without_a_gradient_the_start_stays(norm):
    """No direction, no NaN (a fresh network whose last layer is zero)."""
    network, _, x, y = setting()
    network[1].weight.data.zero_()
    kept = start_of("gaussian", x, torch.Generator().manual_seed(0))
    for cls, values in ((GradientAttack, {}), (FriendlyAttack, {"tau": 2})):
        attack = cls(**options(norm=norm, epsilon=1.0, start="gaussian", loss="kl"))
        assert np.abs(run(attack, network, x, y, **values) - kept).max() < 1e-12


# --- early stopping ------------------------------------------------------------------------------------------------


def friendly(weights, x, y, start, noises, tau, num_steps, loss):
    """FAT of methods C5, one example after another: (images, steps taken by each)."""
    images, taken = [], []
    for i in range(len(x)):
        point, counter, steps = start[i], tau, 0
        for k in range(num_steps):
            if (weights @ point.ravel()).argmax() != y[i]:
                if counter == 0:
                    break
                counter -= 1
            point = move(x[i], point, gradient(weights, x[i], point, y[i], loss), noises[k][i])
            steps += 1
        images.append(point)
        taken.append(steps)
    return np.stack(images), np.array(taken)


@pytest.mark.parametrize("tau", [0, 1, 3, 6, 9])
@pytest.mark.parametrize(
    ("loss", "start", "omega"),
    [
        ("cross_entropy", "uniform", 0.0),
        ("cross_entropy", "uniform", 0.01),
        ("kl", "gaussian", 0.0),
        ("cross_entropy", "gaussian", 0.01),
    ],
)
def test_counters_of_each_example(tau, loss, start, omega):
    network, weights, x, y = setting()
    stream = torch.Generator().manual_seed(2)
    begin = start_of(start, x, stream)
    like = torch.from_numpy(x)
    noises = [
        omega * torch.randn(like.shape, generator=stream, dtype=like.dtype).numpy() if omega else np.zeros_like(x)
        for _ in range(6)
    ]
    expected, taken = friendly(weights, x, y, begin, noises, tau, 6, loss)
    examples = []
    network.register_forward_pre_hook(lambda module, inputs: examples.append(len(inputs[0])))
    attack = FriendlyAttack(**options(start=start, loss=loss, step_noise=omega))
    assert np.abs(run(attack, network, x, y, seed=2, tau=tau) - expected).max() < 1e-12
    if tau in (0, 1):
        assert {0, 6} < set(taken) if tau == 0 else {1, 6} < set(taken)
        assert len(set(taken)) >= 4  # the counters differ
    # Who stops is found in the pass of its gradient: an example costs its steps, and one more pass where it stopped.
    evaluated = sum(examples) - (N if loss == "kl" else 0)
    assert evaluated == (taken + (taken < 6)).sum()
    if tau >= 6:
        assert (taken == 6).all()


def test_all_stop_at_once():
    """Every start misclassified and tau = 0: one pass, and the starts themselves."""
    network, weights, x, y = setting()
    y = ((x.reshape(N, -1) @ weights.T).argmin(1)).astype(np.int64)
    examples = []
    network.register_forward_pre_hook(lambda module, inputs: examples.append(len(inputs[0])))
    assert np.array_equal(run(FriendlyAttack(**options(start="zero")), network, x, y, tau=0), x)
    assert examples == [N]


def test_tau_of_all_steps_is_plain_pgd():
    network, _, x, y = setting()
    network, x = network.float(), x.astype(np.float32)
    for norm in ("linf", "l2", "l1"):
        made = options(norm=norm)
        plain = run(GradientAttack(**made), network, x, y)
        assert np.array_equal(run(FriendlyAttack(**made), network, x, y, tau=6), plain)
        assert not np.array_equal(run(FriendlyAttack(**made), network, x, y, tau=0), plain)


def test_in_train_mode():
    """BatchNorm normalises by the examples that are still going, and its statistics move at every pass."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES))
    network = network.double().eval()
    twin = copy.deepcopy(network)
    x = np.random.default_rng(0).random((N, *SHAPE))
    y = network(torch.from_numpy(x)).argmax(1).numpy()
    made = run(FriendlyAttack(**options(start="zero", mode="train")), network, x, y, tau=1)
    assert not network.training and not network[1].training

    twin.train()
    points, counters, going = x.copy(), np.full(N, 1), list(range(N))
    sizes = []
    for _ in range(6):
        batch = torch.from_numpy(points[going]).requires_grad_()
        logits = twin(batch)
        sizes.append(len(going))
        nn.functional.cross_entropy(logits, torch.from_numpy(y[going]), reduction="sum").backward()
        left = []
        for row, i in enumerate(going):
            if logits[row].argmax() != y[i]:
                counters[i] -= 1
            if counters[i] >= 0:
                points[i] = move(x[i], points[i], batch.grad[row].numpy())
                left.append(i)
        going = left
    assert len(set(sizes)) > 2
    assert np.abs(made - points).max() < 1e-12
    assert torch.allclose(network[1].running_mean, twin[1].running_mean, rtol=0, atol=1e-12)
    assert network[1].num_batches_tracked == twin[1].num_batches_tracked == 6


# --- tau over the run ------------------------------------------------------------------------------------------------

FAT = [
    "base_learners.natural=null",
    "global_learner.gamma=null",
    "training.epochs=120",
    "data.train_examples=270",
    "data.test_examples=10",
    "model.width=2",
    "base_learners.linf.attack.num_steps=2",
]


@pytest.mark.parametrize(
    ("schedules_by", "changes"),
    # Of two knots at one place the later one holds: epoch 51 starts at 50/120, and as a whole it stands at 51/120.
    [("step", ("50/120", "90/120")), ("epoch", ("51/120", "91/120"))],
)
def test_tau_by_epoch(schedules_by, changes):
    """FAT's own schedule: 0 up to epoch 50, 1 up to epoch 90, then 2, at every step of these epochs."""
    first, second = changes
    tau = f"[[0, 0], [{first}, 0], [{first}, 1], [{second}, 1], [{second}, 2]]"
    overrides = [*FAT, f"base_learners.linf.attack.tau={tau}", f"training.schedules_by={schedules_by}"]
    plan = make_plan(load_config(None, overrides), 13 * 64 - 5)
    for step in range(120 * 13):
        epoch = step // 13 + 1
        assert plan.tau("linf", step) == (0 if epoch <= 50 else 1 if epoch <= 90 else 2), (step, epoch)


def test_the_learner_gives_the_tau_of_the_step():
    """Also between knots: a whole number, rounded down."""
    tau = "[[0, 0], [1/120, 0], [1/120, 2], [3/120, 3]]"
    setup = prepare(load_config(None, [*FAT, f"base_learners.linf.attack.tau={tau}", "training.batch_size=35"]))
    learner = BaseLearner("linf", setup.plan, setup.build_network(), setup.splits["train"])
    seen = []

    class Recorded(FriendlyAttack):
        def __call__(self, model, x, y, draw, tau=0):
            seen.append(tau)
            return super().__call__(model, x, y, draw, tau)

    assert type(learner.attacks["attack"]) is FriendlyAttack
    learner.attacks["attack"] = Recorded(**vars(learner.attacks["attack"]))
    assert setup.plan.steps_per_epoch == 2
    learner.run_window(0, 8)
    assert seen == [0, 0, 2, 2, 2, 2, 3, 3]
    assert all(type(value) is int for value in seen)
