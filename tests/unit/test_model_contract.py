"""A model that breaks the contract gives the numbers of its twin that keeps it, or one line that says what it does."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

import genray
from genray.errors import DataError

MEAN, STD = 0.3, 0.4


def pixels(digits):
    return digits[0].float() / 255


@pytest.fixture(scope="module")
def net(digits):
    """A network of normalised digits, trained a little, in train mode."""
    x, y = pixels(digits), digits[1]
    torch.manual_seed(0)
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made((x - MEAN) / STD), y).backward()
        optimizer.step()
    return made


class Keeps(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x - MEAN) / STD)


class WritesIntoItsInput(Keeps):
    def forward(self, x):
        return self.net(x.sub_(MEAN).div_(STD))


class WritesUnseen(Keeps):
    """torch counts no version of what is written through `.data`, and its gradients lack the division."""

    def forward(self, x):
        x.data.sub_(MEAN).div_(STD)
        return self.net(x)


class Halves(Keeps):
    def forward(self, x):
        return super().forward(x).half()


class InAnObject(nn.Module):
    """As the models of transformers, whose outputs are dictionaries with attributes too."""

    def __init__(self, net, kind=Keeps):
        super().__init__()
        self.kept = kind(net)

    def forward(self, x):
        return types.SimpleNamespace(loss=None, logits=self.kept(x))


class Callable:
    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net((x - MEAN) / STD)


def scaled(net, x, *, mean):
    return net((x - mean) / STD)


BREACHES = {  # name -> (what is evaluated instead of Keeps, what is found, how far numbers may differ)
    "in place": (WritesIntoItsInput, "changes its input in place: it is given copies", 0),
    "in place unseen": (WritesUnseen, "changes its input in place", 0),
    "first layer in place": (
        lambda net: nn.Sequential(nn.LeakyReLU(1, inplace=True), Keeps(net)),
        "changes its input",
        0,
    ),
    "lambda": (lambda net: lambda x: net((x - MEAN) / STD), None, 0),
    "method": (lambda net: Keeps(net).forward, None, 0),
    "partial": (lambda net: functools.partial(scaled, net, mean=MEAN), None, 0),
    "object": (Callable, None, 0),
    "float64": (lambda net: Keeps(net).double(), "the weights are float64: a copy in float32 is evaluated", 0),
    "float16": (lambda net: Keeps(net).half(), "the weights are float16", 0.05),
    "bfloat16": (lambda net: Keeps(net).bfloat16(), "the weights are bfloat16", 0.05),
    "half of it in float64": (lambda net: nn.Sequential(Keeps(net), nn.Identity().double()), None, 0),
    "logits in an object": (InAnObject, None, 0),
    "logits in float16 in an object": (lambda net: InAnObject(net, Halves), "the outputs are float16", 0.05),
    "outputs in float16": (Halves, "the outputs are float16, compared in float32", 0.05),
}


def measured(model, digits, attacks):
    x, y = pixels(digits)[:60], digits[1][:60]
    before = x.clone()
    record = genray.evaluate(model, x, y, attacks=attacks, epsilon=0.1, engine="pyautoattack")
    assert torch.equal(x, before)
    columns = record["norms"]["linf"]["columns"]
    return [record["natural"]["value"], *(column["value"] for column in columns.values())], record["findings"]


@pytest.fixture(scope="module")
def twin(net, digits):
    return functools.cache(lambda attacks: measured(Keeps(copy.deepcopy(net)), digits, attacks))


@pytest.mark.slow
@pytest.mark.parametrize("breach", BREACHES)
def test_the_numbers_are_those_of_the_twin_that_keeps_the_contract(breach, net, digits, twin):
    make, says, apart = BREACHES[breach]
    attacks = "pgd20,fab_t" if make is WritesIntoItsInput or breach in ("first layer in place", "object") else "pgd20"
    expected, sound = twin(attacks)
    assert 0 < expected[1] < expected[0]  # so that a network which sees other pixels differs
    broken = make(copy.deepcopy(net))
    kept = {name: value.clone() for name, value in getattr(broken, "state_dict", dict)().items()}
    numbers, findings = measured(broken, digits, attacks)
    assert numbers == pytest.approx(expected, abs=apart + 1e-9)
    train_mode = "the model was in train mode; it is evaluated in eval mode"
    assert train_mode in sound and train_mode in findings
    others = [finding for finding in findings if finding != train_mode]
    assert [says in finding for finding in others] == ([True] if says else [])
    for name, value in kept.items():  # it is the caller's still: type, weights
        assert value.dtype == broken.state_dict()[name].dtype and torch.equal(value, broken.state_dict()[name])


def test_a_function_keeps_modes_and_gradients_of_the_modules_in_it(net, digits):
    inner = copy.deepcopy(net)
    measured(lambda x: inner((x - MEAN) / STD), digits, "fab_t")  # FAB calls backward()
    assert inner.training and all(p.requires_grad and p.grad is None for p in inner.parameters())


def test_weights_made_in_inference_mode_and_calls_in_it(net, digits):
    expected, _ = measured(Keeps(copy.deepcopy(net)), digits, "pgd20")
    with torch.inference_mode():
        made = Keeps(copy.deepcopy(net).requires_grad_(False))
        with pytest.raises(DataError, match="outside torch.inference_mode"):
            genray.evaluate(made, *digits)
    assert measured(made, digits, "pgd20")[0] == expected


def test_equal_weights_of_another_network_do_not_go_on_in_its_folder(net, digits, tmp_path):
    """A state dict does not tell the forward pass."""

    class Inverts(Keeps):
        def forward(self, x):
            return super().forward(1 - x)

    x, y = pixels(digits)[:60], digits[1][:60]
    how = {"attacks": "pgd20", "epsilon": 0.1, "output": str(tmp_path / "out")}
    genray.evaluate(Keeps(net), x, y, **how)
    assert Inverts(net).state_dict().keys() == Keeps(net).state_dict().keys()
    with pytest.raises(genray.errors.RunFolderError, match="another evaluation: predictions not what it was"):
        genray.evaluate(Inverts(net), x, y, resume=True, **how)


def test_outputs_that_are_nan_for_later_images_only(net, digits):
    """The findings about the model look at the first images; those of a task at its own."""
    x, y = pixels(digits)[:60], digits[1][:60]
    dark = x[45:50].mean((1, 2, 3)).min()

    class Breaks(Keeps):
        def forward(self, x):
            logits = super().forward(x)
            return logits.where((x.mean((1, 2, 3)) - dark).abs()[:, None] > 1e-6, torch.full_like(logits, torch.nan))

    which = int((x.mean((1, 2, 3)) - dark).abs().argmin())
    assert which >= 32
    record = genray.evaluate(Breaks(net).eval(), x, y, attacks="pgd20", epsilon=0.1)
    assert any("NaN" in finding for finding in record["findings"]), record["findings"]
