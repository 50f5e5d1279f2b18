"""The ways to run a learner's network: each computes the same up to its rounding."""

import shutil

import pytest
import torch
from process_groups import alone

from genray.config import load_config
from genray.core.flat import FlatWeights
from genray.learners.execution import Execution
from genray.models import build_model
from genray.models.tracing import overwriting

X = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))


def passes(dropout=0.0, **compute):
    model = build_model("small_cnn", num_classes=10, in_channels=1, image_size=(8, 8), width=8, batch_norm=True, seed=1)
    torch.nn.init.normal_(model.classifier.fc3.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    model.classifier.drop.p = dropout
    section = load_config(None, [f"compute.{key}={str(value).lower()}" for key, value in compute.items()]).compute
    FlatWeights(model.train())
    return Execution(model, section, torch.device("cpu"))


def gradients(made):
    made.training(X).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in made.network.parameters()])


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_bf16_trains_float32_weights():
    plain, rounded = passes(), passes(precision="bf16")
    assert rounded.training(X).dtype == torch.float32
    assert not torch.equal(rounded.training(X), plain.training(X))
    assert torch.allclose(rounded.training(X), plain.training(X), rtol=0.05, atol=0.02)
    first, second = gradients(plain), gradients(rounded)
    assert second.dtype == torch.float32
    assert cosine(first, second) > 0.99
    assert all(p.dtype == torch.float32 for p in rounded.network.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_attacked_copy_follows_the_network_at_each_refresh(precision):
    made = passes(precision=precision)
    before = made.attacked("eval")(X).detach()
    with torch.no_grad():
        for p in made.network.parameters():
            p.mul_(1.2)
    made.refresh()
    after = made.attacked("eval")(X)
    expected = made.network.eval()(X)
    assert not torch.allclose(before, after, rtol=0.1, atol=0)
    assert torch.allclose(after, expected, rtol=0.05, atol=0.05)


def test_an_attack_in_train_mode_moves_the_statistics():
    made = passes()
    before = made.network.feature_extractor.bn1.running_mean.clone()
    made.attacked("train")(X)
    assert not torch.equal(made.network.feature_extractor.bn1.running_mean, before)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_passes_compute_the_same():
    alone(compare_compiled)


def compare_compiled():
    plain, compiled = passes(), passes(compile=True)
    assert torch.allclose(compiled.training(X), plain.training(X), rtol=1e-4, atol=1e-5)
    assert cosine(gradients(compiled), gradients(plain)) > 0.9999
    image = X.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(plain.attacked("eval")(image).square().sum(), image)
    (second,) = torch.autograd.grad(compiled.attacked("eval")(image).square().sum(), image)
    assert torch.allclose(first, second, rtol=1e-3, atol=1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2  # it was really compiled


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_dropout_draws_the_same_masks():
    alone(compare_compiled_dropout)


def compare_compiled_dropout():
    plain, compiled = passes(0.5), passes(0.5, compile=True)
    found = []
    for made in (plain, compiled):
        torch.manual_seed(1)
        found.append(made.training(X).detach())
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], plain.training(X), rtol=1e-4, atol=1e-5)  # others, with other numbers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "wrn_28_10", "small_cnn"])
def test_overwritten_activations_leave_every_bit_of_an_update(name, dtype, training):
    found, x = [], torch.rand((5, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    options = {"batch_norm": True} if name == "small_cnn" else {}
    for overwrites in (False, True):
        network = build_model(name, num_classes=7, in_channels=3, image_size=(32, 32), width=2, seed=1, **options)
        flat = FlatWeights(network.train(training))
        run = overwriting(network) if overwrites else network
        assert not overwrites or "inplace = True" in run.code
        for seed in range(2):
            torch.manual_seed(seed)  # of the dropout
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = run(x)
            logits.float().logsumexp(1).sum().backward()
            with torch.no_grad():
                flat.weights[: len(flat.parameter)] -= 0.01 * flat.parameter.grad
        found.append((logits.detach(), flat.weights.clone(), flat.parameter.grad.clone()))
    assert found[0][2].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*found))
