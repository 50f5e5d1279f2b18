"""A base learner against a plain per-parameter training loop written here, and its replay, bit for bit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_learners import BATCH, small_network, through_a_file, unit_config
from torch import nn

from genray.config import load_config, to_dict
from genray.core import rng
from genray.core.flat import FlatWeights
from genray.data.datasets import load_image_data
from genray.data.loader import BatchLoader
from genray.errors import NonFiniteError
from genray.learners.base_learner import BaseLearner
from genray.models import build_model
from genray.run.plan import make_plan
from genray.types import WeightSnapshot

NUM_TRAIN, STEPS = 80, 9
OPTIMIZERS = {
    "plain sgd": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0},
    "momentum": {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-3},
    "nesterov": {"name": "sgd", "momentum": 0.8, "nesterov": True, "weight_decay": 1e-3},
    "adam": {"name": "adam", "beta1": 0.8, "beta2": 0.95, "weight_decay": 1e-2},
    "adamw": {"name": "adamw", "beta1": 0.7, "weight_decay": 0.1},
    "selective": {"name": "sgd", "weight_decay": 0.1, "decay_norms_and_biases": False, "nesterov": True},
    "adam, selective": {"name": "adam", "weight_decay": 0.1, "decay_norms_and_biases": False},
    "adamw, selective": {"name": "adamw", "beta1": 0.7, "weight_decay": 0.1, "decay_norms_and_biases": False},
    "clipped": {"name": "sgd", "clip_norm": 0.2},
}
ATTACK = {"norm": "linf", "epsilon": 0.1, "step_size": 0.04, "num_steps": 3}


@pytest.fixture(scope="module")
def train():
    return load_image_data("digits").train.first(NUM_TRAIN)


def make_config(optimizer="momentum", global_learner=None, **learner):
    lr = [[0, 0.003], [1, 0.001]] if optimizer.startswith("adam") else [[0, 0.05], [1, 0.01]]
    common = {"optimizer": OPTIMIZERS[optimizer], "lr": lr, "averaging": {"decay": 0.3}, **learner}
    natural, linf = {"objective": "natural"}, {"objective": "adversarial", "attack": ATTACK}
    mixing = {"gamma": [[0, 0.9], [1, 0.3]], "decay": 0.25, **(global_learner or {})}
    return unit_config({"natural": {**natural, **common}, "linf": {**linf, **common}}, global_learner=mixing)


def make_learner(name, train, config=None, dropout=0.0, threads=1):
    plan = make_plan(config or make_config(), len(train))
    return BaseLearner(name, plan, small_network(dropout), train, threads=threads)


def flat_state(network):
    """All parameters in order, then all floating-point buffers; and the integer buffers."""
    floating = [b for b in network.buffers() if b.is_floating_point()]
    integer = [b for b in network.buffers() if not b.is_floating_point()]
    parts = [t.detach().reshape(-1).double() for t in [*network.parameters(), *floating]]
    return torch.cat(parts).numpy(), torch.stack(integer).tolist()


# --- against a reference loop --------------------------------------------------------------------------------------


def make_optimizer(options, parameters):
    options, groups = dict(options), [{"params": parameters}]
    kind = options.pop("name")
    options.pop("clip_norm", None)
    if not options.pop("decay_norms_and_biases", True):
        groups = [{"params": [p for p in parameters if p.dim() > 1]}]
        groups += [{"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0}]
    if kind == "sgd":
        options = {"momentum": 0.9, "weight_decay": 5e-4, **options}
        return torch.optim.SGD(groups, lr=1.0, **options)
    betas = options.pop("beta1", 0.9), options.pop("beta2", 0.999)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](groups, lr=1.0, betas=betas, **options)


def pgd(network, x, y, start):
    """Linf PGD-3 on the cross-entropy, network in eval mode."""
    network.eval()
    adversarial = (x + start).clamp(0, 1)
    for _ in range(3):
        adversarial = adversarial.detach().requires_grad_()
        loss = F.cross_entropy(network(adversarial), y, reduction="sum")
        gradient = torch.autograd.grad(loss, adversarial)[0]
        adversarial = adversarial.detach() + 0.04 * gradient.sign()
        adversarial = (x + (adversarial - x).clamp(-0.1, 0.1)).clamp(0, 1)
    network.train()
    return adversarial


def reference(name, train, steps, *, optimizer="momentum", robust_start="uniform", mix="averaged"):
    """The algorithm of methods A1 for one learner: (network, average, share, losses), averages in float64."""
    network = small_network().train()
    rates = (0.003, 0.001) if optimizer.startswith("adam") else (0.05, 0.01)
    clip_norm = OPTIMIZERS[optimizer].get("clip_norm", math.inf)
    optimizer = make_optimizer(OPTIMIZERS[optimizer], list(network.parameters()))
    loader = BatchLoader(
        train, batch_size=BATCH, seed=11, order_key="shared", augmentation_key="shared", augmentation=None, device="cpu"
    )
    average = flat_state(network)[0]
    share, losses = average / 2, []
    for step in range(steps):
        position = step / STEPS
        for group in optimizer.param_groups:
            group["lr"] = rates[0] + position * (rates[1] - rates[0])
        x, y = loader.batch(step)
        if name == "linf":
            start = torch.zeros_like(x)
            if robust_start == "uniform":
                generator = rng.generator("cpu", 11, "linf", "attack", step)
                start = torch.rand(x.shape, generator=generator) * 0.2 - 0.1
            x = pgd(network, x, y, start)
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        length = math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters()))
        for p in network.parameters():
            p.grad *= min(1, clip_norm / length)
        optimizer.step()
        losses.append((loss.item(), int((logits.argmax(1) == y).sum()), len(y)))
        raw, warm = flat_state(network)[0], (1 + step) / (10 + step)
        d, d_global = min(0.3, warm), min(0.25, warm)
        average = d * average + (1 - d) * raw
        gamma = 0.9 - 0.6 * position
        weight = gamma if name == "linf" else 1 - gamma
        mixed = average if mix == "averaged" else raw
        share = d_global * share + (1 - d_global) * weight * mixed
    return network, average, share, losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["natural", "linf"])
def test_steps_equal_a_plain_loop(train, name, optimizer):
    config = make_config(optimizer)
    learner = make_learner(name, train, config)
    stats = [learner.run_window(0, 4), learner.run_window(4, 7)]
    network, average, share, losses = reference(name, train, 7, optimizer=optimizer)
    raw, counters = flat_state(network)
    assert np.abs(raw - flat_state(small_network())[0]).max() > 1e-3  # it did learn
    assert np.abs(learner.flat.weights.numpy() - raw).max() < 1e-6
    assert np.abs(learner.average.numpy() - average).max() < 1e-6
    assert np.abs(learner.share.numpy() - share).max() < 1e-6
    assert learner.flat.counters.tolist() == counters == [7] * 4
    for window in stats:
        expected = losses[window.start : window.stop]
        assert window.loss_sum == pytest.approx(sum(loss * size for loss, _, size in expected), rel=1e-5)
        assert window.num_correct == sum(correct for _, correct, _ in expected)
        assert window.num_examples == sum(size for *_, size in expected)
    assert stats[1].num_examples == 32 + 16 + 32
    first, last = (0.003, 0.001) if optimizer.startswith("adam") else (0.05, 0.01)
    assert stats[1].learning_rate == pytest.approx(first + 6 / 9 * (last - first))
    assert np.abs(learner.contribution().weights - share).max() < 1e-6
    assert np.abs(learner.model_snapshot().weights - average).max() < 1e-6
    assert learner.contribution().step == learner.model_snapshot().step == 7


def test_zero_start_equals_a_plain_loop(train):
    config = load_config(_with(make_config(), "linf", "attack", {**ATTACK, "start": "zero"}))
    learner = make_learner("linf", train, config)
    learner.run_window(0, 3)
    raw = flat_state(reference("linf", train, 3, robust_start="zero")[0])[0]
    assert np.abs(learner.flat.weights.numpy() - raw).max() < 1e-6


def _with(config, name, field, value):
    data = to_dict(config)
    data["base_learners"][name][field] = value
    return data


def test_raw_mixing(train):
    config = make_config(global_learner={"mix": "raw"})
    learner = make_learner("linf", train, config)
    learner.run_window(0, 4)
    _, average, share, _ = reference("linf", train, 4, mix="raw")
    assert np.abs(learner.share.numpy() - share).max() < 1e-6
    assert np.abs(learner.model_snapshot().weights - average).max() < 1e-6


def test_without_averaging_the_raw_weights_are_mixed_and_shown(train):
    config = make_config(averaging={"enabled": False})
    learner = make_learner("natural", train, config)
    learner.run_window(0, 4)
    network, _, share, _ = reference("natural", train, 4, mix="raw")
    assert np.abs(learner.share.numpy() - share).max() < 1e-6
    assert np.abs(learner.model_snapshot().weights - flat_state(network)[0]).max() < 1e-6


def test_initial_shares_sum_to_the_common_start(train):
    learners = [make_learner(name, train) for name in ("natural", "linf")]
    start = flat_state(small_network())[0]
    assert np.abs(sum(lr.contribution().weights.astype(np.float64) for lr in learners) - start).max() < 1e-7


# --- replay --------------------------------------------------------------------------------------------------------


def same_state(a, b):
    assert set(a) == set(b) and set(a["optimizer"]) == set(b["optimizer"]) and a["step"] == b["step"]
    for key in ("weights", "counters", "average", "share"):
        assert np.array_equal(a[key], b[key]), key
    for key, value in a["optimizer"].items():
        assert np.array_equal(value, b["optimizer"][key]), key
    return True


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_window_run_again_gives_the_same_bits(train, dropout):
    learner = make_learner("linf", train, dropout=dropout)
    learner.run_window(0, 2)
    state = learner.state_dict()
    first = learner.run_window(2, 5)
    after = learner.state_dict()
    assert not np.array_equal(state["weights"], after["weights"]) and state["step"] == 2  # a private copy
    learner.load_state_dict(state)
    torch.manual_seed(12345)
    torch.rand(100)
    second = learner.run_window(2, 5)
    assert same_state(after, learner.state_dict())
    assert (first.loss_sum, first.num_correct) == (second.loss_sum, second.num_correct)


@pytest.mark.parametrize(("optimizer", "dropout"), list(zip(OPTIMIZERS, (0.0, 0.5, 0.0, 0.5, 0.5))))
def test_resumed_equals_uninterrupted(train, optimizer, dropout):
    config = make_config(optimizer)
    whole = make_learner("linf", train, config, dropout)
    whole.run_window(0, 6)
    broken = make_learner("linf", train, config, dropout)
    broken.run_window(0, 4)
    stored = through_a_file(broken.state_dict())
    broken.run_window(4, 5)  # must not reach what was stored
    resumed = make_learner("linf", train, config, dropout)
    resumed.load_state_dict(stored)
    resumed.run_window(4, 6)
    assert same_state(whole.state_dict(), resumed.state_dict())


def test_windows_may_be_cut_anywhere(train):
    cut, whole = (make_learner("linf", train, dropout=0.5) for _ in range(2))
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        cut.run_window(start, stop)
    whole.run_window(0, 5)
    assert same_state(cut.state_dict(), whole.state_dict())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_global_random_state_is_untouched(train, dropout):
    learner = make_learner("linf", train, dropout=dropout)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    learner.run_window(0, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_drawn_anew_each_step_and_for_each_learner(train):
    masks = {}
    for name in ("natural", "linf"):
        learner = make_learner(name, train, dropout=0.5)
        seen = masks[name] = []

        def record(module, inputs, output, seen=seen):
            if module.training:
                seen.append(output == 0)

        def all_ones(module, inputs):
            return (torch.ones_like(inputs[0]),) if module.training else None

        learner.network.classifier.drop.register_forward_pre_hook(all_ones)
        learner.network.classifier.drop.register_forward_hook(record)
        learner.run_window(0, 2)
    (first, second), others = masks["linf"], masks["natural"]
    assert 0.45 < first.float().mean() < 0.55 and len(others) == 2
    assert not torch.equal(first, second) and not torch.equal(first, others[0])


def test_learners_share_minibatches_unless_they_have_their_own_order(train):
    config = make_config()
    natural, linf = (make_learner(name, train, config) for name in ("natural", "linf"))
    assert torch.equal(natural.loader.batch(1)[0], linf.loader.batch(1)[0])
    own = make_learner("linf", train, load_config(_with(config, "linf", "data_order", "own")))
    assert not torch.equal(natural.loader.batch(1)[0], own.loader.batch(1)[0])


def test_wrong_window_is_refused(train):
    learner = make_learner("linf", train)
    with pytest.raises(ValueError, match="linf: expected a window from step 0, got one from 2"):
        learner.run_window(2, 3)


def test_on_step_is_called_after_every_step(train):
    learner, steps = make_learner("natural", train), []
    learner.on_step = lambda: steps.append(learner.step)
    learner.run_window(0, 4)
    assert steps == [1, 2, 3, 4]


# --- redistribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_load_global_replaces_weights_and_buffers_only(train, optimizer):
    learner = make_learner("linf", train, make_config(optimizer))
    learner.run_window(0, 3)
    before = learner.state_dict()
    values = np.random.default_rng(0).random(learner.flat.weights.numel()).astype(np.float32)
    theta_g = WeightSnapshot(3, values, np.array([9, 8, 7, 6]))
    theta_g.weights.setflags(write=False)
    learner.load_global(theta_g)
    after = learner.state_dict()
    assert np.array_equal(after["weights"], values) and after["counters"].tolist() == [9, 8, 7, 6]
    assert np.array_equal(flat_state(learner.network)[0], values.astype(np.float64))  # the network itself
    after |= {"weights": before["weights"], "counters": before["counters"]}
    assert same_state(before, after) and len(before["optimizer"]) >= 1
    with pytest.raises(ValueError, match="expected theta_g of step 3, got step 2"):
        learner.load_global(WeightSnapshot(2, values, np.zeros(4, np.int64)))
    with pytest.raises(ValueError, match=f"expected {len(values)} weights and 4 counters, got 3 and 4"):
        learner.load_global(WeightSnapshot(3, values[:3], np.zeros(4, np.int64)))


def test_training_goes_on_from_theta_g(train):
    """After a redistribution the next step is taken at theta_g with the old momentum."""
    learner = make_learner("natural", train)
    learner.run_window(0, 2)
    momentum = learner.state_dict()["optimizer"]["momentum_buffer"]
    theta = WeightSnapshot(2, (learner.flat.weights * 0.9).numpy(), learner.flat.counters.numpy().copy())
    learner.load_global(theta)
    network = small_network().train()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(theta.weights[: len(momentum)].copy()), network.parameters())
    x, y = learner.loader.batch(2)
    F.cross_entropy(network(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()]).numpy()
    weights = theta.weights[: len(momentum)]
    rate = 0.05 - 0.04 * 2 / STEPS
    expected = weights - rate * (0.9 * momentum + gradient + 5e-3 * weights)
    learner.run_window(2, 3)
    assert np.abs(learner.flat.weights.numpy()[: len(momentum)] - expected).max() < 1e-6


# --- failure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e30, [[0, 0.01], [0.2, 0.01], [0.2, 1e38], [1, 1e38]]])
def test_non_finite_weights_name_the_learner(train, lr):
    learner = make_learner("linf", train, make_config(lr=lr))
    with pytest.raises(NonFiniteError, match=r"base_learners\.linf: (loss \S+|weights NaN or infinite) at step [1-3] "):
        learner.run_window(0, 4)


def test_a_nan_loss_names_the_learner(train):
    learner = make_learner("natural", train)
    learner.run_window(0, 1)
    learner.network.classifier.fc3.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(NonFiniteError, match=r"base_learners\.natural.*loss nan at step 1 \(batch 1 of epoch 1\)"):
        learner.run_window(1, 2)


# --- flat weights --------------------------------------------------------------------------------------------------


def test_flat_weights_are_views_of_the_network():
    network = small_network()
    expected, x = flat_state(network)[0], torch.rand(4, 1, 8, 8)
    logits = network.eval()(x)
    flat = FlatWeights(network)
    assert np.array_equal(flat.weights.double().numpy(), expected)
    assert torch.equal(network(x), logits)
    assert flat.parameter.numel() == sum(p.numel() for p in network.parameters())
    assert flat.weights.numel() == flat.parameter.numel() + 2 * (4 + 4 + 8 + 8)  # running means and variances
    flat.weights.fill_(0.5)
    flat.counters.fill_(3)
    assert all((p == 0.5).all() for p in network.parameters())
    assert all((b == (0.5 if b.is_floating_point() else 3)).all() for b in network.buffers())


def test_gradients_are_views_too():
    network = small_network().train()
    flat, twin = FlatWeights(network), small_network().train()
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    for module in (network, twin):
        for _ in range(2):  # gradients accumulate in place
            F.cross_entropy(module(x), y).backward()
    expected = torch.cat([p.grad.flatten() for p in twin.parameters()])
    assert expected.abs().max() > 0.01
    assert torch.allclose(flat.parameter.grad, expected, rtol=1e-5, atol=1e-7)
    flat.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_channels_last_keeps_strides_and_values():
    network = small_network().to(memory_format=torch.channels_last)
    twin = small_network()
    convolutions = [p for p in network.parameters() if p.dim() == 4]
    assert not all(p.is_contiguous() for p in convolutions)
    flat = FlatWeights(network)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    assert all(p.grad.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    for (key, value), expected in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    for module in (network.train(), twin.train()):
        F.cross_entropy(module(x), y).backward()
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.SGD([flat.parameter], lr=0.1)
    optimizer.step()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_snapshot_is_a_private_copy():
    flat = FlatWeights(small_network())
    snapshot = flat.snapshot(4)
    values = snapshot.weights.copy()
    flat.weights.zero_()
    flat.counters.fill_(9)
    assert snapshot.step == 4 and np.array_equal(snapshot.weights, values) and values.any()
    assert snapshot.counters.tolist() == [0] * 4 and snapshot.counters.dtype == np.int64
    flat.load(snapshot)
    assert np.array_equal(flat.weights.numpy(), values) and flat.counters.tolist() == [0] * 4


def test_normalisation_constants_stay_out():
    network = build_model("small_cnn", num_classes=3, in_channels=1, image_size=(8, 8), width=2, mean=[0.2], std=[0.5])
    flat = FlatWeights(network)
    assert flat.weights.numel() == sum(p.numel() for p in network.parameters())
    flat.weights.zero_()
    assert network.normalize.mean.item() == pytest.approx(0.2) and network.normalize.std.item() == 0.5


def test_network_without_buffers():
    flat = FlatWeights(nn.Linear(3, 2))
    assert flat.weights.numel() == 8 and flat.counters.numel() == 0
    flat.load(flat.snapshot(0))
