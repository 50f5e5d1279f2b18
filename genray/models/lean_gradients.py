"""Convolutions whose gradient to their input is cheaper on a CPU than oneDNN's: for networks that are only attacked.

oneDNN needs two to four times as long for the input gradient as for the pass forward where a convolution skips inputs
(1 x 1 with stride 2, a shortcut's) or has few input channels, as the first one has: those fill a fraction of a vector
register. Written as an ordinary convolution of the output's gradient, they take as long as their multiplications do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With more channels oneDNN's own gradient keeps the registers busy (measured with AVX-512: 16 floats).
FEW_CHANNELS, NARROW = 4, 16


def use_lean_gradients(network: nn.Module) -> list[str]:
    """Replaces the convolutions of a network that have a cheaper gradient; returns their names.

    What they compute stays the same, and so do their weights; only the gradient to the input is there afterwards, not
    those to the weights. `prepare` of each has to be called after its weights changed.
    """
    found = [(name, module) for name, module in network.named_modules() if type(module) is nn.Conv2d]
    lean = [(name, kind(module)) for name, module in found for kind in KINDS if kind.fits(module)]
    for name, module in lean:
        network.set_submodule(name, module)
    return [name for name, _ in lean]


class LeanConv2d(nn.Module):
    """A convolution with weight and bias of `convolution`; subclasses say what its gradient to the input is.

    Args:
        convolution: one that `fits`.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution
        self.stride, self.padding = convolution.stride[0], convolution.padding[0]

    @staticmethod
    def _is_plain(module, kernel, paddings):
        """Whether it is a square convolution of one group, padded alike on all sides with zeros."""
        usual = {"dilation": (1, 1), "groups": 1, "padding_mode": "zeros", "kernel_size": (kernel, kernel)}
        padded = module.padding in [(padding, padding) for padding in paddings]
        return padded and all(getattr(module, name) == value for name, value in usual.items())

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not x.requires_grad or x.shape[2] % 2 or x.shape[3] % 2:
            return self.convolution(x)
        weight, bias = self.convolution.weight, self.convolution.bias
        return _LeanConvolution.apply(x, weight, bias, self.stride, self.padding, self.input_gradient, *self.prepared)

    def prepare(self):
        """Takes over the weights of now."""
        weight = self.convolution.weight.detach()
        self.prepared = [t.contiguous(memory_format=torch.channels_last) for t in self.kernels(weight)]

    @staticmethod
    def kernels(weight: Tensor) -> list[Tensor]:
        """What `input_gradient` convolves with."""
        raise NotImplementedError

    @staticmethod
    def input_gradient(gradient: Tensor, padding: int, *kernels: Tensor) -> Tensor:
        """(N, Cin, H, W) of the output's (N, Cout, H', W'), both in channels_last; H and W are even."""
        raise NotImplementedError


class Skipping(LeanConv2d):
    """1 x 1 with stride 2: three of four inputs have no gradient."""

    @classmethod
    def fits(cls, module):
        return cls._is_plain(module, 1, [0]) and module.stride == (2, 2)

    @staticmethod
    def kernels(weight):
        return [weight.transpose(0, 1)]

    @staticmethod
    def input_gradient(gradient, padding, kernel):
        count, _, height, width = gradient.shape
        shape, last = (count, len(kernel), 2 * height, 2 * width), torch.channels_last
        whole = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=last).zero_()
        whole[:, :, ::2, ::2] = F.conv2d(gradient, kernel)
        return whole


class FewChannels(LeanConv2d):
    """3 x 3 of the images: the gradients of 2 x 2 pixels as the channels of one convolution with stride 2.

    Pixel 2 i + a gets the weight at k from the output at 2 i + a + p - k with p rows of padding: two rows of pixels
    from the outputs of rows 2 i + p - 2 to 2 i + p + 1.
    """

    @classmethod
    def fits(cls, module):
        return cls._is_plain(module, 3, [0, 1, 2]) and module.stride == (1, 1) and module.in_channels <= FEW_CHANNELS

    @staticmethod
    def kernels(weight):
        turned = weight.flip(2, 3).transpose(0, 1)
        whole = weight.new_zeros((2, 2, *turned.shape[:2], 4, 4))
        for a in (0, 1):
            for b in (0, 1):
                whole[a, b, :, :, a : a + 3, b : b + 3] = turned
        return [whole.flatten(0, 2)]

    @staticmethod
    def input_gradient(gradient, padding, kernel):
        pixels = F.conv2d(gradient, kernel, stride=2, padding=2 - padding).permute(0, 2, 3, 1)
        count, height, width, channels = pixels.shape
        rows = pixels.reshape(count, height, width, 2, channels // 2).transpose(2, 3)
        return rows.reshape(count, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)


class Halving(LeanConv2d):
    """3 x 3 with stride 2 of a narrow layer: even rows and odd rows each from one convolution without stride.

    Rows 2 i get the weights' middle row from the output's row i; rows 2 i + 1 the last one from row i and the first
    one from row i + 1. The same holds for columns, whose parity is a channel here.
    """

    @classmethod
    def fits(cls, module):
        return cls._is_plain(module, 3, [1]) and module.stride == (2, 2) and module.in_channels <= NARROW

    @staticmethod
    def kernels(weight):
        turned = weight.transpose(0, 1)
        columns = weight.new_zeros((2, *turned.shape[:3], 2))
        columns[0, ..., 0] = turned[..., 1]
        columns[1, ..., 0], columns[1, ..., 1] = turned[..., 2], turned[..., 0]
        both = columns.flatten(0, 1)
        return [both[:, :, 1:2], both[:, :, (2, 0)]]

    @staticmethod
    def input_gradient(gradient, padding, even, odd):
        padded = F.pad(gradient, (0, 1, 0, 1))
        rows = [
            F.conv2d(part, kernel).permute(0, 2, 3, 1) for part, kernel in ((padded[:, :, :-1], even), (padded, odd))
        ]
        count, height, width, channels = rows[0].shape
        return torch.stack(rows, 2).view(count, 2 * height, 2 * width, channels // 2).permute(0, 3, 1, 2)


KINDS = (Skipping, FewChannels, Halving)


class _LeanConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, input_gradient, *kernels):
        ctx.input_gradient, ctx.padding, ctx.kernels = input_gradient, padding, kernels
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return ctx.input_gradient(gradient, ctx.padding, *ctx.kernels), *([None] * (5 + len(ctx.kernels)))
