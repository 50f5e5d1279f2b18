"""AWP (methods C8) against a plain loop with a proxy copy of the network, tensor by tensor."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_learners import BATCH, unit_config
from torch import nn

from genray.core import rng
from genray.core.flat import FlatWeights
from genray.data.datasets import load_image_data
from genray.data.loader import BatchLoader
from genray.learners.base_learner import BaseLearner
from genray.learners.weight_perturbation import WeightPerturbation
from genray.parallel.gradient_sum import GradientSum
from genray.parallel.process_group import ALONE
from genray.run.plan import make_plan

NUM_TRAIN, PER_EPOCH = 80, 3
# In l2, because signs would turn the last bit of a gradient into a whole step.
ATTACK = {"norm": "l2", "epsilon": 0.5, "step_size": 0.2, "num_steps": 3}
ADVERSARIAL, TRADES = {"name": "adversarial"}, {"name": "trades", "beta": 2.0}
NO_DECAY = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0}
DECAY = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.05}


@pytest.fixture(scope="module")
def train():
    return load_image_data("digits").train.first(NUM_TRAIN)


def make_network(dropout=0.0):
    """Small, with BatchNorm, and smooth: ties of max-pooling and kinks of ReLU would turn a last bit into a leap."""
    torch.manual_seed(1)
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2)
    features = nn.Sequential(first, nn.BatchNorm2d(4), nn.Tanh(), second, nn.BatchNorm2d(6), nn.Tanh())
    return nn.Sequential(features, nn.Flatten(), nn.Dropout(dropout), nn.Linear(54, 10))


def make_learner(train, awp, objective=ADVERSARIAL, optimizer=NO_DECAY, dropout=0.0, compute=None, lr=0.05, **attack):
    natural = objective["name"] == "natural"
    learner = {"objective": objective, "lr": lr, "optimizer": optimizer, "awp": awp}
    learner = learner if natural else {**learner, "attack": {**ATTACK, **attack}}
    judged = {"attack": {key: ATTACK[key] for key in ("norm", "epsilon", "step_size")}}
    config = unit_config({"linf": learner}, evaluation=judged, compute=compute or {})
    return BaseLearner("linf", make_plan(config, len(train)), make_network(dropout), train)


# --- a slow AWP --------------------------------------------------------------------------------------------------


def loss_of(network, x, x_adv, y, objective):
    if objective["name"] == "adversarial":
        return F.cross_entropy(network(x_adv), y)
    logits, logits_adv = network(x), network(x_adv)
    p = F.softmax(logits, dim=1)
    kl = (p * (F.log_softmax(logits, dim=1) - F.log_softmax(logits_adv, dim=1))).sum() / len(y)
    return F.cross_entropy(logits, y) + objective["beta"] * kl


def pgd(network, x, y, step, objective):
    """L2 PGD-3 from the learner's start, on CE, or on KL for TRADES; network in eval mode."""
    network.eval()
    stream = rng.generator("cpu", 11, "linf", "attack", step)
    start = torch.randn(x.shape, generator=stream)
    start *= 0.5 * torch.rand((len(x), 1, 1, 1), generator=stream) / _lengths(start)
    point, clean = (x + start).clamp(0, 1), network(x).detach()
    for _ in range(3):
        point = point.detach().requires_grad_()
        logits = network(point)
        if objective["name"] == "trades":
            loss = F.kl_div(F.log_softmax(logits, 1), F.softmax(clean, 1), reduction="sum")
        else:
            loss = F.cross_entropy(logits, y, reduction="sum")
        gradient = torch.autograd.grad(loss, point)[0]
        delta = point.detach() + 0.2 * gradient / _lengths(gradient) - x
        point = (x + delta * (0.5 / _lengths(delta)).clamp(max=1)).clamp(0, 1)
    network.train()
    return point.detach()


def _lengths(images):
    return images.flatten(1).norm(dim=1)[:, None, None, None]


