"""The averages of Generalist against the serial recursion in float64 and the explicit sum over all past iterates."""

import numpy as np
import pytest
import torch

from genray.config import load_config
from genray.core.mixing import accumulate_, ema_update_, sum_shares
from genray.core.schedules import ema_decay
from genray.learners.global_learner import GlobalLearner
from genray.types import WeightSnapshot

STEPS, SIZE = 1000, 64


def decay_at(step):
    """min(0.999, (1+s)/(10+s)), in the paper's words, not the code's."""
    return min(0.999, (1 + step) / (10 + step))


def weights_at(step, names):
    """Changing weights on the simplex: one falls, the others share the rest unevenly."""
    first = 1.0 if step < 300 else 1.0 - 0.6 * (step - 300) / (STEPS - 300)
    others = len(names) - 1
    shares = np.arange(1, others + 1) / sum(range(1, others + 1)) if others else []
    return dict(zip(names, [first, *((1 - first) * s for s in shares)], strict=True))


def random_walks(names, seed):
    """Iterates of each learner, (STEPS, SIZE) float32: they move as weights do, each on its own path."""
    rng = np.random.default_rng(seed)
    start = rng.normal(size=SIZE)
    walks = {n: start + np.cumsum(0.05 * rng.normal(size=(STEPS, SIZE)), 0) for n in names}
    return start.astype(np.float32), {n: w.astype(np.float32) for n, w in walks.items()}


@pytest.mark.parametrize("names", [("r", "n"), ("linf", "natural", "l2"), ("only",)])
def test_parallel_shares_equal_the_serial_recursion(names):
    start, walks = random_walks(names, seed=len(names))
    shares = {n: torch.from_numpy(start) / len(names) for n in names}
    theta_g, largest = start.astype(np.float64), 0.0
    for step in range(STEPS):
        weights, decay = weights_at(step, names), decay_at(step)
        mixture = sum(weights[n] * walks[n][step].astype(np.float64) for n in names)
        theta_g = decay * theta_g + (1 - decay) * mixture
        for n in names:
            accumulate_(shares[n], torch.from_numpy(walks[n][step]), ema_decay(step, 0.999), weights[n])
        parallel = sum_shares(list(shares.values())).numpy()
        largest = max(largest, np.abs(parallel - theta_g).max())
    assert 0 < largest < 3e-6  # float32 rounding only
    assert np.abs(theta_g - start).max() > 0.1  # and the average did move


def test_theta_g_is_the_weighted_sum_of_all_past_iterates():
    """theta_g(S) = prod d theta_0 + sum_s (1 - d_s) prod_{t > s} d_t sum_k w_k(s) theta_k(s) (appendix, Theorem 1)."""
    names = ("r", "n")
    start, walks = random_walks(names, seed=7)
    shares = {n: torch.from_numpy(start) / 2 for n in names}
    for step in range(STEPS):
        for n in names:
            accumulate_(shares[n], torch.from_numpy(walks[n][step]), ema_decay(step, 0.999), weights_at(step, names)[n])
    decays = np.array([decay_at(s) for s in range(STEPS)])
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)  # prod_{t > s} d_t
    coefficients = {n: (1 - decays) * later * [weights_at(s, names)[n] for s in range(STEPS)] for n in names}
    assert np.prod(decays) + sum(c.sum() for c in coefficients.values()) == pytest.approx(1.0, abs=1e-12)
    expected = np.prod(decays) * start + sum(coefficients[n] @ walks[n].astype(np.float64) for n in names)
    assert np.abs(sum_shares(list(shares.values())).numpy() - expected).max() < 3e-6


def test_without_decay_and_raw_it_is_the_mixture_exactly():
    """Methods H.7: alpha' = 0 gives gamma theta_r + (1 - gamma) theta_n."""
    rng = np.random.default_rng(0)
    for step, gamma in enumerate((0.0, 0.25, 0.4, 0.7, 1.0)):
        robust, natural = rng.normal(size=(2, SIZE)).astype(np.float32)
        shares = [torch.from_numpy(rng.normal(size=SIZE).astype(np.float32)) for _ in range(2)]
        accumulate_(shares[0], torch.from_numpy(robust), ema_decay(step, 0.0), gamma)
        accumulate_(shares[1], torch.from_numpy(natural), ema_decay(step, 0.0), 1 - gamma)
        expected = np.float32(gamma) * robust + np.float32(1 - gamma) * natural
        assert np.array_equal(sum_shares(shares).numpy(), expected)


