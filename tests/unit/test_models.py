"""Networks against published counts and against forward passes written from the layer lists alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genray.errors import ConfigError
from genray.models import MODELS, WITHOUT_CHOICE, Normalize, build_model, count_parameters

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
SMALL_WIDTH = {name: 1 if name.startswith("wrn") else 4 for name in MODELS}

# name, parameters at 10 and at 100 classes, state-dict entries
PUBLISHED = [
    ("resnet18", 11_173_962, 11_220_132, 122),
    ("preact_resnet18_no_bn", 11_171_146, 11_217_316, 102),
    ("preact_resnet18_no_bn_raw_shortcut", 11_171_146, 11_217_316, 102),
    ("preact_resnet18", 11_172_170, 11_218_340, 107),
    ("preact_resnet18_softplus", 11_172_170, 11_218_340, 107),
    ("wrn_28_10", 36_479_194, 36_536_884, 155),
    ("wrn_34_10", 46_160_474, 46_218_164, 191),
    ("wrn_32_10", 46_160_474, 46_218_164, 191),
]


def build(name, *, shape=(3, 32, 32), num_classes=10, seed=0, **options):
    options.setdefault("width", SMALL_WIDTH[name])
    return build_model(name, num_classes=num_classes, in_channels=shape[0], image_size=shape[1:], seed=seed, **options)


def randomised(model, seed=1):
    """Moves every tensor off its initial value, so that a forgotten or exchanged layer shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            # Positive where a variance or a scale stands, small elsewhere.
            noise = torch.rand(value.shape, generator=generator)
            is_scale = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
            value.copy_(0.5 + noise if is_scale else (noise - 0.5) * 0.6)
    return model


class Reference:
    """The layer lists of the published networks over a state dict; statistics of the batch when `train`."""

    def __init__(self, state, train=False, act=lambda x: x.clamp(min=0)):
        self.act = act
        self.state, self.train = {name: value.clone() for name, value in state.items()}, train

    def conv(self, x, name, stride=1, padding=1):
        weight = self.state[name + ".weight"]
        return F.conv2d(x, weight, self.state.get(name + ".bias"), stride, padding if weight.shape[2] == 3 else 0)

    def bn(self, x, name):
        s = self.state
        mean, var = s[name + ".running_mean"], s[name + ".running_var"]
        if self.train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        column = [t[None, :, None, None] for t in (mean, var, s[name + ".weight"], s[name + ".bias"])]
        return (x - column[0]) / torch.sqrt(column[1] + 1e-5) * column[2] + column[3]

    def bn_relu(self, x, name):
        return self.act(self.bn(x, name))

    def linear(self, x, name):
        return x @ self.state[name + ".weight"].T + self.state[name + ".bias"]

    def resnet18(self, x):
        x = self.bn_relu(self.conv(x, "conv1"), "bn1")
        for name, stride in self.blocks18():
            out = self.bn_relu(self.conv(x, f"{name}.conv1", stride), f"{name}.bn1")
            out = self.bn(self.conv(out, f"{name}.conv2"), f"{name}.bn2")
            if f"{name}.shortcut.0.weight" in self.state:
                x = self.bn(self.conv(x, f"{name}.shortcut.0", stride), f"{name}.shortcut.1")
            x = self.act(out + x)
        return self.linear(x.mean((2, 3)), "linear")

    def preact(self, x, last_bn, act=None, raw_shortcut=False):
        act = act or self.act
        x = self.conv(x, "conv1")
        for name, stride in self.blocks18():
            active = act(self.bn(x, f"{name}.bn1"))
            out = self.conv(act(self.bn(self.conv(active, f"{name}.conv1", stride), f"{name}.bn2")), f"{name}.conv2")
            changes = f"{name}.shortcut.0.weight" in self.state
            x = out + (self.conv(x if raw_shortcut else active, f"{name}.shortcut.0", stride) if changes else x)
        return self.linear((self.bn_relu(x, "bn") if last_bn else x).mean((2, 3)), "linear")

    def preact_resnet18_no_bn(self, x):
        return self.preact(x, last_bn=False)

    def preact_resnet18(self, x):
        return self.preact(x, last_bn=True)

    def preact_resnet18_no_bn_raw_shortcut(self, x):
        """RobustBench's PreActBlock without `out_shortcut`."""
        return self.preact(x, last_bn=False, raw_shortcut=True)

    def preact_resnet18_softplus(self, x):
        """E-AT's: softplus in the blocks, and a ReLU after the last BatchNorm."""
        return self.preact(x, last_bn=True, act=lambda x: torch.log1p(x.exp()))

    def blocks18(self):
        return [(f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1) for i in range(1, 5) for j in range(2)]

    def wide(self, x, num_blocks):
        x = self.conv(x, "conv1")
        for group in (1, 2, 3):
            for i in range(num_blocks):
                name, stride = f"block{group}.layer.{i}", 2 if group > 1 and i == 0 else 1
                active = self.bn_relu(x, f"{name}.bn1")
                out = self.bn_relu(self.conv(active, f"{name}.conv1", stride), f"{name}.bn2")
                changes = f"{name}.convShortcut.weight" in self.state
                shortcut = self.conv(active, f"{name}.convShortcut", stride) if changes else x
                x = self.conv(out, f"{name}.conv2") + shortcut
        return self.linear(self.bn_relu(x, "bn1").mean((2, 3)), "fc")

    def wrn_28_10(self, x):
        return self.wide(x, 4)

    def wrn_32_10(self, x):
        return self.wide(x, 5)

    wrn_34_10 = wrn_32_10

    def small_cnn(self, x):
        padding = 1 if x.shape[2] < 28 else 0
        for i in range(1, 5):
            x = self.conv(x, f"feature_extractor.conv{i}", padding=padding)
            if f"feature_extractor.bn{i}.weight" in self.state:
                x = self.bn(x, f"feature_extractor.bn{i}")
            x = x.clamp(min=0)
            x = F.max_pool2d(x, 2) if i in (2, 4) else x
        x = self.linear(x.flatten(1), "classifier.fc1").clamp(min=0)
        return self.linear(self.linear(x, "classifier.fc2").clamp(min=0), "classifier.fc3")


