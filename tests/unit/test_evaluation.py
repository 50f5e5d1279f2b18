"""Accuracies: intervals against scipy, flags against closed forms and against every way of cutting the data."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from genray.attacks import GradientAttack
from genray.config import load_config
from genray.config.schema import EvaluationAttackConfig
from genray.core.determinism import full_precision
from genray.core.flat import FlatWeights
from genray.data.splits import Split
from genray.evaluation import Evaluator, accuracy, attacked_flags, chunks, correct_flags, join_flags, wilson_interval
from genray.evaluation.evaluator import reestimate_batch_norm
from genray.evaluation.robust import evaluate_chunk
from genray.models import build_model
from genray.types import WeightSnapshot

N = 60


# --- intervals -----------------------------------------------------------------------------------------------------


def scipy_wilson(k, n):
    interval = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 20_000), st.floats(0, 1))
def test_wilson_equals_scipy(n, share):
    k = round(share * n)
    assert wilson_interval(k, n) == pytest.approx(scipy_wilson(k, n), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 10, 10_000])
def test_wilson_at_the_ends(n):
    for k in (0, n):
        low, high = wilson_interval(k, n)
        assert (low, high) == pytest.approx(scipy_wilson(k, n), abs=1e-9)
        assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
        assert high - low > 0


def test_accuracy_record():
    flags = np.array([True] * 37 + [False] * 13)
    low, high = scipy_wilson(37, 50)
    assert accuracy(flags) == {"value": 0.74, "low": pytest.approx(low), "high": pytest.approx(high), "examples": 50}
    assert accuracy(torch.from_numpy(flags)) == accuracy(flags)


# --- flags ---------------------------------------------------------------------------------------------------------


def small_network(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 64, 10),
    )
    network[1].running_mean.uniform_(-0.2, 0.2)
    return network


def labelled(network, size=N, seed=0):
    """A split on which the network is right about four times in five."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (size, 1, 8, 8), dtype=np.uint8))
    modes = [m.training for m in network.modules()]
    with torch.no_grad():
        labels = network.eval()(images / 255).argmax(1)
    for module, mode in zip(network.modules(), modes, strict=True):
        module.training = mode
    wrong = torch.from_numpy(rng.random(size) < 0.2)
    return Split(images, torch.where(wrong, (labels + 1) % 10, labels)), wrong


def attack_config(epsilon, norm="linf", num_steps=3, step_size=None):
    epsilon = Fraction(epsilon)
    return EvaluationAttackConfig(norm=norm, epsilon=epsilon, step_size=step_size or epsilon / 2, num_steps=num_steps)


def flags_of(network, split, attack, size=N, seed=0):
    parts = [
        evaluate_chunk(network, split, *chunk, attack_config=attack, seed=seed, device="cpu")
        for chunk in chunks(len(split), size)
    ]
    return {k: np.asarray(v) for k, v in join_flags([{k: v.numpy() for k, v in p.items()} for p in parts]).items()}


@pytest.mark.parametrize(
    "attack",
    [
        attack_config("0.02"),
        attack_config("0.3", "l2"),
        attack_config("1.5", "l1"),
        attack_config("0.3", num_steps=1, step_size=Fraction(1, 10**6)),  # the random start decides alone
    ],
    ids=["linf", "l2", "l1", "start"],
)
def test_flags_do_not_depend_on_chunks(attack):
    network = small_network()
    split, _ = labelled(network)
    whole = flags_of(network, split, attack)
    robust = whole[f"pgd{attack.num_steps}"]
    assert set(whole) == {"natural", f"pgd{attack.num_steps}"}
    assert 0 < robust.sum() < whole["natural"].sum()  # both outcomes occur
    for size in (1, 7, 25):
        again = flags_of(network, split, attack, size)
        assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_natural_flags_and_robust_implies_natural():
    network = small_network()
    split, wrong = labelled(network)
    flags = flags_of(network, split, attack_config("0.02"))
    assert np.array_equal(flags["natural"], ~wrong.numpy()) and 0 < wrong.sum() < N
    assert not (flags["pgd3"] & ~flags["natural"]).any()


def test_an_attack_that_turns_errors_right_does_not_count():
    """Only what is classified correctly is attacked: a clean error stays an error."""
    network = small_network()
    split, _ = labelled(network)
    other = Split(split.images, (split.labels + 3) % 10)
    network[-1].bias.data[0] += 100
    flags = flags_of(network, other, attack_config("0.5"))
    assert np.array_equal(flags["natural"], (other.labels == 0).numpy())
    assert not flags["pgd3"][~flags["natural"]].any()


def test_no_correct_example_needs_no_attack():
    network = small_network()
    split, _ = labelled(network)
    network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    calls = []
    with torch.no_grad():
        network.eval()
        wrong = Split(split.images, (network(split.images / 255).argmax(1) + 1) % 10)
    calls.clear()
    flags = flags_of(network, wrong, attack_config("0.1"))
    assert not flags["natural"].any() and not flags["pgd3"].any() and calls == [N]


