"""Learners of a second for tests: SmallCNN of width 4 on 80 digits, three steps an epoch, the last of 16 images."""

import io

import numpy as np
import torch

from genray.config import load_config
from genray.models import build_model

BATCH = 32


def unit_config(base_learners, **sections):
    """A run of 3 epochs on the digits with these learners; `sections` replace or add others."""
    common = {"name": "unit", "seed": 11, "data": {"source": "digits"}, "training": {"epochs": 3, "batch_size": BATCH}}
    common["model"] = {"name": "small_cnn", "batch_norm": True}
    return load_config({**common, "base_learners": base_learners, **sections})


def small_network(dropout=0.0):
    """With BatchNorm; the last layer does not start at zero, so that an attack has a gradient at once."""
    shape = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8), "width": 4}
    network = build_model("small_cnn", **shape, batch_norm=True, dropout=dropout, seed=1)
    network.classifier.fc3.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return network


def through_a_file(state):
    """As a checkpoint does it: arrays as tensors, in a file that `weights_only` can read."""

    def convert(value, of, to):
        if isinstance(value, dict):
            return {key: convert(item, of, to) for key, item in value.items()}
        return to(value) if isinstance(value, of) else value

    file = io.BytesIO()
    torch.save(convert(state, np.ndarray, torch.from_numpy), file)
    file.seek(0)
    return convert(torch.load(file, weights_only=True), torch.Tensor, torch.Tensor.numpy)