@pytest.mark.parametrize(("name", "at_10", "at_100", "entries"), PUBLISHED)
def test_published_parameter_and_entry_counts(name, at_10, at_100, entries):
    with torch.device("meta"):
        models = [build_model(name, num_classes=k, in_channels=3, image_size=(32, 32)) for k in (10, 100)]
    assert [count_parameters(model) for model in models] == [at_10, at_100]
    assert [len(model.state_dict()) for model in models] == [entries, entries]


def test_small_cnn_has_the_published_layout():
    model = build("small_cnn", shape=(1, 28, 28), width=None)
    assert count_parameters(model) == 312_202
    names = [f"feature_extractor.conv{i}" for i in range(1, 5)] + [f"classifier.fc{i}" for i in range(1, 4)]
    assert list(model.state_dict()) == [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    assert model.classifier.fc1.weight.shape == (200, 1024)
    assert not model.classifier.fc3.weight.any() and not model.classifier.fc3.bias.any()
    assert model.classifier.fc1.weight.any()
    assert model.classifier.drop.p == 0.5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_model_on_every_image_size(name, shape):
    logits = build(name, shape=shape, num_classes=7)(torch.rand(2, *shape))
    assert logits.shape == (2, 7) and logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("train", [False, True])
def test_forward_is_the_published_layer_list(name, shape, train):
    # Width 2 of a wide resnet: at 1 the first group has no shortcut conv.
    options = {"width": 2} if name.startswith("wrn") else {"dropout": 0.0} if name == "small_cnn" else {}
    model = randomised(build(name, shape=shape, **options)).double().train(train)
    x = torch.rand(4, *shape, dtype=torch.float64)
    expected = getattr(Reference(model.state_dict(), train), name)(x)
    assert expected.std() > 1e-3  # logits that differ, or the comparison proves nothing
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in WITHOUT_CHOICE])
def test_silu_takes_the_place_of_every_relu(name):
    model = randomised(build(name, shape=(3, 8, 8), width=2, activation="silu")).double().eval()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    expected = getattr(Reference(model.state_dict(), act=lambda x: x / (1 + torch.exp(-x))), name)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-8)
    assert model.state_dict().keys() == build(name, shape=(3, 8, 8), width=2).state_dict().keys()