def seeded(purpose, step):
    """The learner's dropout masks."""
    torch.manual_seed(rng.key_seed(11, "linf", purpose, step))


def slow_awp(train, steps, *, gamma, objective, optimizer, warmup=0, subtract=False):
    """The network after `steps`. `subtract`: the authors' order, v is subtracted after the step was taken at w + v."""

    def run(dropout):
        network = make_network(dropout).train()
        decay = optimizer["weight_decay"]
        sgd = torch.optim.SGD(network.parameters(), lr=0.05, momentum=optimizer["momentum"], weight_decay=decay)
        keys = {"seed": 11, "order_key": "shared", "augmentation_key": "shared"}
        loader = BatchLoader(train, batch_size=BATCH, augmentation=None, device="cpu", **keys)
        moved = {}
        for step in range(steps):
            x, y = loader.batch(step)
            x_adv = pgd(network, x, y, step, objective)
            v = {}
            if step >= warmup * PER_EPOCH:
                proxy = copy.deepcopy(network).train()
                proxy_sgd = torch.optim.SGD(proxy.parameters(), lr=0.01)
                proxy_sgd.zero_grad()
                seeded("perturbation", step)
                (-loss_of(proxy, x, x_adv, y, objective)).backward()
                proxy_sgd.step()
                for key, w in network.state_dict().items():
                    if w.dim() <= 1 or "weight" not in key:
                        continue
                    difference = proxy.state_dict()[key] - w
                    v[key] = gamma * w.norm() / (difference.norm() + 1e-20) * difference
                    moved[key] = float(v[key].norm() / w.norm())
            before = {key: p.detach().clone() for key, p in network.named_parameters()}
            with torch.no_grad():
                for key, p in network.named_parameters():
                    p += v.get(key, 0)
            seeded("dropout", step)
            sgd.zero_grad()
            loss_of(network, x, x_adv, y, objective).backward()
            with torch.no_grad():
                if not subtract:
                    for key, p in network.named_parameters():
                        p.copy_(before[key])
                sgd.step()
                if subtract:
                    for key, p in network.named_parameters():
                        p -= v.get(key, 0)
        return network, moved

    return run


def flat_state(network):
    floating = [b for b in network.buffers() if b.is_floating_point()]
    return torch.cat([t.detach().reshape(-1) for t in [*network.parameters(), *floating]])


@pytest.mark.parametrize(
    "optimizer, subtract, dropout", [(NO_DECAY, True, 0), (NO_DECAY, False, 0.5), (DECAY, False, 0)]
)
@pytest.mark.parametrize("objective", [ADVERSARIAL, TRADES], ids=["adversarial", "trades"])
def test_steps_equal_a_plain_loop(train, objective, optimizer, subtract, dropout):
    """Perturb, gradient, restore, step; BatchNorm's statistics of the proxy are not in the result.

    Without weight decay the authors' order (step at w + v, then subtract v) is the same update."""
    learner = make_learner(train, {"gamma": 0.05}, objective, optimizer, dropout)
    learner.run_window(0, 5)
    settings = {"gamma": 0.05, "objective": objective, "optimizer": optimizer}
    network, moved = slow_awp(train, 5, subtract=subtract, **settings)(dropout)
    expected = flat_state(network)
    plain, _ = slow_awp(train, 5, **{**settings, "gamma": 0.0})(dropout)
    difference = (learner.flat.weights - expected).abs().max()
    assert difference < (5e-6 if objective is ADVERSARIAL else 1e-4)  # KL attacks pass on rounding where KL is flat
    assert (flat_state(plain) - expected).abs().max() > 100 * difference  # the perturbation shows
    passes = 2 if objective is TRADES else 1  # of the network itself: the proxy's are not counted
    assert learner.flat.counters.tolist() == [b for b in network.buffers() if b.dim() == 0] == [5 * passes] * 2
    assert len(moved) == 3 and all(ratio == pytest.approx(0.05, rel=1e-4) for ratio in moved.values())


