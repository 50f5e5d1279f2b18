"""ReLUs with the bits of torch's own in less time, for networks that are only attacked on a CPU.

Their time is memory and, in bfloat16, torch's way by float32 and back. What the gradient overwrites is the tensor that
came in, which is in the cache and needs no new memory; and bfloat16 numbers are compared as 16-bit integers, which
have the same sign and order above zero.
"""

import torch
from torch import Tensor, fx, nn

from genray.models.tracing import called, is_relu

# The gradient that these give to their input is a tensor of its own; a sum gives one and the same to all its inputs.
FRESH_GRADIENT = (nn.Conv2d, nn.MaxPool2d, nn.Linear)


def use_lean_rectifiers(traced: fx.GraphModule) -> int:
    """Replaces the ReLUs of a traced network, in place; returns how many. An overwriting one stays overwriting."""
    found = [node for node in traced.graph.nodes if is_relu(traced, node)]
    for node in found:
        overwrites = _overwrites(traced, node)
        # Of several gradients autograd makes a sum, which is nobody else's either.
        owns_gradient = any(called(traced, reader) in FRESH_GRADIENT for reader in node.users)
        node.op, node.target = "call_function", rectify
        node.args, node.kwargs = node.args[:1], {"overwrites": overwrites, "owns_gradient": owns_gradient}
    traced.recompile()
    return len(found)


def _overwrites(traced, node):
    if node.op == "call_module":
        return traced.get_submodule(node.target).inplace
    return bool(node.kwargs.get("inplace", node.args[1:] and node.args[1]))


def rectify(x: Tensor, overwrites: bool = False, owns_gradient: bool = False) -> Tensor:
    """max(x, 0) of a tensor of any shape; NaN stays NaN (in bfloat16 only where its sign bit is 0).

    Args:
        overwrites: write the result into x.
        owns_gradient: nobody else reads the gradient that comes back, so it may be overwritten.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rectify.apply(x, overwrites, owns_gradient)
    return _rectified(x, overwrites)


def _rectified(x, overwrites):
    if overwrites:
        _ordered(x).clamp_min_(0)
        return x
    return _ordered(x).clamp_min(0).view(x.dtype)


def _ordered(x):
    """x, in bfloat16 as integers: negative where x is, and rising with x elsewhere."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, overwrites, owns_gradient):
        y = _rectified(x, overwrites)
        if overwrites:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.owns_gradient = owns_gradient
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        if not ctx.owns_gradient or gradient.stride() != y.stride():
            gradient = torch.empty_like(y).copy_(gradient)
        bits = _ordered(gradient)
        torch.ops.aten.threshold_backward.grad_input(bits, _ordered(y), 0, grad_input=bits)
        return gradient, None, None
