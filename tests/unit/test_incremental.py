"""The forward pass on changed windows gives what the full forward pass gives."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from genray.attacks.native import incremental
from genray.attacks.native.incremental import IncrementalForward, PlainForward
from genray.models import build_model
from genray.models.attack_copy import AttackCopy
from genray.models.normalize import Normalize
from genray.models.wide_resnet import WideResNet

NORMALIZATION = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
NETWORKS = {  # name -> (builder, image side)
    "small_cnn unpadded": (lambda: built("small_cnn", 29), 29),
    "small_cnn padded": (lambda: built("small_cnn", 11, batch_norm=True, **NORMALIZATION), 11),
    "resnet18": (lambda: built("resnet18", 32, **NORMALIZATION), 32),
    "resnet18, odd size": (lambda: built("resnet18", 19), 19),
    "preact_resnet18": (lambda: built("preact_resnet18", 24, **NORMALIZATION), 24),
    "preact_resnet18_no_bn": (lambda: built("preact_resnet18_no_bn", 16), 16),
    "wide_resnet": (lambda: WideResNet(5, 3, width=1, blocks_per_group=2), 32),
}


def built(name, side, **options):
    return build_model(name, num_classes=5, in_channels=3, image_size=(side, side), width=4, seed=0, **options)


def randomised(model, dtype=torch.float64):
    """In eval mode, with statistics and classifier far from their initial values."""
    stream = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_var, 0.5), (module.weight, 0.5), (module.bias, -0.25)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=stream))
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=stream) / 10)
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=stream) / 10)
    return model.to(dtype).eval().requires_grad_(False)


def pictures(*shape, seed=2, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def play(model, x, script, tolerance, layout=torch.contiguous_format):
    """Sends both passes through the same windows, acceptances and departures; they have to agree all along."""
    x = x.contiguous(memory_format=layout)
    one, two = IncrementalForward.of(model, x), PlainForward(model)
    assert one is not None
    stream = torch.Generator().manual_seed(5)
    differ = []
    with torch.no_grad():
        scale = float(two.start(x).abs().amax())
        differ.append(one.start(x) - two.model(x))
        for top, left, height, width, accepted, leaves in script:
            count, channels, *size = two.images.shape
            top, left = top % size[0], left % size[1]
            window = (top, min(top + height, size[0])), (left, min(left + width, size[1]))
            shape = [stop - start for start, stop in window]
            content = torch.rand((count, channels, *shape), generator=stream, dtype=x.dtype)
            logits = two.propose(content, window)
            differ.append(one.propose(content, window) - logits)
            rows = (torch.rand(count, generator=stream) < accepted).nonzero().flatten()
            assert torch.equal(one.proposed(rows), two.proposed(rows))
            one.accept(rows), two.accept(rows)
            if leaves and count > 1:
                one.keep(torch.arange(count - 1)), two.keep(torch.arange(count - 1))
            assert torch.equal(one.images, two.images)
    assert scale > 1e-3 and max(float(d.abs().max()) for d in differ) <= tolerance * scale


SCRIPTS = st.lists(
    st.tuples(
        st.integers(0, 31), st.integers(0, 31), st.integers(1, 9), st.integers(1, 9),
        st.sampled_from([0.0, 0.5, 1.0]), st.booleans(),
    ), min_size=3, max_size=6,
)  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@given(script=SCRIPTS)
@settings(max_examples=6, deadline=None)
def test_same_logits_in_double_precision(name, script):
    build, side = NETWORKS[name]
    play(randomised(build()), pictures(4, 3, side, side), script, 1e-11)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_same_logits_of_the_folded_copy(name, layout):
    """Every corner, every layout, small and large windows: float32, as the attack runs it."""
    build, side = NETWORKS[name]
    copy = AttackCopy(randomised(build(), torch.float32).to(memory_format=layout))
    last = side - 1
    places = [(0, 0, 1, 1), (last, last, 1, 1), (0, last, 3, 3), (last - 4, 5, 5, 5), (6, 6, 9, 2), (1, 1, side, side)]
    script = [(*place, 0.5, i == 4) for i, place in enumerate(places * 2)]
    play(copy, pictures(4, 3, side, side, dtype=torch.float32), script, 1e-5, layout)


@pytest.mark.parametrize("name", ["small_cnn padded", "resnet18"])
def test_the_same_rounding_in_bfloat16(name):
    """A slice is not rounded more than the whole: both are as far from float32."""
    build, side = NETWORKS[name]
    model = randomised(build(), torch.float32)
    script = [(7 * i, 5 * i, 3, 3, 0.5, False) for i in range(8)]
    play(AttackCopy(model, dtype=torch.bfloat16), pictures(4, 3, side, side, dtype=torch.float32), script, 0.02)


@pytest.mark.parametrize("name, most", [("small_cnn unpadded", 0.25), ("resnet18", 0.65), ("wide_resnet", 0.55)])
def test_convolutions_see_only_slices(name, most, monkeypatch):
    """Outputs computed by convolutions, weighted with what each costs, for a window in the middle."""
    build, side = NETWORKS[name]
    copy, costs = AttackCopy(randomised(build(), torch.float32)), []
    whole = F.conv2d

    def counted(values, weight, *args):
        result = whole(values, weight, *args)
        costs.append(result[0, 0].numel() * weight.numel())
        return result

    monkeypatch.setattr(F, "conv2d", counted)
    x = pictures(1, 3, side, side, dtype=torch.float32)
    forward = IncrementalForward.of(copy, x)
    costs.clear()
    forward.start(x)
    full, at = sum(costs), len(costs)
    forward.propose(pictures(1, 3, 3, 3, dtype=torch.float32), ((side // 2, side // 2 + 3),) * 2)
    assert 0 < sum(costs[at:]) < most * full


class Other(nn.Module):
    """A convolution, a function of its output, a convolution, a linear layer."""

    def __init__(self, middle, channels=4, side=12):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(channels, 4, 3)
        self.middle, self.linear = middle, nn.Linear(4 * (side - 2) ** 2, 5)

    def forward(self, x):
        return self.linear(self.last(self.middle(self.first(x))).flatten(1))


class Gate(nn.Module):
    """Squeeze and excitation: each channel times a number that all its pixels decide."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(x.mean((2, 3), keepdim=True)))


