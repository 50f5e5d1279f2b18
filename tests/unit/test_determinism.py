"""compute.deterministic: what torch is told, where, and that it is told nothing else afterwards."""

import pytest
import torch

import genray
from genray.config import load_config
from genray.core.determinism import deterministic, float32_precision, full_precision
from genray.learners.base_learner import BaseLearner
from genray.run.setup import prepare

SHORT = ["training.epochs=1", "data.train_examples=60", "data.test_examples=10", "data.validation_examples=10"]


@pytest.fixture(autouse=True)
def settings_put_back():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )


def test_a_run_computes_with_kernels_that_repeat(tmp_path, monkeypatch):
    seen, plain = [], BaseLearner.run_window

    def watched(self, *args):
        seen.append(settings())
        return plain(self, *args)

    monkeypatch.setattr(BaseLearner, "run_window", watched)
    before, weights = settings(), []
    for wanted in ("true", "false"):
        overrides = [*SHORT, f"compute.deterministic={wanted}"]
        genray.train(None, overrides, runtime="local", storage=str(tmp_path), name=f"run-{wanted}")
        weights.append(torch.load(tmp_path / f"run-{wanted}" / "model.pt", weights_only=True)["state_dict"])
    assert set(seen[: len(seen) // 2]) == {(True, True, False, False)}
    assert set(seen[len(seen) // 2 :]) == {before} and settings() == before
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())  # a CPU repeats anyway


def test_actors_do_the_same(monkeypatch):
    from genray.runtime.ray import actors

    monkeypatch.setattr(actors, "actor_device", lambda wanted: "cpu")
    setup = prepare(load_config(None, [*SHORT, "compute.deterministic=true"]))
    actors.EvaluatorActor(*actors.pack(setup), 1)
    assert settings() == (True, True, False, False)


def test_settings_come_back_after_an_error():
    torch.use_deterministic_algorithms(True, warn_only=False)
    before = settings()
    with pytest.raises(RuntimeError), deterministic(True):
        raise RuntimeError
    assert settings() == before and before[:2] == (True, False)


BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)


def precisions():
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture
def fast_by_the_caller():
    """A caller who allows everything that is faster; what torch had comes back."""
    before = precisions()
    for backend in BACKENDS:
        backend.fp32_precision = "tf32" if backend in BACKENDS[:2] else "bf16"
    yield ["tf32", "tf32", "bf16", "bf16"]
    for backend, precision in zip(BACKENDS, before):
        backend.fp32_precision = precision


@pytest.mark.parametrize(("precision", "on_a_gpu"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_float32_is_what_the_run_says_whatever_the_caller_has_set(
    tmp_path, monkeypatch, fast_by_the_caller, precision, on_a_gpu
):
    training, evaluating = [], []
    convolve = torch.nn.Conv2d.forward

    def watched(layer, x):  # the test images are evaluated in eval mode without gradients
        (training if layer.training else evaluating).append(precisions())
        return convolve(layer, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    overrides = [*SHORT, f"compute.precision={precision}"]
    genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    assert training and all(found == [on_a_gpu, on_a_gpu, "ieee", "ieee"] for found in training)
    assert evaluating and ["ieee"] * 4 in evaluating
    assert all(found == ["ieee"] * 4 for found in evaluating[-3:])  # the final table
    assert precisions() == fast_by_the_caller
    with pytest.raises(RuntimeError), full_precision():
        assert precisions() == ["ieee"] * 4
        raise RuntimeError
    assert precisions() == fast_by_the_caller


def legacy_switches():
    cublas, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cublas.allow_tf32, cudnn.allow_tf32


@pytest.fixture
def as_torch_begins():
    """torch's own state, before and after."""
    before = {backend: backend.fp32_precision for backend in BACKENDS}
    legacy = legacy_switches()
    yield legacy
    torch.set_float32_matmul_precision(legacy[0])
    torch.backends.cudnn.allow_tf32 = legacy[2]
    for backend, precision in before.items():
        backend.fp32_precision = precision


@pytest.mark.parametrize("caller", ["highest", "high"])
@pytest.mark.parametrize(("kind", "inside"), [("fp32", ("highest", False, False)), ("tf32", ("high", True, True))])
def test_the_older_switches_say_the_same(as_torch_begins, caller, kind, inside):
    """torch refuses to read them where they contradict the newer ones, and its compiler reads them."""
    torch.set_float32_matmul_precision(caller)
    before = legacy_switches(), precisions()
    with float32_precision(kind):
        assert legacy_switches() == inside
        with torch.backends.cudnn.flags(enabled=True):
            assert precisions()[0] == ("tf32" if kind == "tf32" else "ieee")
    assert (legacy_switches(), precisions()) == before


def test_a_precision_of_everything_is_not_inherited(as_torch_begins):
    backends = torch.backends
    before = backends.fp32_precision
    try:
        backends.fp32_precision = "tf32"
        with float32_precision("fp32"):
            assert precisions() == ["ieee"] * 4
    finally:
        backends.fp32_precision = before