@pytest.mark.parametrize("train", [False, True])
def test_small_cnn_with_batch_norm_is_its_layer_list(train):
    model = randomised(build("small_cnn", shape=(1, 28, 28), batch_norm=True, dropout=0.0)).double().train(train)
    x = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(model(x), Reference(model.state_dict(), train).small_cnn(x), rtol=1e-8, atol=1e-8)
    assert len(model.state_dict()) == 14 + 4 * 5


@pytest.mark.parametrize("name", [name for name in MODELS if name != "small_cnn"])
def test_running_statistics_move_in_train_mode_only(name):
    model = build(name).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(4, 3, 32, 32)
    model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.train()(x)
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if "running_" in key)
    # torch keeps 0.9 of the old mean; the first bn of a resnet sees the stem's output, checked in full here.
    if name == "resnet18":
        expected = 0.1 * F.conv2d(x, before["conv1.weight"], padding=1).mean((0, 2, 3))
        torch.testing.assert_close(model.bn1.running_mean, expected)


def test_dropout_acts_in_train_mode_only():
    model = randomised(build("small_cnn", dropout=0.5))
    x = torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_initialisation_is_reproducible_and_private(name):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, again, other = build(name, seed=5), build(name, seed=5), build(name, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)  # the result must not depend on the global state either
    third = build(name, seed=5)
    for one, two, three in zip(*(m.state_dict().values() for m in (first, again, third)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_wide_resnet_initialisation():
    model = build("wrn_28_10", width=4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert not model.fc.bias.any() and model.fc.weight.any()


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_the_first_layer_and_leaves_the_keys_alone(name):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    plain, normalising = randomised(build(name)).eval(), build(name, mean=mean, std=std).eval()
    assert list(plain.state_dict()) == list(normalising.state_dict())
    normalising.load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalising(x), plain(by_hand))
    assert (normalising(x) - plain(x)).abs().max() > 1e-3
    torch.testing.assert_close(copy.deepcopy(normalising)(x), normalising(x))


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.0]), ([0.5, 0.5], [0.5]), ([float("nan")], [1.0]), ([], [])])
def test_normalize_refuses_bad_statistics(mean, std):
    with pytest.raises(ConfigError, match="normalisation: expected"):
        Normalize(mean, std)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet19"}, "expected one of small_cnn, resnet18, .*wrn_34_10, got 'resnet19'"),
        ({"num_classes": 1}, "num_classes: expected at least 2, got 1"),
        ({"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ({"image_size": (7, 32)}, r"image_size: .*at least 8, got \(7, 32\)"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"batch_norm": True}, "batch_norm: only small_cnn"),
        ({"dropout": 0.3}, "dropout: only small_cnn"),
        ({"name": "small_cnn", "dropout": 1.0}, "dropout: expected .* less than 1, got 1.0"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std: expected both or neither"),
        ({"mean": (0.5,), "std": (0.2,)}, "mean: expected 3 numbers"),
    ],
)
def test_build_model_names_the_wrong_value(change, message):
    good = {"name": "resnet18", "num_classes": 10, "in_channels": 3, "image_size": (32, 32), "width": 4}
    build_model(**good)
    with pytest.raises(ConfigError, match=message):
        build_model(**(good | change))


def test_build_model_lists_every_problem_at_once():
    with pytest.raises(ConfigError) as caught:
        build_model("nonsense", num_classes=0, in_channels=0, image_size=(1, 1))
    assert len(caught.value.problems) == 4
