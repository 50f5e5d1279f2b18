"""Training against several norms (MAX, AVG, SAT, MSD, E-AT) against slow code written here, and their identities."""

import numpy as np
import pytest
import torch
from small_learners import BATCH, small_network, through_a_file, unit_config
from torch import nn

from genray.attacks import GradientAttack, StreamDraw
from genray.attacks.msd import MsdAttack, sparse_step
from genray.attacks.worst import WorstAttack, worst_of
from genray.config.objectives import AverageObjective, EatObjective, StochasticObjective
from genray.config.schema import AttackConfig
from genray.core.rng import host_generator
from genray.data.datasets import load_image_data
from genray.errors import ConfigError
from genray.learners.base_learner import BaseLearner
from genray.objectives import TrainingStep, build_objective
from genray.run.plan import make_plan

N, CLASSES = 12, 5
PGD = {"norm": "linf", "epsilon": 0.1, "step_size": 0.04, "num_steps": 3}
EPSILON = {"linf": 0.1, "l2": 0.4, "l1": 1.1}


def draw(seed=0):
    return StreamDraw(torch.Generator().manual_seed(seed))


def victim(dtype=torch.float64):
    """A smooth network (no ReLU where rounding could decide) and images with many pixels at the walls."""
    rng = np.random.default_rng(4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(25, 16), nn.Tanh(), nn.Linear(16, CLASSES)).to(dtype)
    for layer, size in ((network[1], 0.7), (network[3], 1.0)):
        layer.weight.data = torch.from_numpy(size * rng.normal(size=layer.weight.shape)).to(dtype)
        layer.bias.data = torch.from_numpy(rng.normal(size=layer.bias.shape)).to(dtype)
    x = torch.from_numpy(rng.random((N, 1, 5, 5)).clip(0.2, 0.8) * 1.6 - 0.3).clamp(0, 1).to(dtype)
    return network.eval(), x, torch.from_numpy(rng.integers(0, CLASSES, N))


def one_loss(network, image, label):
    """(CE, its gradient) of one flat image, as NumPy numbers."""
    image = torch.from_numpy(image.copy()).requires_grad_()
    z = network(image.view(1, 1, 5, 5))[0]
    loss = torch.log(torch.exp(z - z.max()).sum()) + z.max() - z[label]
    loss.backward()
    return loss.item(), image.grad.numpy()


def one_projection(norm, x, point, epsilon):
    """The projection on ball and box of one flat image; for l1 by bisection."""
    delta = point - x
    if norm == "linf":
        delta = delta.clip(-epsilon, epsilon)
    if norm == "l2":
        delta = delta * min(1, epsilon / max(np.sqrt((delta**2).sum()), 1e-12))
    if norm != "l1":
        return (x + delta).clip(0, 1)
    room = np.where(delta >= 0, 1 - x, x)
    low, high = 0.0, np.abs(delta).max()
    if np.minimum(np.abs(delta), room).sum() <= epsilon:
        high = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        inside = np.clip(np.abs(delta) - middle, 0, room).sum() <= epsilon
        low, high = (low, middle) if inside else (middle, high)
    return x + np.sign(delta) * np.clip(np.abs(delta) - high, 0, room)


# --- MAX, AVG, SAT --------------------------------------------------------------------------------------------------


def test_max_takes_the_norm_that_hurts_each_example_most():
    network, x, y = victim()
    # Radii that hurt about equally, so that every norm wins somewhere.
    epsilon = {"linf": 0.1, "l2": 0.35, "l1": 1.0}
    attacks = tuple(GradientAttack(norm, size, size / 3, 4) for norm, size in epsilon.items())
    found = WorstAttack(attacks)(network, x, y, draw())
    stream = draw()  # the attacks draw one after another from one stream
    images = [attack(network, x, y, stream) for attack in attacks]
    chosen = []
    for n in range(N):
        losses = [one_loss(network, candidate[n].flatten().numpy(), int(y[n]))[0] for candidate in images]
        chosen.append(int(np.argmax(losses)))
        assert torch.equal(found[n], images[chosen[-1]][n])
    assert set(chosen) == {0, 1, 2}


