"""What the tests of AutoAttack's members attack: small networks trained on digits, and a linear model."""

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genray.data.datasets import load_image_data
from genray.models import build_model


@functools.cache
def trained_on_digits(num_classes):
    """(network trained for a second on digits of these classes, 40 test images, labels)."""
    data = load_image_data("digits", test_examples=300)
    (x, y), (test_x, test_y) = (_of_classes(split, num_classes) for split in (data.train, data.test))
    model = build_model("small_cnn", num_classes=num_classes, in_channels=1, image_size=(8, 8), width=4, seed=0)
    model.classifier.drop.p = 0.0  # would draw from the global generator
    optimizer, generator = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(120):
        some = torch.randint(len(x), (64,), generator=generator)
        images = x[some].requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), y[some]), images)
        images = (images.detach() + 0.08 * gradient.sign()).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(model(images), y[some]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), test_x[:40], test_y[:40]


def _of_classes(split, num_classes):
    chosen = split.labels < num_classes
    return split.images[chosen].float() / 255, split.labels[chosen]


class Watched(nn.Module):
    """Writes down what a model is called with, and whether with gradients."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen, self.graded = model, [], []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        self.graded.append(torch.is_grad_enabled())
        return self.model(x)


def correct(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) == y


def linear(num_classes=2, seed=3):
    """A linear model of 1 x 8 x 8 images and its weights (K, 64)."""
    layer = nn.Linear(64, num_classes)
    layer.weight.data = torch.from_numpy(np.random.default_rng(seed).normal(size=(num_classes, 64)).astype(np.float32))
    layer.bias.data = -layer.weight.data @ torch.full((64,), 0.5)
    return nn.Sequential(nn.Flatten(), layer).eval(), layer.weight.data


def at_margins(w, margins):
    """Images with the given margins z_0 - z_1 of a two-class `linear` model: grey, moved along w."""
    along = (w / w.square().sum()).view(1, 1, 8, 8)
    return 0.5 + torch.as_tensor(margins).view(-1, 1, 1, 1) * along


def one_run_after_another(seen):
    """The passes of a single example in the order in which they were made one run at a time."""
    groups = (list(group) for _, group in itertools.groupby(seen, key=len))
    return [p[row : row + 1] for group in groups for row in range(len(group[0])) for p in group]