def test_weight_zero_does_not_read_the_weights():
    share = torch.ones(3)
    accumulate_(share, torch.full((3,), float("nan")), 0.5, 0.0)
    assert share.tolist() == [0.5, 0.5, 0.5]


def test_ema_update():
    average, weights = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([3.0, 2.0, 4.0])
    result = ema_update_(average, weights, 0.75)
    assert result is average and average.tolist() == [1.5, 2.0, -2.0]
    assert weights.tolist() == [3.0, 2.0, 4.0]
    assert ema_update_(average, weights, 0.0).tolist() == [3.0, 2.0, 4.0]


def test_sum_leaves_its_arguments():
    shares = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0])]
    assert sum_shares(shares).tolist() == [111.0, 222.0]
    assert [s.tolist() for s in shares] == [[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]
    assert sum_shares(iter(shares[:1])).tolist() == [1.0, 2.0] and sum_shares(shares[:1]) is not shares[0]


# --- the global learner ----------------------------------------------------------------------------------------


def three_learners():
    attack = {"epsilon": 0.1, "step_size": 0.02}
    return load_config(
        {
            "name": "three",
            "data": {"source": "digits"},
            "model": {"name": "small_cnn"},
            "training": {"epochs": 1},
            "base_learners": {
                "natural": {"objective": "natural", "lr": 0.1},
                "linf": {"objective": "adversarial", "lr": 0.1, "attack": {"norm": "linf", **attack}},
                "l2": {"objective": "adversarial", "lr": 0.1, "attack": {"norm": "l2", **attack}},
            },
            "global_learner": {"mixing_weights": {"linf": 0.4, "l2": 0.3, "natural": "rest"}},
        }
    )


def snapshot(values, counters, step=5):
    return WeightSnapshot(step, np.array(values, np.float32), np.array(counters, np.int64))


def test_combine_sums_in_the_order_of_the_configuration():
    # In float32 the order shows: (1e8 + 1) - 1e8 = 0, (1e8 - 1e8) + 1 = 1.
    contributions = [snapshot([1e8, 1], [1]), snapshot([1.0, 2], [2]), snapshot([-1e8, 3], [3])]
    learner = GlobalLearner(three_learners())
    theta_g = learner.combine(contributions)
    assert theta_g.weights.tolist() == [0.0, 6.0] and theta_g.weights.dtype == np.float32
    assert theta_g.step == 5
    swapped = [contributions[0], contributions[2], contributions[1]]
    assert learner.combine(swapped).weights.tolist() == [1.0, 6.0]
    assert contributions[0].weights.tolist() == [1e8, 1]


def test_counters_are_the_first_robust_learners():
    contributions = [snapshot([0], [10, 11]), snapshot([0], [20, 21]), snapshot([0], [30, 31])]
    theta_g = GlobalLearner(three_learners()).combine(contributions)
    assert theta_g.counters.tolist() == [20, 21]
    theta_g.counters[:] = 0
    assert contributions[1].counters.tolist() == [20, 21]  # a copy


def test_read_only_arrays_are_accepted():
    contributions = [snapshot([i], [i]) for i in range(3)]
    for c in contributions:
        c.weights.setflags(write=False)
        c.counters.setflags(write=False)
    theta_g = GlobalLearner(three_learners()).combine(contributions)
    assert theta_g.weights.tolist() == [3.0] and theta_g.weights.flags.writeable


def test_combine_refuses():
    learner = GlobalLearner(three_learners())
    a, b, c = (snapshot([1, 2], [1]) for _ in range(3))
    with pytest.raises(ValueError, match="expected 3 contributions, got 2"):
        learner.combine([a, b])
    with pytest.raises(ValueError, match=r"one step.*'l2': 6"):
        learner.combine([a, b, snapshot([1, 2], [1], step=6)])
    with pytest.raises(ValueError, match="one size"):
        learner.combine([a, b, snapshot([1, 2, 3], [1])])
    assert learner.combine([a, b, c]).weights.tolist() == [3.0, 6.0]