def test_ties_go_to_the_first_and_the_memory_format_stays():
    network, x, y = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), torch.rand(4, 2, 3, 4), torch.tensor([0, 1, 2, 0])
    network[1].weight.data.zero_()  # all images are the same to it
    others = [(x + shift).contiguous(memory_format=torch.channels_last) for shift in (0, 1, 2)]
    images, losses = worst_of(network, others, y)
    assert torch.equal(images, x) and images.is_contiguous(memory_format=torch.channels_last)
    assert not losses.requires_grad and len(losses) == 4


class Linear:
    """What an objective sees: a linear model, and adversarial images by name."""

    def __init__(self, names):
        rng = np.random.default_rng(1)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(25, CLASSES, bias=False))
        self.weight = rng.normal(size=(CLASSES, 25)).astype(np.float32)
        self.network[1].weight.data = torch.from_numpy(self.weight.copy())
        self.images = {name: rng.random((N, 1, 5, 5)).astype(np.float32) for name in ("clean", *names)}
        self.y = rng.integers(0, CLASSES, N)
        self.crafted = []

    def craft(self, name):
        self.crafted.append(name)
        return torch.from_numpy(self.images[name])

    def step(self, *key):
        numbers = lambda: host_generator(*key)  # noqa: E731
        clean = torch.from_numpy(self.images["clean"])
        return TrainingStep(self.network, clean, torch.from_numpy(self.y), self.craft, None, numbers)

    def loss_and_gradient(self, name):
        """CE and its gradient in the weights, mean over the images, in float64."""
        x = self.images[name].reshape(N, -1).astype(np.float64)
        z = x @ self.weight.T.astype(np.float64)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        loss = -np.log(p[np.arange(N), self.y]).mean()
        p[np.arange(N), self.y] -= 1
        return loss, p.T @ x / N


def built(options, names):
    objective = build_objective(options)
    norms = {"a": "linf", "b": "l2", "c": "l1"}
    objective.build_attacks({n: AttackConfig(norm=norms[n], epsilon="0.1", step_size="0.1") for n in names})
    return objective


def test_average_of_the_norms():
    s = Linear("abc")
    loss, logits = built(AverageObjective(), "abc")(s.step(0))
    loss.backward()
    expected = [s.loss_and_gradient(name) for name in "abc"]
    assert loss.item() == pytest.approx(np.mean([e[0] for e in expected]), rel=1e-6)
    assert np.abs(s.network[1].weight.grad.numpy() - np.mean([e[1] for e in expected], 0)).max() < 1e-6
    assert s.crafted == ["a", "b", "c"] and logits.shape == (N, CLASSES)


def test_stochastic_draws_each_norm_equally_often_and_by_its_key():
    s, objective, drawn = Linear("abc"), built(StochasticObjective(), "abc"), []
    for i in range(1800):
        loss, _ = objective(s.step(3, "learner", "objective", i))
        drawn.append(s.crafted[-1])
    counts = [drawn.count(name) for name in "abc"]
    assert len(s.crafted) == 1800 and max(abs(c - 600) for c in counts) < 4 * np.sqrt(1800 * 2 / 9)
    assert loss.item() == pytest.approx(s.loss_and_gradient(drawn[-1])[0], rel=1e-6)
    again = []
    for i in reversed(range(50)):  # a step's draw depends on its key alone
        objective(s.step(3, "learner", "objective", i))
        again.append(s.crafted[-1])
    assert again[::-1] == drawn[:50]


# --- E-AT -----------------------------------------------------------------------------------------------------------


