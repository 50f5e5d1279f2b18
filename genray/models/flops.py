"""What a forward pass costs in floating-point operations."""

import functools
import json

import torch
from torch.utils.flop_counter import FlopCounterMode

from genray.errors import ConfigError
from genray.models import build_model


@torch.no_grad()
def forward_flops(model, x) -> float:
    """Of the convolutions and matrix products of one pass; infinite where they cannot be counted.

    Args:
        model: in eval mode.
        x: (N, C, H, W), where the model is.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            model(x)
    except RuntimeError:  # what counts stands between the model and torch, which not every model bears
        return float("inf")
    return counter.get_total_flops() or float("inf")


def architecture_flops(architecture: dict) -> float:
    """Of one example; `architecture` has the arguments of `build_model`."""
    named = {key: value for key, value in architecture.items() if key != "factory"}
    return _counted(json.dumps(named, sort_keys=True), architecture.get("factory"))


@functools.lru_cache
def _counted(architecture, factory):
    known = json.loads(architecture)
    with torch.device("meta"):  # nothing is computed, and no random number drawn
        try:
            network = build_model(**known, factory=factory).eval()
        except ConfigError:  # a user's network may look at its numbers, of which there are none
            return float("inf")
        return forward_flops(network, torch.empty(1, known["in_channels"], *known["image_size"]))
