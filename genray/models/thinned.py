"""Strided 1 x 1 convolutions of few channels on a CPU, without a kernel of oneDNN that writes beyond its memory.

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


def thin_first(network: nn.Module) -> nn.Module:
    """Makes the convolutions concerned take every stride-th pixel of their input first, when trained on a CPU.

    They stay what they are (type, weights, names), and what they compute changes by rounding only.

    Returns:
        `network`.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _concerned(module):
            # What `nn.Conv2d.forward` calls: layers that are found by their type are still found.
            module._conv_forward = partial(_thinned, module.stride)
    return network


def _concerned(module):
    plain = module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid") and module.groups == 1
    return plain and max(module.stride) > 1 and module.in_channels < NARROW


def _thinned(stride, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.conv2d(x, weight, bias, stride)
    return F.conv2d(x[..., :: stride[0], :: stride[1]], weight, bias)