def test_the_authors_order_differs_by_the_decay_of_v_alone(train):
    """One step without momentum: lr * decay * v, with |v| = gamma |w|."""
    optimizer = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.05}
    learner = make_learner(train, {"gamma": 0.05}, optimizer=optimizer)
    before = {key: p.detach().clone() for key, p in learner.network.named_parameters()}
    learner.run_window(0, 1)
    settings = {"gamma": 0.05, "objective": ADVERSARIAL, "optimizer": optimizer}
    authors, _ = slow_awp(train, 1, subtract=True, **settings)(0.0)
    for (key, ours), theirs in zip(learner.network.named_parameters(), authors.parameters(), strict=True):
        size = float((ours - theirs).detach().norm())
        bound = 0.05 * 0.05 * 0.05 * float(before[key].norm()) if ours.dim() > 1 else 0.0
        assert size == pytest.approx(bound, abs=2e-5 * float(before[key].norm()) * 0.05 + 1e-6)


@pytest.mark.parametrize("warmup", [1, 2])
def test_warm_up(train, warmup):
    """Epochs without it, then with it from their first step on."""
    learner = make_learner(train, {"gamma": 0.05, "warmup_epochs": warmup})
    plain = make_learner(train, None)
    first = warmup * PER_EPOCH
    for each in (learner, plain):
        each.run_window(0, first)
    assert torch.equal(learner.flat.weights, plain.flat.weights)
    for each in (learner, plain):
        each.run_window(first, first + 1)
    network, _ = slow_awp(train, first + 1, gamma=0.05, objective=ADVERSARIAL, optimizer=NO_DECAY, warmup=warmup)(0.0)
    assert (learner.flat.weights - flat_state(network)).abs().max() < 5e-6
    assert (learner.flat.weights - plain.flat.weights).abs().max() > 1e-3


# --- one perturbation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tensors_sizes_and_restoration(memory_format):
    network = make_network().to(memory_format=memory_format).train()
    flat = FlatWeights(network)
    perturbation = WeightPerturbation(flat, 0.02)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = flat.weights.clone()
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8)
    gradient = GradientSum(flat, ALONE)
    with perturbation.applied(lambda: gradient.backward(F.cross_entropy(network(x), y))):
        gradients = {key: p.grad.clone() for key, p in network.named_parameters()}
        for key, value in network.state_dict().items():
            moved = value - before[key]
            if key.endswith("weight") and value.dim() > 1:
                assert moved.norm() == pytest.approx(0.02 * before[key].norm().item(), rel=1e-4)
                assert F.cosine_similarity(moved.flatten(), gradients[key].flatten(), dim=0) > 0.9999  # uphill
            else:  # biases, BatchNorm's weights and statistics
                assert not moved.any(), key
        flat.zero_grad()
        F.cross_entropy(network(x), y).backward()
        inside, statistics = flat.parameter.grad.clone(), flat.weights[flat.parameter.numel() :].clone()
    assert torch.equal(flat.weights[: flat.parameter.numel()], weights[: flat.parameter.numel()])
    assert torch.equal(flat.parameter.grad, inside) and inside.any()
    assert torch.equal(flat.weights[flat.parameter.numel() :], statistics)  # of the pass inside: one pass
    assert flat.counters.tolist() == [1] * 2


def test_without_a_gradient_nothing_moves():
    """The 1e-20 of the denominator: no NaN."""
    network = make_network()
    flat = FlatWeights(network)
    weights = flat.weights.clone()
    gradient = GradientSum(flat, ALONE)

    def zero():
        gradient.backward(0.0 * sum(p.sum() for p in network.parameters()))

    with WeightPerturbation(flat, 0.5).applied(zero):
        assert torch.equal(flat.weights, weights)