class Known:
    """Steps whose images of norm `name` are classified correctly in a known number of cases."""

    def __init__(self, num_correct):
        self.num_correct, self.drawn = num_correct, []

    def craft(self, name):
        """Logits: class 0 wins for the first few images, class 1 for the others."""
        self.drawn.append(name)
        logits = torch.zeros(10, 2)
        logits[:, 1] = torch.where(torch.arange(10) < self.num_correct[name](len(self.drawn)), -1.0, 1.0)
        return logits

    def run(self, objective, i):
        numbers = lambda: host_generator(5, "objective", i)  # noqa: E731
        labels = torch.zeros(10, dtype=torch.int64)
        return objective(TrainingStep(lambda logits: logits, None, labels, self.craft, None, numbers))


def expected_probabilities(history, names):
    """By counting again from the start, all but the newest step."""
    errors = {}
    for name in names:
        mine = [correct for n, correct in history[:-1] if n == name]
        errors[name] = 1 - sum(mine) / (10 * len(mine)) if mine else None
    if None in errors.values() or not any(errors.values()):
        return [1 / len(names)] * len(names)
    return [errors[name] / sum(errors.values()) for name in names]


def test_e_at_draws_by_the_running_errors():
    """Accuracies that move from step to step; the draw itself by the inverse of the cumulative probabilities."""
    accuracies = {"a": lambda i: i % 11, "b": lambda i: 3 + i // 60, "c": lambda i: 10 - i // 40}
    objective, s, history = built(EatObjective(), "abc"), Known(accuracies), []
    uniform = 0
    for i in range(150):
        p = expected_probabilities(history, "abc")
        assert objective.probabilities.tolist() == pytest.approx(p, abs=1e-12)
        uniform += p == [1 / 3] * 3
        loss, _ = s.run(objective, i)
        u = host_generator(5, "objective", i).random()
        name = "abc"[int(np.searchsorted(np.cumsum(p), u, side="right"))]
        assert s.drawn[-1] == name
        history.append((name, accuracies[name](i + 1)))
        right = history[-1][1] / 10
        assert loss.item() == pytest.approx(right * np.log(1 + np.exp(-1)) + (1 - right) * np.log(1 + np.exp(1)))
    assert 3 < uniform < 30 and len({name for name, _ in history}) == 3


def test_e_at_is_uniform_where_no_norm_errs():
    objective = built(EatObjective(), "ab")
    s = Known({"a": lambda i: 10, "b": lambda i: 10})
    for i in range(40):
        s.run(objective, i)
        assert objective.probabilities.tolist() == [0.5, 0.5]
    assert set(s.drawn) == {"a", "b"}


def test_e_at_knows_its_counts_after_a_checkpoint():
    accuracies = {"a": lambda i: 9, "b": lambda i: 3}
    for stop in (0, 1, 7):
        whole, first, second = (built(EatObjective(), "ab") for _ in range(3))
        s, parts = Known(accuracies), Known(accuracies)
        for i in range(30):
            s.run(whole, i)
            parts.run(first if i < stop else second, i)
            if i + 1 == stop:
                second.load_state_dict(first.state_dict())
                parts.run(first, i + 1), parts.drawn.pop()  # must not reach what was stored
        assert s.drawn == parts.drawn
        assert whole.probabilities.tolist() == second.probabilities.tolist()


# --- MSD ------------------------------------------------------------------------------------------------------------


class Pixels:
    """Draws that make k what is asked for."""

    def __init__(self, counts, fewest, most):
        self.numbers = [(k - fewest + 0.5) / (most - fewest + 1) for k in counts]

    def uniform_for_all(self, like):
        assert len(like) == len(self.numbers)
        return torch.tensor(self.numbers, dtype=like.dtype)


def slow_sparse_step(gradient, point, step_size, k):
    """Method C10's l1 step of one flat image, pixel by pixel."""
    movable = [
        (-abs(g), i) for i, g in enumerate(gradient) if (1 - point[i] if g > 0 else point[i]) > step_size / k and g != 0
    ]
    step = np.zeros_like(gradient)
    for _, i in sorted(movable)[:k]:
        step[i] = np.sign(gradient[i]) * step_size / k
    return step


def slow_msd(network, x, y, settings, counts):
    """One example: (returned point, norms chosen, iteration of the returned point)."""
    point, best, best_loss, chosen, best_at = x, None, -np.inf, [], None
    for i, k in enumerate(counts):
        _, gradient = one_loss(network, point, y)
        candidates = []
        for norm, step_size in settings:
            if norm == "linf":
                step = step_size * np.sign(gradient)
            elif norm == "l2":
                step = step_size * gradient / np.sqrt((gradient**2).sum())
            else:
                step = slow_sparse_step(gradient, point, step_size, k)
            candidates.append(one_projection(norm, x, point + step, EPSILON[norm]))
        losses = [one_loss(network, candidate, y)[0] for candidate in candidates]
        chosen.append(int(np.argmax(losses)))
        point = candidates[chosen[-1]]
        if losses[chosen[-1]] > best_loss:
            best, best_loss, best_at = point, losses[chosen[-1]], i
    return best, chosen, best_at


def test_msd_step_by_step():
    network, x, y = victim()
    settings, counts = [("linf", 0.08), ("l2", 0.3), ("l1", 0.8)], [3, 1, 4, 4, 2, 3, 1, 2, 4, 3]
    attacks = tuple(GradientAttack(norm, EPSILON[norm], size, len(counts)) for norm, size in settings)
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    found = MsdAttack(attacks, (1, 4))(network, x, y, Pixels(counts, 1, 4))
    ours, all_chosen, last = list(seen), set(), []
    assert len(ours) == len(counts) * (1 + len(settings))
    for n in range(N):
        flat, label = x[n].flatten().numpy(), int(y[n])
        expected, chosen, best_at = slow_msd(network, flat, label, settings, counts)
        assert np.abs(found[n].flatten().numpy() - expected).max() < 1e-7
        all_chosen |= set(chosen)
        last.append(best_at)
    assert all_chosen == {0, 1, 2} and min(last) < len(counts) - 1, "the test should see choices"


def test_msd_moves_from_5_to_20_pixels_each_number_as_often():
    network, x, y = victim()
    attack, stream = MsdAttack((GradientAttack("l1", 1.0, 0.01, 1),)), draw()
    moved = [int((attack(network, x[:1], y[:1], stream) != x[:1]).sum()) for _ in range(800)]
    counts = np.bincount(moved)
    assert set(moved) == set(range(5, 21)) and np.abs(counts[5:] - 50).max() < 4 * np.sqrt(50)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_sparse_step_against_a_loop(k):
    rng = np.random.default_rng(k)
    point = rng.integers(0, 5, (8, 1, 6, 6)) / 4
    gradient = rng.normal(size=point.shape)
    gradient[2] = 0.0
    gradient[3, 0, :, 1:] = 0.0  # fewer than k can move
    step = sparse_step(torch.from_numpy(point), torch.from_numpy(gradient), 0.6, torch.tensor(float(k)), 20)
    for n in range(8):
        expected = slow_sparse_step(gradient[n].flatten(), point[n].flatten(), 0.6, k)
        assert np.abs(step[n].flatten().numpy() - expected).max() < 1e-6
    assert step.abs().sum((1, 2, 3)).max() <= 0.6 * (1 + 1e-6)
    assert (step[[0, 1, 4]].flatten(1).abs().sum(1) > 0.6 - 1e-6).all() or k == 20


def test_msd_stays_in_one_of_the_balls_and_touches_nothing():
    network, x, y = victim(torch.float32)
    network.insert(1, nn.BatchNorm1d(25)).train()
    attacks = tuple(GradientAttack(norm, size, size / 4, 8) for norm, size in EPSILON.items())
    state, randomness = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    images = x.clone()
    found = MsdAttack(attacks)(network, x, y, draw())
    delta = (found - x).double().flatten(1)
    lengths = {"linf": delta.abs().amax(1), "l2": delta.norm(dim=1), "l1": delta.abs().sum(1)}
    inside = torch.stack([lengths[norm] <= size * (1 + 1e-6) + 1e-6 for norm, size in EPSILON.items()])
    assert inside.any(0).all() and not inside.all() and found.min() >= 0 and found.max() <= 1
    assert not found.requires_grad and network.training and torch.equal(x, images)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters()) and torch.equal(torch.get_rng_state(), randomness)
    MsdAttack(tuple(GradientAttack(n, s, s / 4, 2, mode="train") for n, s in EPSILON.items()))(network, x, y, draw())
    assert network[1].num_batches_tracked == 2 * (1 + 3)


