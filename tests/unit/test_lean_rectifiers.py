"""ReLUs that overwrite the gradient and compare bfloat16 as integers have torch's bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genray.models import build_model
from genray.models.attack_copy import AttackCopy
from genray.models.lean_rectifiers import rectify, use_lean_rectifiers
from genray.models.tracing import overwrite_activations, trace

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}


def numbers(dtype, seed):
    """(4, 5, 6, 8) normal numbers with the special ones of the type among them, a NaN at the end."""
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, limits.tiny, -limits.tiny, limits.smallest_normal / 4, -limits.smallest_normal / 4]
    special += [limits.max, limits.min, float("inf"), float("-inf")]
    values = torch.randn(4, 5, 6, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    flat = values.flatten()
    for place in range(100):  # every special value beside every other, in the two tensors of a test
        flat[place] = special[place // 10 if seed else place % 10]
    flat[-1] = float("nan")
    return flat.view_as(values)


def bits(tensor):
    """The bits of every number, all NaN alike."""
    return tensor.where(~tensor.isnan(), torch.nan).contiguous().view(BITS[tensor.dtype])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "both"])
@pytest.mark.parametrize("owns_gradient", [False, True])
@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_torchs(dtype, overwrites, owns_gradient, layout):
    x, weights = numbers(dtype, 0), numbers(dtype, 1)
    x = x if layout == "NCHW" else x.contiguous(memory_format=torch.channels_last)
    weights = weights.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else weights
    expected, found = (x.clone(memory_format=torch.preserve_format).requires_grad_(True) for _ in range(2))
    value = F.relu(expected)
    (expected_gradient,) = torch.autograd.grad(value, expected, weights.clone(memory_format=torch.preserve_format))
    given = weights.clone(memory_format=torch.preserve_format)
    taken = found.clone(memory_format=torch.preserve_format)
    mine = rectify(taken, overwrites, owns_gradient)
    assert torch.equal(bits(taken.detach()), bits(mine.detach() if overwrites else x))
    (gradient,) = torch.autograd.grad(mine, found, given)
    # Which zero comes out of -0.0 is nobody's business: compared as numbers, bit for bit elsewhere.
    assert torch.equal(bits(mine + 0.0), bits(value + 0.0))
    assert torch.equal(bits(gradient), bits(expected_gradient))
    assert torch.equal(bits(given), bits(weights)) or owns_gradient
    with torch.no_grad():
        plain = x.clone(memory_format=torch.preserve_format)
        result = rectify(plain, overwrites)
        assert torch.equal(bits(result + 0.0), bits(value.detach() + 0.0))
        assert (result.data_ptr() == plain.data_ptr()) == overwrites
        assert torch.equal(bits(plain), bits(x)) or overwrites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "wrn_28_10", "small_cnn"])
def test_networks_keep_every_bit(name, dtype):
    options = {"batch_norm": True} if name == "small_cnn" else {}
    width = 1 if name == "wrn_28_10" else 4
    made = build_model(name, num_classes=7, in_channels=3, image_size=(32, 32), width=width, seed=3, **options).eval()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    made = made.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    plain, lean = (overwrite_activations(trace(copy.deepcopy(made))) for _ in range(2))
    assert use_lean_rectifiers(lean) > 4 and not any(isinstance(m, nn.ReLU) and m.inplace for m in lean.modules())
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [logits_and_gradient(net, x.contiguous(memory_format=torch.channels_last)) for net in (plain, lean)]
    assert found[0][1].abs().max() > 0
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found))
    assert lean.code.count("owns_gradient = True") > lean.code.count("owns_gradient = False")


class Shared(nn.Module):
    """What a sum gives back is one tensor for all that were added."""

    def __init__(self, inplace=False):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.relu, self.norm = nn.ReLU(inplace=inplace), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 64, 10)

    def forward(self, x):
        x = self.relu(self.one(x)) + F.relu(self.two(x), True)
        x = self.relu(torch.sigmoid(self.norm(x)))  # the sigmoid's gradient needs what it gave
        return self.linear(x.flatten(1))


class ReadsTheOverwritten(Shared):
    def forward(self, x):
        x = self.one(x)
        y = self.relu(x)
        return self.linear((x + y).flatten(1))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("network", [Shared(), ReadsTheOverwritten(), ReadsTheOverwritten(inplace=True)])
def test_what_others_read_is_not_overwritten(network, lean):
    network = network.eval().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    copied = AttackCopy(network, in_place=True, lean_gradients=lean, dtype=torch.float64)
    expected, found = (logits_and_gradient(net, x) for net in (network, copied))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(expected, found))


def logits_and_gradient(network, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
    logits = network(x)
    return logits.detach(), torch.autograd.grad(logits.float().logsumexp(1).sum(), x)[0]