# --- in a learner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_learning_rate_zero_only_the_statistics_move(train, precision):
    """The weights come back bit by bit, in every precision; the statistics are those of the passes that count."""
    learner = make_learner(train, {"gamma": 0.1}, TRADES, lr=0.0, compute={"precision": precision})
    plain = make_learner(train, None, TRADES, lr=0.0, compute={"precision": precision})
    trained, weights = learner.flat.parameter.numel(), learner.flat.weights.clone()
    for each in (learner, plain):
        each.run_window(0, 4)
    assert torch.equal(learner.flat.weights[:trained], weights[:trained])
    assert learner.flat.weights.dtype == torch.float32
    assert torch.equal(learner.flat.counters, plain.flat.counters)
    moved = (learner.flat.weights - weights)[trained:].abs().max()
    apart = (learner.flat.weights - plain.flat.weights)[trained:].abs().max()
    assert 0 < apart < moved  # the perturbed weights have statistics of their own


def test_an_attack_in_train_mode_keeps_its_statistics(train):
    """Its K passes move BatchNorm's statistics with AWP as without; the proxy's pass still does not."""
    learner = make_learner(train, {"gamma": 0.0}, mode="train")
    plain = make_learner(train, None, mode="train")
    for each in (learner, plain):
        each.run_window(0, 3)
    assert learner.flat.counters.tolist() == [3 * (3 + 1)] * 2
    assert torch.equal(learner.flat.weights, plain.flat.weights)


def test_several_attacks_of_one_step(train):
    """AVG crafts for every norm before its first pass; with AWP too."""
    attacks = {"linf": {**ATTACK, "norm": "linf"}, "l2": ATTACK}
    ends = []
    for awp in (None, {"gamma": 0.0}, {"gamma": 0.1}):
        config = unit_config({"linf": {"objective": "avg", "attacks": attacks, "lr": 0.05, "awp": awp}})
        learner = BaseLearner("linf", make_plan(config, len(train)), make_network(), train)
        learner.run_window(0, 3)
        ends.append(learner.flat.weights.clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("objective", "precision"),
    [(TRADES, "fp32"), ({"name": "iat"}, "fp32"), ({"name": "natural", "mixup": 1.0}, "fp32"), (ADVERSARIAL, "bf16")],
    ids=["trades", "iat", "mixup", "bf16"],
)
def test_a_window_run_again_gives_the_same_bits(train, objective, precision):
    """From a stored state, in the same learner and in a fresh one; and nothing global is touched."""
    made = {"objective": objective, "dropout": 0.5, "compute": {"precision": precision}}
    learner = make_learner(train, {"gamma": 0.05}, **made)
    learner.run_window(0, 2)
    state = learner.state_dict()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    learner.run_window(2, 5)
    assert torch.equal(torch.get_rng_state(), before)
    after = learner.state_dict()
    for other in (learner, make_learner(train, {"gamma": 0.05}, **made)):
        other.load_state_dict(state)
        other.run_window(2, 5)
        again = other.state_dict()
        for key in ("weights", "counters", "average", "share"):
            assert np.array_equal(again[key], after[key]), key
        assert np.array_equal(again["optimizer"]["momentum_buffer"], after["optimizer"]["momentum_buffer"])
    assert np.isfinite(after["weights"]).all()


def test_both_passes_see_the_same_mixture_with_their_own_dropout(train):
    """The perturbation is against the loss that is then minimised: the same share and partners, twice."""
    learner = make_learner(train, {"gamma": 0.05}, {"name": "natural", "mixup": 1.0}, dropout=0.5)
    inputs, masks = [], []
    learner.network[0][0].register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    learner.network[2].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    learner.run_window(0, 2)
    assert len(inputs) == 4
    assert torch.equal(inputs[0], inputs[1]) and torch.equal(inputs[2], inputs[3])
    assert not torch.equal(inputs[0], inputs[2])
    assert not torch.equal(masks[0], masks[1])