class Columns(nn.Module):
    """Adds a constant that differs from column to column."""

    def __init__(self):
        super().__init__()
        self.register_buffer("values", torch.arange(12.0))

    def forward(self, x):
        return x + self.values


class TwoSizes(nn.Module):
    """A sum of maps of unequal sizes, broadcast."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, (1, 12))

    def forward(self, x):
        return F.relu(x) - self.conv(x) + x.shape[1]


class ShortcutFirst(nn.Module):
    """A sum whose first term changes in a smaller window than the second."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x - self.conv(x)


OTHERS = {
    "average pooling": (nn.AvgPool2d(3, 1, padding=1), 4, 12),
    "padded max-pooling": (nn.MaxPool2d(3, 1, padding=1), 4, 12),
    "strided max-pooling": (nn.MaxPool2d(3, 2), 4, 5),
    "rounded-up max-pooling": (nn.MaxPool2d(3, 5, ceil_mode=True), 4, 3),
    "dilated": (nn.Conv2d(4, 4, 3, padding=2, dilation=2), 4, 12),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, groups=2), 8, 12),
    "strided, wide gaps": (nn.Conv2d(4, 4, 1, stride=3), 4, 4),
    "reflecting": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), 4, 12),
    "padding same": (nn.Conv2d(4, 4, (3, 5), padding="same"), 4, 12),
    "one-sided kernel": (nn.Conv2d(4, 4, (1, 5), padding=(0, 2)), 4, 12),
    "group norm": (nn.GroupNorm(2, 4), 4, 12),
    "softmax over space": (nn.Softmax(3), 4, 12),
    "shortcut first": (ShortcutFirst(), 4, 12),
    "gate": (Gate(), 4, 12),
    "columns": (Columns(), 4, 12),
    "two sizes": (TwoSizes(), 4, 12),
    "gelu and dropout": (nn.Sequential(nn.GELU(), nn.Dropout(0.5)), 4, 12),
    "transposed": (nn.ConvTranspose2d(4, 4, 3, padding=1), 4, 12),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_computed_whole_where_they_must_be(name):
    middle, channels, side = OTHERS[name]
    script = [(0, 0, 2, 2, 0.5, False), (11, 11, 1, 1, 1.0, False), (4, 7, 1, 3, 0.5, True), (5, 1, 2, 1, 0.0, False)]
    script += [(i, 11 - i, 1, 1, 0.5, False) for i in range(12)]
    play(randomised(Other(middle, channels, side)), pictures(4, 3, 12, 12), script, 1e-11)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class AddsInPlace(nn.Module):
    def forward(self, x):
        y = x
        y += 1  # the trace has a sum here that leaves x as it was
        return x


