"""Convolutions with a cheaper input gradient have torch's own gradient."""

import pytest
import torch
from torch import nn

from genray.models import build_model
from genray.models.attack_copy import AttackCopy
from genray.models.lean_gradients import FewChannels, Halving, Skipping, use_lean_gradients

# (in, out, kernel, stride, padding) of convolutions, and what each becomes.
CONVOLUTIONS = {
    "shortcut": ((6, 9, 1, 2, 0), Skipping),
    "images": ((3, 5, 3, 1, 1), FewChannels),
    "grey images": ((1, 4, 3, 1, 1), FewChannels),
    "narrow halving": ((8, 5, 3, 2, 1), Halving),
    "wide halving": ((17, 5, 3, 2, 1), nn.Conv2d),
    "ordinary": ((8, 5, 3, 1, 1), nn.Conv2d),
    "without padding": ((3, 5, 3, 1, 0), FewChannels),
    "much padding": ((2, 5, 3, 1, 2), FewChannels),
    "too much padding": ((2, 5, 3, 1, 3), nn.Conv2d),
    "padded shortcut": ((6, 9, 1, 2, 1), nn.Conv2d),
    "5 x 5": ((3, 5, 5, 1, 2), nn.Conv2d),
}


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 8), (4, 9)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_values_and_gradients_are_those_of_torch(name, size):
    (channels, out, kernel, stride, padding), kind = CONVOLUTIONS[name]
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(channels, out, kernel, stride, padding)).double().requires_grad_(False)
    network = nn.Sequential(nn.Conv2d(channels, out, kernel, stride, padding)).double().requires_grad_(False)
    changed = use_lean_gradients(network)
    assert type(network[0]) is kind and changed == (["0"] if kind is not nn.Conv2d else [])
    mine = network[0].convolution if changed else network[0]
    mine.load_state_dict(plain[0].state_dict())
    for _ in range(2):
        if changed:
            network[0].prepare()
        x = torch.randn(3, channels, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        weights = torch.randn_like(plain(x))
        found = []
        for net in (plain, network):
            image = x.clone().requires_grad_(True)
            value = net(image)
            found.append((value, *torch.autograd.grad((value * weights).sum(), image)))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)
        for one in (plain[0], mine):  # after a refresh
            one.weight.mul_(-0.5)


@pytest.mark.parametrize("what", [{"groups": 2}, {"dilation": 2, "padding": 2}, {"padding_mode": "reflect"}])
def test_special_convolutions_are_left_alone(what):
    special = nn.Sequential(nn.Conv2d(2, 4, 3, **{"padding": 1, **what}))
    assert use_lean_gradients(special) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "small_cnn"])
def test_a_copy_follows_its_network(name, dtype):
    model = build_model(name, num_classes=7, in_channels=3, image_size=(16, 16), width=4, seed=3)
    model = model.to(torch.float64 if dtype == torch.float64 else torch.float32).eval()
    model.to(memory_format=torch.channels_last)
    copies = [AttackCopy(model, in_place=True, lean_gradients=wanted, dtype=dtype) for wanted in (False, True)]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    x, found = torch.rand(4, 3, 16, 16, dtype=next(model.parameters()).dtype), []
    for copy in copies:
        copy.refresh()
        image = x.clone().contiguous(memory_format=torch.channels_last).requires_grad_(True)
        logits = copy(image)
        found.append((logits, *torch.autograd.grad(logits.logsumexp(1).sum(), image)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].abs().max() > 0
    error = (found[0][1] - found[1][1]).norm() / found[0][1].norm()
    assert error < (1e-12 if dtype == torch.float64 else 2e-2)
