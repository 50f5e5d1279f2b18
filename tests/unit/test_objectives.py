"""Losses of the base learners against the formulas, written out in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from genray.config.objectives import AdversarialObjective, NaturalObjective
from genray.objectives import TrainingStep, build_objective

N, SIZE, CLASSES = 12, 20, 7


def cross_entropy(logits, y, smoothing=0.0):
    """mean_n sum_k -q_nk log p_nk with q = (1 - s) onehot + s / K."""
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    q = np.full_like(log_p, smoothing / log_p.shape[1])
    q[np.arange(len(y)), y] += 1 - smoothing
    return -(q * log_p).sum(1).mean()


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

    def logits(self, x):
        return x.reshape(N, -1).astype(np.float64) @ self.weights.T.astype(np.float64)

    @property
    def clean(self):
        return self.logits(self.x)

    @property
    def adversarial(self):
        return self.logits(self.x + self.shift)

    def run(self, options):
        objective = build_objective(options)
        return objective(TrainingStep(self.network, torch.from_numpy(self.x), torch.from_numpy(self.y), self.craft))


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


def test_gradient_of_the_mixture():
    """d CE / d W = mean (p - q) x^T, mixed by beta."""
    s, beta = Setting(), 0.3
    loss, _ = s.run(AdversarialObjective(beta=beta))
    loss.backward()
    onehot = np.eye(CLASSES)[s.y]

    def gradient(logits, x):
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return (p - onehot).T @ x.reshape(N, -1) / N

    expected = beta * gradient(s.adversarial, s.x + s.shift) + (1 - beta) * gradient(s.clean, s.x)
    assert np.abs(s.network[1].weight.grad.numpy() - expected).max() < 1e-5