class Hooked(Other):
    def __init__(self):
        super().__init__(nn.ReLU())
        self.last.register_forward_hook(lambda module, args, out: out.square())


class ClampsInPlace(nn.Module):
    def forward(self, x):
        return x.clamp_(0, 1)


@pytest.mark.parametrize(
    "model",
    [
        Other(Branches()), Other(AddsInPlace()), Other(ClampsInPlace()), Other(nn.ReLU(inplace=True)),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 2)),
        nn.Sequential(Normalize((0.5,) * 3, (1.0,) * 3), nn.Conv2d(3, 5, 3)),
        Hooked(),
        lambda x: x.mean((2, 3)),
    ],
    ids=["branch", "iadd", "clamp_", "in-place relu", "no convolution", "logits are a map", "hook", "no module"],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(model):
    assert IncrementalForward.of(model, pictures(2, 3, 12, 12, dtype=torch.float32)) is None


def test_a_network_in_train_mode_is_not_sliced():
    """BatchNorm then looks at the whole map; dropout stays random."""
    model = randomised(built("resnet18", 16)).train()
    x = pictures(4, 3, 16, 16)
    forward = IncrementalForward.of(model, x)
    assert torch.allclose(forward.start(x), model(x))
    changed = x.clone()
    changed[:, :, 3:5, 3:5] = 0
    assert torch.allclose(forward.propose(torch.zeros(4, 3, 2, 2, dtype=x.dtype), ((3, 5), (3, 5))), model(changed))


def test_the_given_images_are_not_changed():
    model, x = randomised(built("resnet18", 16)), pictures(4, 3, 16, 16)
    for forward in (IncrementalForward.of(model, x), PlainForward(model)):
        given, content = x.clone(), torch.zeros(4, 3, 2, 2, dtype=x.dtype)
        forward.start(given)
        forward.propose(content, ((3, 5), (3, 5)))
        forward.accept(torch.tensor([0, 2]))
        assert torch.equal(given, x) and not content.any()
        assert not forward.images[[0, 2], :, 3:5, 3:5].any() and torch.equal(forward.images[[1, 3]], x[[1, 3]])


def test_a_window_that_covers_most_runs_the_layer_whole(monkeypatch):
    model = randomised(built("resnet18", 16))
    x = pictures(2, 3, 16, 16)
    forward = IncrementalForward.of(model, x)
    forward.start(x)
    monkeypatch.setattr(incremental, "LARGEST_SHARE", 0.0)
    monkeypatch.setattr("genray.attacks.native.layers.Slide.__call__", None)
    forward.propose(torch.zeros(2, 3, 1, 1, dtype=torch.float64), ((3, 4), (3, 4)))
