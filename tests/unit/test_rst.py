"""Robust self-training (methods C7): its loss and its identities."""

import numpy as np
import pytest
import torch
from torch import nn

from genray.config import load_config
from genray.config.objectives import RstObjective
from genray.data.datasets import load_image_data
from genray.data.splits import Split
from genray.learners.base_learner import BaseLearner
from genray.models import build_model
from genray.objectives import TrainingStep, build_objective
from genray.run.plan import make_plan

CLASSES, SIZE = 5, 12


# --- the loss ---------------------------------------------------------------------------------------------------------


def slow_loss(weights, x, adversarial, y, labelled, options):
    """((1 - beta) L_nat + beta L_rob, its gradient), one example after another in float64."""
    total, gradient = 0.0, np.zeros_like(weights)
    for images, u, factor in (
        (x, options.natural_weight, 1 - options.beta),
        (adversarial, options.robust_weight, options.beta),
    ):
        shares = [1 - u if own else u for own in labelled]
        if all(labelled) or not any(labelled):
            shares = [1.0] * len(labelled)
        for image, label, share in zip(images, y, shares):
            logits = weights @ image
            p = np.exp(logits - logits.max())
            p /= p.sum()
            part = factor * share / sum(shares)
            total -= part * np.log(p[label])
            p[label] -= 1
            gradient += part * np.outer(p, image)
    return total, gradient


MIXED = [True, False, False, True, False, True, True, True, False]


@pytest.mark.parametrize("labelled", [MIXED, [True] * 9, [False] * 9, [False] + [True] * 8], ids=str)
@pytest.mark.parametrize("beta, natural, robust", [(0.5, 0.9, 0.5), (0, 0.9, 0.5), (1, 0.2, 0.7), (0.3, 0, 1)])
def test_loss_and_gradient(beta, natural, robust, labelled):
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(CLASSES, SIZE))
    x = rng.random((9, SIZE))
    adversarial, y = x + 0.3 * rng.normal(size=x.shape), rng.integers(0, CLASSES, 9)
    network = nn.Linear(SIZE, CLASSES, bias=False)
    network.weight.data = torch.tensor(weights, dtype=torch.float32)
    options = RstObjective(beta=beta, natural_weight=natural, robust_weight=robust)
    images, crafted = (torch.tensor(a, dtype=torch.float32) for a in (x, adversarial))
    step = TrainingStep(
        network, images, torch.from_numpy(y), lambda name: crafted, labelled=torch.tensor(labelled, dtype=torch.bool)
    )
    loss, logits = build_objective(options)(step)
    loss.backward()
    expected, gradient = slow_loss(weights, x, adversarial, y, labelled, options)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert np.abs(network.weight.grad.numpy() - gradient).max() < 1e-6
    assert torch.equal(logits, network(images if beta == 0 else crafted))


# --- identities -------------------------------------------------------------------------------------------------------

ATTACK = {"norm": "linf", "epsilon": 0.1, "step_size": 0.05, "num_steps": 2}


def weights_after(objective, split, steps=20):
    """Weights of one learner after some steps on 80 digits, batches of 32, BatchNorm and augmentation on."""
    learner = {"objective": objective, "lr": 0.05, "augmentation": {"crop_padding": 1}}
    if objective not in ("natural", {"name": "natural"}):
        learner["attack"] = ATTACK
    config = load_config(
        {
            "name": "unit",
            "data": {"source": "digits", "extra": {"source": "npz", "path": "-"}},
            "model": {"name": "small_cnn", "batch_norm": True, "width": 4},
            "training": {"epochs": 8, "batch_size": 32},
            "base_learners": {"only": learner},
            "evaluation": {"attack": {"norm": "linf", "epsilon": 0.1, "step_size": 0.05}},
        }
    )
    shape = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8), "width": 4, "batch_norm": True}
    network = build_model("small_cnn", seed=1, **shape)
    network.classifier.fc3.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    base_learner = BaseLearner("only", make_plan(config, len(split)), network, split)
    base_learner.run_window(0, steps)
    return base_learner.flat.weights.clone()


@pytest.fixture(scope="module")
def digits_80():
    return load_image_data("digits").train.first(80)


@pytest.mark.parametrize("kind", ["all labelled", "all pseudo-labelled", "u = 1/2"])
@pytest.mark.parametrize(
    "beta, plain",
    [
        (1, {"name": "adversarial"}),
        (0, {"name": "adversarial", "beta": 0}),
        (0.25, {"name": "adversarial", "beta": 0.25}),
    ],
    ids=["PGD-AT", "NT", "mixture"],
)
def test_equal_weights_give_the_plain_objective(digits_80, kind, beta, plain):
    """With all labels of one kind, or with u = 1/2, RST is PGD-AT (beta 1), NT (beta 0) or their mixture."""
    mask = {"all labelled": torch.ones(80), "all pseudo-labelled": torch.zeros(80)}.get(kind, torch.arange(80) % 3 > 0)
    split = Split(digits_80.images, digits_80.labels, mask.bool())
    options = {"name": "rst", "beta": beta}
    if kind == "u = 1/2":
        options |= {"natural_weight": 0.5, "robust_weight": 0.5}
    ours, theirs = weights_after(options, split), weights_after(plain, digits_80)
    assert (ours - weights_after(plain, digits_80, 1)).abs().max() > 1e-2  # it did learn
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    if beta == 0:
        assert torch.allclose(ours, weights_after("natural", digits_80), rtol=1e-4, atol=1e-5)


def test_without_a_mask_the_bits_are_those_of_adversarial_training(digits_80):
    assert torch.equal(weights_after({"name": "rst", "beta": 1}, digits_80), weights_after("adversarial", digits_80))


def test_weights_matter(digits_80):
    split = Split(digits_80.images, digits_80.labels, torch.arange(80) % 3 > 0)
    assert not torch.allclose(weights_after("rst", split), weights_after({"name": "rst", "natural_weight": 0.5}, split))