# --- through a learner: one norm is single-norm training, and a stop in between does not show -------------------------


@pytest.fixture(scope="module")
def train():
    return load_image_data("digits").train.first(80)


def make_learner(train, objective, awp=None, **attacks):
    attacks = {"attack": attacks["attack"]} if "attack" in attacks else {"attacks": attacks}
    learner = {"objective": objective, "lr": 0.05, "awp": awp, **attacks}
    judged = {"attack": {"norm": "linf", "epsilon": 0.1, "step_size": 0.05}}
    config = unit_config({"robust": learner}, evaluation=judged, training={"epochs": 8, "batch_size": BATCH})
    return BaseLearner("robust", make_plan(config, len(train)), small_network(), train)


APGD = {"algorithm": "apgd", "norm": "l2", "epsilon": 0.8, "num_steps": 3, "start": "uniform"}
ONE_STEP = {"norm": "l2", "epsilon": 0.8, "step_size": 0.5, "num_steps": 1, "start": "zero"}
IDENTITIES = [
    (PGD, None, ("max", "avg", "sat", "e_at")),
    (APGD, None, ("max", "e_at")),
    (PGD, {"gamma": 0.02}, ("e_at",)),
    (ONE_STEP, None, ("msd",)),  # its last image is the only one to return
]


@pytest.mark.parametrize("attack, awp, objectives", IDENTITIES)
def test_with_one_norm_they_are_single_norm_training(train, attack, awp, objectives):
    single = make_learner(train, "adversarial", awp, attack=attack)
    stats = single.run_window(0, 20)
    for objective in objectives:
        learner = make_learner(train, objective, awp, only=attack)
        assert learner.run_window(0, 20).loss_sum == stats.loss_sum
        assert torch.equal(learner.flat.weights, single.flat.weights), objective
        assert torch.equal(learner.average, single.average)


