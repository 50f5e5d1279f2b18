"""ReLU that overwrites its input, fast in bfloat16 on CPU, where torch computes it by way of float32."""

import torch
from torch import Tensor


def relu_(x: Tensor) -> Tensor:
    """max(x, 0) in the place of x, which no backward pass may need; bit for bit torch's, but for the sign of NaNs."""
    # A compiler fuses torch's own with its neighbours and needs no such help.
    bits = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return _OfBits.apply(x) if bits else torch.relu_(x)


class _OfBits(torch.autograd.Function):
    """Numbers of 16 bits have the order and the sign of the integers of the same bits, as far as ReLU can tell."""

    @staticmethod
    def forward(ctx, x):
        x.view(torch.int16).clamp_min_(0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        (output,) = ctx.saved_tensors
        positive = output.view(torch.int16).clamp_max(1)
        return positive.mul_(gradient.view(torch.int16)).view(torch.bfloat16)