def test_flags_of_a_linear_model_in_closed_form():
    """Robust iff the margin is above epsilon |w|_1, away from the walls."""
    rng = np.random.default_rng(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    w = rng.normal(size=64).astype(np.float32)
    network[1].weight.data = torch.from_numpy(np.stack([w, -w]) / 2)
    images = torch.from_numpy(rng.integers(100, 156, (200, 1, 8, 8), dtype=np.uint8))
    x = images.numpy().reshape(200, -1) / 255
    network[1].bias.data = torch.tensor([-1.0, 1.0]) * float((x @ w).mean()) / 2
    margin = x @ w - (x @ w).mean()
    labels = (margin < 0).astype(np.int64)
    labels[:20] = 1 - labels[:20]
    signed = np.where(labels == 0, margin, -margin)
    epsilon = float(np.quantile(np.abs(margin), 0.5) / np.abs(w).sum())
    near = np.abs(signed - epsilon * np.abs(w).sum()) < 1e-4
    flags = flags_of(network, Split(images, torch.from_numpy(labels)), attack_config(epsilon, num_steps=10), 33)
    robust = signed > epsilon * np.abs(w).sum()
    assert 50 < robust.sum() < 150 and near.sum() < 5
    assert np.array_equal(flags["natural"], signed > 0)
    assert np.array_equal(flags["pgd10"][~near], robust[~near])


def test_modes_and_state_are_restored():
    network = small_network().train()
    network[3].eval()
    split, _ = labelled(network)
    flags = [m.training for m in network.modules()]
    state = {k: v.clone() for k, v in network.state_dict().items()}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    flags_of(network, split, attack_config("0.1"))
    assert [m.training for m in network.modules()] == flags and len(set(flags)) == 2
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_network_is_attacked_and_judged_in_eval_mode_and_float32():
    network = small_network().train()
    split, _ = labelled(network)
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flags_of(network, split, attack_config("0.1"))
        assert network(split.images / 255).dtype == torch.bfloat16  # autocast is on again
    assert set(seen[:-1]) == {(False, torch.float32)} and len(seen) == 1 + 3 + 1 + 1
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == tf32


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_inside_and_restored(before):
    old = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before
    try:
        with pytest.raises(RuntimeError), full_precision():
            assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
            raise RuntimeError
        assert torch.backends.cudnn.allow_tf32 is before
    finally:
        torch.backends.cudnn.allow_tf32 = old


def test_attacked_flags_use_the_given_indices():
    """Flags of a shuffled batch are the shuffled flags, when every example brings its index."""
    network = small_network().eval()
    split, wrong = labelled(network)
    keep = (~wrong).nonzero().flatten()
    x, y = split.images[keep] / 255, split.labels[keep]
    attack = GradientAttack("linf", 0.3, 1e-6, 1)
    options = {"seed": 0, "name": "a"}
    straight = attacked_flags(network, x, y, attack, indices=keep.tolist(), **options)
    order = torch.from_numpy(np.random.default_rng(2).permutation(len(keep)))
    shuffled = attacked_flags(network, x[order], y[order], attack, indices=keep[order].tolist(), **options)
    assert torch.equal(shuffled, straight[order]) and 0 < straight.sum() < len(keep)
    assert not torch.equal(attacked_flags(network, x, y, attack, indices=(keep + 1000).tolist(), **options), straight)
    assert torch.equal(correct_flags(network, x, y), torch.ones(len(keep), dtype=torch.bool))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 500), st.integers(1, 600))
def test_chunks_tile(size, batch_size):
    ranges = chunks(size, batch_size)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
    assert all(0 < stop - start <= batch_size for start, stop in ranges)


# --- batch statistics ----------------------------------------------------------------------------------------------


def two_norms():
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.9),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
    )
    for layer in (network[1], network[4]):
        layer.running_mean.fill_(7.0)
        layer.running_var.fill_(9.0)
        layer.num_batches_tracked.fill_(40)
    return network