def test_two_norms_are_not(train):
    """Otherwise the identities could hold because nothing depends on the attack."""
    attacks = {"linf": {**PGD, "num_steps": 1}, "l2": ONE_STEP}
    learners = [make_learner(train, name, **attacks) for name in ("max", "avg", "sat", "e_at")]
    learners.append(make_learner(train, "msd", linf={**PGD, "num_steps": 1}, l2=ONE_STEP))
    learners += [make_learner(train, "adversarial", attack=attack) for attack in attacks.values()]
    for learner in learners:
        learner.run_window(0, 6)
    assert len({learner.flat.weights.numpy().tobytes() for learner in learners}) == len(learners)


@pytest.mark.parametrize("objective, stop", [("e_at", 1), ("e_at", 9), ("sat", 4), ("msd", 3)])
def test_resumed_equals_uninterrupted(train, objective, stop):
    attacks = {"linf": {**PGD, "start": "zero"}, "l1": {**PGD, "norm": "l1", "epsilon": 2, "step_size": 1}}
    attacks["l1"]["start"] = "zero"
    whole, broken, resumed = (make_learner(train, objective, **attacks) for _ in range(3))
    whole.run_window(0, 16)
    broken.run_window(0, stop)
    stored = through_a_file(broken.state_dict())
    broken.run_window(stop, stop + 2)  # must not reach what was stored
    resumed.load_state_dict(stored)
    resumed.run_window(stop, 16)
    assert torch.equal(whole.flat.weights, resumed.flat.weights) and torch.equal(whole.share, resumed.share)
    if objective == "e_at":
        ours, theirs = whole.objective.state_dict(), resumed.objective.state_dict()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ("correct", "seen", "newest"))
        assert ours["seen"].sum() + ours["newest"][2] == sum(32 if i % 3 < 2 else 16 for i in range(16))


