"""Training of strided 1 x 1 convolutions of few channels on a CPU, without a kernel that writes beyond its memory.

With AVX-512 and inputs in channels_last, oneDNN's gradient to the *weights* of such a convolution (1 x 1, stride 2, 3
or 4, no padding, one group, float32, 2 to 15 input channels, any number of output channels) ends the process by SIGSEGV
or SIGABRT once the image is large enough: from 8 channels with stride 2 at 48 pixels of side, not at 44. With 16 input
channels or more it never did, nor in bfloat16; and the gradient to the input is right.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = 16  # input channels: floats of a vector register with AVX-512


def guard_weight_gradients(network: nn.Module) -> nn.Module:
    """Gives the convolutions concerned their gradient to the weights another way, when trained on a CPU.

    It is that of a convolution without stride of every stride-th pixel. They stay what they are (type, weights, names);
    values and gradients to the input keep their bits.

    Returns:
        `network`.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _concerned(module):
            # What `nn.Conv2d.forward` calls: layers that are found by their type are still found.
            module._conv_forward = partial(_guarded, module.stride)  # type: ignore[method-assign]
    return network


def _concerned(module):
    plain = module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid") and module.groups == 1
    return plain and max(module.stride) > 1 and module.in_channels < NARROW


def _guarded(stride, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    trained = torch.is_grad_enabled() and weight.requires_grad
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not trained:
        return F.conv2d(x, weight, bias, stride)
    return _GuardedConvolution.apply(x, weight, bias, stride)


class _GuardedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.bias_sizes = stride, None if bias is None else list(bias.shape)
        return F.conv2d(x, weight, bias, stride)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wants_x, *wants_others = ctx.needs_input_grad[:3]

        def gradients(of, stride, wanted):
            where = (stride, (0, 0), (1, 1), False, (0, 0), 1)  # padding, dilation, transposed, output padding, groups
            return torch.ops.aten.convolution_backward(gradient, of, weight, ctx.bias_sizes, *where, wanted)

        of_x = gradients(x, ctx.stride, (True, False, False))[0] if wants_x else None
        rows, columns = ctx.stride
        _, of_weight, of_bias = gradients(x[..., ::rows, ::columns], (1, 1), (False, *wants_others))
        return of_x, of_weight, of_bias, None
