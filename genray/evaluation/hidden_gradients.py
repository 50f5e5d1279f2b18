"""Layers that hide gradients (Athalye et al. 1802.00420): the model's operations are watched in one forward pass.

A graph of the modules would miss what their code computes, and many networks cannot be traced.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from genray.attacks.auto import frozen

# Functions whose derivative is zero, or that drop values, by the names that torch gives them.
STEPS = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "floor_divide", "floordiv")
QUANTISING = ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "quantize_per_tensor")
DROPPING = ("threshold", "hardshrink", "topk", "kthvalue")
NO_VALUES = ("isnan", "isinf", "isfinite", "is_nonzero", "allclose", "equal", "is_floating_point", "is_complex")


class _Watch(TorchFunctionMode):
    """Collects the functions that give, of values that depend on the images, steps or integers."""

    def __init__(self):
        super().__init__()
        self.layers: list[str] = []  # the modules that are running, the innermost last
        self.found: dict[str, None] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "").strip("_")
        if name not in NO_VALUES and any(map(_depends, args)) and (_hides(name) or _is_step(result)):
            self.found[f"{name} in {self.layers[-1]}" if self.layers else name] = None
        return result


def _hides(name):
    return name in STEPS or name in QUANTISING or name in DROPPING


def _depends(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad


def _is_step(result):
    """A tensor of integers or truth values: a comparison, a cast, the position of the largest value."""
    return isinstance(result, torch.Tensor) and not result.is_floating_point() and not result.is_complex()


def look_at_layers(model: nn.Module, x) -> list[str]:
    """A finding about layers that round, compare with a threshold or keep only some values; none where there are none.

    Args:
        model: in eval mode.
        x: (N, C, H, W) float32.
    """
    watch, hooks = _Watch(), []
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, where=where: watch.layers.append(where)))
        hooks.append(module.register_forward_hook(lambda *_: watch.layers.pop() and None))
    try:
        with torch.enable_grad(), frozen(model), watch:  # of rounded weights nothing is hidden
            model(x.detach().requires_grad_(True))
    finally:
        for hook in hooks:
            hook.remove()
    if not watch.found:
        return []
    return [
        f"layers hide gradients ({', '.join(list(watch.found)[:5])}): rounded, compared or dropped values have slopes "
        "that say nothing, so that attacks by gradients look weak; put a smooth layer in its place in an attack of "
        "your own, and add square and transfer"
    ]