# --- configuration ----------------------------------------------------------------------------------------------------

L = "base_learners.robust"
L1 = {"norm": "l1", "epsilon": 2, "step_size": 1, "num_steps": 3}
PROBLEMS = [
    ("msd", {"linf": PGD, "l1": {**L1, "num_steps": 4}}, f"{L}.attacks: expected one num_steps"),
    ("msd", {"linf": {**PGD, "start": "uniform"}}, f"{L}.attacks.linf.start: expected zero with objective msd"),
    ("msd", {"l1": {**L1, "sparsity": 0.1}}, f"{L}.attacks.l1.sparsity: has no effect with objective msd"),
    ("msd", {"l2": {**APGD, "start": "zero"}}, f"{L}.attacks.l2.algorithm: expected pgd with objective msd, got apgd"),
    ({"name": "msd", "l1_pixels": [1, 2]}, {"linf": PGD}, f"{L}.objective.l1_pixels: has no effect without an l1"),
    ({"name": "msd", "l1_pixels": [5, 2]}, {"l1": L1}, f"{L}.objective.l1_pixels: expected [fewest, most], got [5, 2]"),
    (
        {"name": "msd", "l1_pixels": [0, 2]},
        {"l1": L1},
        f"{L}.objective.l1_pixels[0]: expected a whole number at least 1",
    ),
    ("e_at", {"l2": {**APGD, "step_size": 0.1}}, f"{L}.attacks.l2.step_size: has no effect with algorithm apgd"),
    (
        "e_at",
        {"l2": {**APGD, "algorithm": "pgd"}},
        f'{L}.attacks.l2.step_size: missing, expected a number such as "8/2',
    ),
    ("e_at", {"linf": {**PGD, "sparsity": 0.1}}, f"{L}.attacks.linf.sparsity: has no effect with norm linf"),
    ("e_at", {"linf": {**PGD, "tau": 1}}, f"{L}.attacks: expected no tau with objective e_at"),
    ("e_at", {"a": PGD, "b": {**PGD, "mode": "train"}}, f"{L}.attacks: expected one mode"),
    ("e_at", None, f"{L}.attacks: missing, objective e_at needs at least one"),
]


def problems(objective, evaluation=None, **learner):
    judged = {"norm": "linf", "epsilon": 0.1, "step_size": 0.1} if evaluation is None else evaluation
    with pytest.raises(ConfigError) as error:
        unit_config({"robust": {"objective": objective, "lr": 0.1, **learner}}, evaluation={"attack": judged})
    return error.value.problems


@pytest.mark.parametrize("objective, attacks, expected", PROBLEMS)
def test_one_line_says_what_is_wrong(objective, attacks, expected):
    (line,) = problems(objective, attacks=attacks)
    assert line.startswith(expected)


def test_apgd_alone():
    (line,) = problems("trades", attack={**APGD, "start": None})
    assert line.startswith(f"{L}.attack.start: expected gaussian or uniform with objective trades")
    (line,) = problems("adversarial", attack={**APGD, "tau": 1})
    assert line == f"{L}.attack.tau: has no effect with algorithm apgd; remove it"
    (line,) = problems("adversarial", {}, attack=APGD)
    assert line.startswith("evaluation.attack.step_size: missing, and the first robust learner's attack has none")