def test_reestimated_statistics_are_plain_averages():
    network, rng = two_norms(), np.random.default_rng(0)
    batches = [torch.from_numpy(rng.random((size, 1, 8, 8)).astype(np.float32)) for size in (12, 12, 5)]
    parameters = [p.clone() for p in network.parameters()]
    reestimate_batch_norm(network, iter(batches))
    means, variances = ([], []), ([], [])
    for x in batches:  # by hand: each norm sees inputs made with batch statistics before it
        for i, layer in enumerate((0, 3)):
            with torch.no_grad():
                x = network[layer](x)
            values = x.double().numpy().transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
            means[i].append(values.mean(1))
            variances[i].append(values.var(1, ddof=1))
            normal = (values - values.mean(1, keepdims=True)) / np.sqrt(values.var(1, keepdims=True) + 1e-5)
            shape = (x.shape[1], x.shape[0], *x.shape[2:])
            x = torch.from_numpy(normal.reshape(shape).transpose(1, 0, 2, 3).astype(np.float32)).relu()
    for i, layer in enumerate((network[1], network[4])):
        assert np.abs(layer.running_mean.numpy() - np.mean(means[i], 0)).max() < 1e-5
        assert np.abs(layer.running_var.numpy() - np.mean(variances[i], 0)).max() < 1e-5
        assert int(layer.num_batches_tracked) == 3
    assert (network[1].momentum, network[4].momentum) == (0.1, 0.3)
    assert not any(m.training for m in network.modules())
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), parameters, strict=True))


def test_reestimation_writes_into_the_flat_buffer():
    network = two_norms()
    flat = FlatWeights(network)
    reestimate_batch_norm(network, [torch.rand(8, 1, 8, 8)])
    tail = flat.weights[-14:]
    expected = [network[1].running_mean, network[1].running_var, network[4].running_mean, network[4].running_var]
    assert torch.equal(tail, torch.cat(expected)) and (tail != 7).all() and (tail != 9).all()
    assert flat.counters.tolist() == [1, 1]


# --- the evaluator -------------------------------------------------------------------------------------------------


def make_evaluator(*overrides):
    config = load_config(
        overrides=[
            "evaluation.batch_size=7",
            "training.batch_size=16",
            "evaluation.attack.num_steps=2",
            "evaluation.attack.epsilon=0.02",
            "evaluation.attack.step_size=0.01",
            *overrides,
        ]
    )
    torch.manual_seed(4)
    network = build_model("small_cnn", num_classes=10, in_channels=1, image_size=(8, 8), width=3, batch_norm=True)
    network.classifier.fc3.weight.data.normal_()
    split, _ = labelled(network, 40)
    snapshot = FlatWeights(network).snapshot(9)
    other = build_model("small_cnn", num_classes=10, in_channels=1, image_size=(8, 8), width=3, batch_norm=True)
    splits = {"train": Split(split.images[:39], split.labels[:39]), "validation": split, "test": split}
    return Evaluator(config, other, splits), snapshot, network, split


def test_weights_are_loaded_once_a_snapshot(monkeypatch):
    evaluator, snapshot, *_ = make_evaluator("global_learner.batch_norm=reestimate")
    loads, load = [], evaluator.flat.load
    monkeypatch.setattr(evaluator.flat, "load", lambda given: (loads.append(given), load(given)))
    first = evaluator.evaluate(snapshot, "validation")
    assert len(loads) == 1  # of six chunks
    zeros = WeightSnapshot(9, np.zeros_like(snapshot.weights), snapshot.counters)
    assert evaluator.evaluate(zeros, "validation") != first
    evaluator.evaluate_chunk(snapshot, "test", 0, 7)
    assert [one is snapshot for one in loads] == [True, False, True]
    evaluator.finalize(snapshot)
    assert evaluator.evaluate(snapshot, "validation") == first and len(loads) == 4


def test_evaluator_counts_the_flags_of_the_snapshot():
    evaluator, snapshot, network, split = make_evaluator()
    counts = evaluator.evaluate(snapshot, "validation")
    flags = flags_of(network, split, evaluator.config.evaluation.attack, seed=evaluator.config.seed)
    assert counts == {name: (int(values.sum()), 40) for name, values in flags.items()}
    assert 0 < counts["pgd2"][0] < counts["natural"][0] < 40
    part = evaluator.evaluate_chunk(snapshot, "test", 10, 25)
    assert all(np.array_equal(part[name], flags[name][10:25]) for name in flags)


def test_mixed_statistics_are_shipped_as_they_are():
    evaluator, snapshot, *_ = make_evaluator()
    assert evaluator.finalize(snapshot) is snapshot


@pytest.mark.parametrize(("asked", "batches"), [(1, 1), (2, 2), (20, 2)])  # 39 images are two full batches of 16
def test_reestimated_statistics_are_shipped(asked, batches):
    evaluator, snapshot, network, _ = make_evaluator(
        "global_learner.batch_norm=reestimate", f"global_learner.reestimate_batches={asked}"
    )
    weights = snapshot.weights.copy()
    shipped = evaluator.finalize(snapshot)
    trained = sum(p.numel() for p in network.parameters())
    assert np.array_equal(shipped.weights[:trained], weights[:trained])
    assert (shipped.weights[trained:] != weights[trained:]).mean() > 0.9
    assert shipped.counters.tolist() == [batches] * 4 and shipped.step == 9
    assert np.array_equal(snapshot.weights, weights)
    assert np.array_equal(evaluator.finalize(snapshot).weights, shipped.weights)  # the same images each time
