"""Losses of the base learners against the formulas, written out in float64."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import nn

from genray.attacks import StreamDraw
from genray.config.objectives import (
    AdversarialObjective,
    IatObjective,
    MartObjective,
    NaturalObjective,
    TradesObjective,
)
from genray.objectives import TrainingStep, build_objective
from genray.objectives.mixup import mixup

N, SIZE, CLASSES = 12, 20, 7


def log_softmax(logits):
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def kl(clean, adversarial):
    """KL(p || q) of each example, p the clean and q the adversarial probabilities: summed over the classes."""
    log_p, log_q = log_softmax(clean), log_softmax(adversarial)
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def cross_entropy(logits, y, smoothing=0.0):
    """mean_n sum_k -q_nk log p_nk with q = (1 - s) onehot + s / K."""
    log_p = log_softmax(logits)
    q = np.full_like(log_p, smoothing / log_p.shape[1])
    q[np.arange(len(y)), y] += 1 - smoothing
    return -(q * log_p).sum(1).mean()


def draws(seed):
    """`make_draw` and `make_numbers` of a step."""
    return lambda: StreamDraw(torch.Generator().manual_seed(seed)), lambda: np.random.default_rng(seed)


class Setting:
    """A linear model in float32, its weights in float64, images and what `craft` makes of them."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.weights = rng.normal(size=(CLASSES, SIZE)).astype(np.float32)
        self.x = rng.random((N, 1, 4, 5)).astype(np.float32)
        self.shift = (0.3 * rng.normal(size=self.x.shape)).astype(np.float32)
        self.y = rng.integers(0, CLASSES, N)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, CLASSES, bias=False))
        self.network[1].weight.data = torch.from_numpy(self.weights.copy())
        self.seen, self.crafted = [], 0
        self.network.register_forward_pre_hook(lambda module, inputs: self.seen.append(inputs[0].numpy().copy()))

    def craft(self, name):
        assert name == "attack"
        self.crafted += 1
        return torch.from_numpy(self.x + self.shift)

    def logits(self, x, weights=None):
        weights = self.weights if weights is None else weights
        return x.reshape(N, -1).astype(np.float64) @ weights.T.astype(np.float64)

    @property
    def clean(self):
        return self.logits(self.x)

    @property
    def adversarial(self):
        return self.logits(self.x + self.shift)

    def run(self, options, seed=0):
        x, y = torch.from_numpy(self.x), torch.from_numpy(self.y)
        return build_objective(options)(TrainingStep(self.network, x, y, self.craft, *draws(seed)))

    def gradient(self, loss_of):
        """d loss_of(clean logits, adversarial logits) / d weights by central differences in float64."""
        weights, h = self.weights.astype(np.float64), 1e-5
        result = np.zeros_like(weights)
        for index in np.ndindex(*weights.shape):
            sides = []
            for sign in (1, -1):
                moved = weights.copy()
                moved[index] += sign * h
                sides.append(loss_of(self.logits(self.x, moved), self.logits(self.x + self.shift, moved)))
            result[index] = (sides[0] - sides[1]) / (2 * h)
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_natural(smoothing):
    s = Setting()
    loss, logits = s.run(NaturalObjective(label_smoothing=smoothing))
    assert loss.item() == pytest.approx(cross_entropy(s.clean, s.y, smoothing), rel=1e-5)
    assert np.abs(logits.detach().numpy() - s.clean).max() < 1e-5
    assert s.crafted == 0 and len(s.seen) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_adversarial(beta, smoothing):
    s = Setting()
    loss, logits = s.run(AdversarialObjective(beta=beta, label_smoothing=smoothing))
    adversarial, clean = cross_entropy(s.adversarial, s.y, smoothing), cross_entropy(s.clean, s.y, smoothing)
    assert abs(adversarial - clean) > 0.05  # so that beta shows
    assert loss.item() == pytest.approx(beta * adversarial + (1 - beta) * clean, rel=1e-5)
    expected = s.clean if beta == 0 else s.adversarial
    assert np.abs(logits.detach().numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(("beta", "order", "crafted"), [(0.0, "c", 0), (0.5, "ac", 1), (1.0, "a", 1)])
def test_forwards_of_adversarial(beta, order, crafted):
    """Adversarial images first, then clean ones, none that is not needed (methods C2)."""
    s = Setting()
    s.run(AdversarialObjective(beta=beta))
    images = {"a": s.x + s.shift, "c": s.x}
    assert len(s.seen) == len(order) and s.crafted == crafted
    assert all(np.array_equal(seen, images[kind]) for seen, kind in zip(s.seen, order, strict=True))


# --- TRADES and MART ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "smoothing"), [(6.0, 0.0), (1.0, 0.0), (0.7, 0.2)])
def test_trades(beta, smoothing):
    """CE(x) + beta * batch mean of KL summed over the classes; both arguments of the KL get a gradient."""
    s = Setting()

    def slow(clean, adversarial):
        return cross_entropy(clean, s.y, smoothing) + beta * kl(clean, adversarial).mean()

    loss, logits = s.run(TradesObjective(beta=beta, label_smoothing=smoothing))
    assert loss.item() == pytest.approx(slow(s.clean, s.adversarial), rel=1e-5)
    assert np.abs(logits.detach().numpy() - s.adversarial).max() < 1e-5
    loss.backward()
    gradient = s.network[1].weight.grad.numpy()
    assert np.abs(gradient - s.gradient(slow)).max() < 1e-5

    def target_detached(clean, adversarial):
        p = np.exp(log_softmax(s.clean))
        return cross_entropy(clean, s.y, smoothing) - beta * (p * log_softmax(adversarial)).sum(1).mean()

    assert np.abs(gradient - s.gradient(target_detached)).max() > 0.01  # so that the test would see it


@pytest.mark.parametrize("beta", [5.0, 0.0])
def test_mart(beta):
    """The boosted CE with its 1.0001, and the KL of each example times 1 - p_y, not detached."""
    s = Setting()
    s.y[:6] = s.adversarial[:6].argmax(1)  # right ones, whose largest other probability is not the largest of all

    def slow(clean, adversarial):
        total = 0.0
        for i, label in enumerate(s.y):
            p, q = np.exp(log_softmax(clean))[i], np.exp(log_softmax(adversarial))[i]
            other = max(q[j] for j in range(CLASSES) if j != label)
            total += -np.log(q[label]) - np.log(1.0001 - other)
            total += beta * sum(p[j] * (np.log(p[j]) - np.log(q[j])) for j in range(CLASSES)) * (1 - p[label])
        return total / N

    loss, logits = s.run(MartObjective(beta=beta))
    assert loss.item() == pytest.approx(slow(s.clean, s.adversarial), rel=1e-5)
    assert np.abs(logits.detach().numpy() - s.adversarial).max() < 1e-5
    loss.backward()
    assert np.abs(s.network[1].weight.grad.numpy() - s.gradient(slow)).max() < 1e-5


def test_mart_on_a_certain_mistake():
    """Where another class has all the probability only the 1.0001 keeps the logarithm finite."""
    s = Setting()
    s.network[1].weight.data *= 1000
    s.weights = s.weights * 1000
    adversarial = np.exp(log_softmax(s.adversarial))
    adversarial[np.arange(N), s.y] = 0
    assert adversarial.max() > 1 - 1e-12
    loss, _ = s.run(MartObjective(beta=0.0))
    expected = cross_entropy(s.adversarial, s.y) - np.log(1.0001 - adversarial.max(1)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert -np.log(1.0001 - adversarial.max(1)).max() == pytest.approx(np.log(1e4), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "order"), [(TradesObjective(), "ca"), (MartObjective(), "ca"), (IatObjective(), "mm")]
)
def test_everything_is_crafted_before_the_first_training_pass(options, order):
    """A training pass moves the BatchNorm statistics that an attack in eval mode runs on."""
    s = Setting()
    craft, passes_before = s.craft, []
    s.craft = lambda name: (passes_before.append(len(s.seen)), craft(name))[1]
    s.run(options)
    assert passes_before == [0]
    images = {"a": s.x + s.shift, "c": s.x}
    assert len(s.seen) == len(order)
    assert all(kind == "m" or np.array_equal(seen, images[kind]) for seen, kind in zip(s.seen, order))


def test_trades_without_its_second_term_crafts_nothing():
    s = Setting()
    loss, logits = s.run(TradesObjective(beta=0.0))
    assert loss.item() == pytest.approx(cross_entropy(s.clean, s.y), rel=1e-5)
    assert s.crafted == 0 and len(s.seen) == 1 and np.abs(logits.detach().numpy() - s.clean).max() < 1e-5


# --- mixup and IAT --------------------------------------------------------------------------------------------------


def unmixed(mixed, images):
    """(share, partner) with mixed = share images + (1 - share) images[partner], found by search."""
    mixed, images = mixed.reshape(N, -1).astype(np.float64), images.reshape(N, -1).astype(np.float64)
    partner, shares = np.arange(N), []
    for i in range(N):
        for j in set(range(N)) - {i}:
            direction = images[i] - images[j]
            share = direction @ (mixed[i] - images[j]) / (direction @ direction)
            residual = share * images[i] + (1 - share) * images[j] - mixed[i]
            if share < 0.999 and np.abs(residual).max() < 1e-6:  # otherwise it is its own partner
                partner[i] = j
                shares.append(share)
    assert sorted(partner) == list(range(N))  # each image once
    assert np.ptp(shares) < 1e-5  # one share a batch
    return np.mean(shares), partner


def mixed_loss(s, images, share, partner, smoothing=0.0):
    logits = s.logits(share * images + (1 - share) * images[partner])
    return share * cross_entropy(logits, s.y, smoothing) + (1 - share) * cross_entropy(logits, s.y[partner], smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_natural_with_mixup(smoothing):
    s = Setting()
    loss, _ = s.run(NaturalObjective(mixup=0.8, label_smoothing=smoothing), seed=3)
    assert len(s.seen) == 1 and s.crafted == 0
    share, partner = unmixed(s.seen[0], s.x)
    assert 0.01 < share < 0.99
    assert loss.item() == pytest.approx(mixed_loss(s, s.x, share, partner, smoothing), rel=1e-5)


def test_iat():
    """Half the mixup loss of the clean batch, half that of the attacked one; shares and partners are independent."""
    s = Setting()
    loss, logits = s.run(IatObjective(), seed=3)
    assert s.crafted == 1 and len(s.seen) == 2
    clean, adversarial = unmixed(s.seen[0], s.x), unmixed(s.seen[1], s.x + s.shift)
    assert abs(clean[0] - adversarial[0]) > 0.01 and (clean[1] != adversarial[1]).sum() > 3
    expected = (mixed_loss(s, s.x, *clean) + mixed_loss(s, s.x + s.shift, *adversarial)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert np.abs(logits.detach().numpy() - s.logits(s.seen[1])).max() < 1e-5


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_draws_of_mixup(alpha):
    """Weights of Beta(alpha, alpha), any partner as often as any other, and the second draw of a step is a new one."""
    weights, partners = [], []
    for seed in range(500):
        step = TrainingStep(None, None, torch.arange(4), None, *draws(seed))
        first, second = mixup(step, alpha), mixup(step, alpha)
        weights.append((first.weight, second.weight))
        partners.append((first.partner.tolist(), second.partner.tolist()))
    weights, partners = np.array(weights), np.array(partners)
    for half in range(2):
        assert kstest(weights[:, half], "beta", args=(alpha, alpha)).pvalue > 0.01
        for i in range(4):
            assert chisquare(np.bincount(partners[:, half, i], minlength=4)).pvalue > 0.001
    assert abs(np.corrcoef(weights.T)[0, 1]) < 0.15
    assert 0.2 < (partners[:, 0] == partners[:, 1]).mean() < 0.3
