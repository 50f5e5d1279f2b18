"""Methods that are others at the end of a setting's range (methods H.7, H.10): the same weights after twenty steps.

All on the real digits with everything on: BatchNorm, dropout, shuffling, short last batches, momentum, weight decay.
The two configurations have the same learner's name, because that name is part of the key of everything random.
"""

import numpy as np
import pytest

from genray.config import load_config
from genray.core.flat import FlatWeights
from genray.learners.base_learner import BaseLearner
from genray.learners.global_learner import GlobalLearner
from genray.run.plan import make_plan
from genray.run.setup import RunSetup, prepare

L, N = "base_learners.linf", "base_learners.natural"
STEPS, K = 20, 2
RUN = [
    "training.epochs=4",
    "training.batch_size=48",
    "data.train_examples=280",
    "data.test_examples=20",
    "data.validation_examples=50",
    "model.width=2",
    f"{L}.attack.num_steps={K}",
    f"{L}.lr=[[0, 0.1], [1, 0.02]]",
    "evaluation.attack={norm: linf, epsilon: 0.2, step_size: 0.05, num_steps: 2}",
]
ALONE = [f"{N}=null", "global_learner.gamma=null"]
NATURAL = [f"{L}.attack=null", f"{L}.objective={{name: natural}}"]


@pytest.fixture(scope="module")
def splits():
    return prepare(load_config(None, RUN)).splits


def setup_of(splits, overrides):
    """`prepare` without reading the data anew."""

    config = load_config(None, [*RUN, *overrides])
    return RunSetup(make_plan(config, len(splits["train"])), splits, tuple("0123456789"))


def trained(splits, overrides, name="linf", steps=STEPS):
    """The learner after `steps` steps."""
    setup = setup_of(splits, overrides)
    learner = BaseLearner(name, setup.plan, setup.build_network(), splits["train"])
    learner.run_window(0, steps)
    return learner


def same(first, second):
    """Weights, statistics, counters, averages, share and momentum, bit by bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    arrays = {key: np.array_equal(ours[key], theirs[key]) for key in ("weights", "counters", "average", "share")}
    momentum = np.array_equal(ours["optimizer"]["momentum_buffer"], theirs["optimizer"]["momentum_buffer"])
    return all(arrays.values()) and momentum


FAT_K = [f"{L}.attack.tau={K}"]
IDENTITIES = {
    "FAT with tau = K is PGD-AT": (FAT_K, [], [f"{L}.attack.tau=0"]),
    "FAT-TRADES with tau = K is TRADES": (
        [*FAT_K, f"{L}.objective=trades"],
        [f"{L}.objective=trades"],
        [f"{L}.objective=trades", f"{L}.attack.tau=0"],
    ),
    "TRADES with lambda = 0 is NT": (
        [f"{L}.objective={{name: trades, beta: 0}}"],
        NATURAL,
        [f"{L}.objective={{name: trades, beta: 0.01}}"],
    ),
    "PGD-AT with beta = 0 is NT": ([f"{L}.objective.beta=0"], NATURAL, [f"{L}.objective.beta=0.01"]),
    "AWP with gamma = 0 around PGD-AT": ([f"{L}.awp.gamma=0"], [], [f"{L}.awp.gamma=0.001"]),
    "AWP with gamma = 0 around TRADES": (
        [f"{L}.objective=trades", f"{L}.awp.gamma=0"],
        [f"{L}.objective=trades"],
        [f"{L}.objective=trades", f"{L}.awp.gamma=0.001"],
    ),
    "AWP with gamma = 0 around MART": (
        [f"{L}.objective=mart", f"{L}.awp.gamma=0"],
        [f"{L}.objective=mart"],
        [f"{L}.objective=mart", f"{L}.awp.gamma=0.001"],
    ),
    "AWP that is still warming up": ([f"{L}.awp={{gamma: 0.1, warmup_epochs: 4}}"], [], [f"{L}.awp.gamma=0.1"]),
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_equal_weights_after_twenty_steps(splits, identity):
    """Bit by bit, because the arithmetic is the same; the third configuration shows that the setting is alive."""
    special, base, other = IDENTITIES[identity]
    learner = trained(splits, [*ALONE, *special])
    assert same(learner, trained(splits, [*ALONE, *base]))
    assert not same(trained(splits, [*ALONE, *special], steps=4), trained(splits, [*ALONE, *other], steps=4))


# --- the ends of gamma -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["never", "epoch_end"])
@pytest.mark.parametrize(("gamma", "name"), [(1, "linf"), (0, "natural")])
def test_ends_of_gamma_are_runs_of_one_learner(splits, gamma, name, sync):
    """gamma = 1 is SEAT, gamma = 0 the averaged natural learner: with or without the other learner at hand.

    Without redistribution the learner itself is the same bit by bit. With it, it is handed theta_g, which as a sum of
    two shares (the other one's is the start's half, fading) rounds otherwise than one share alone: 1e-5 then.
    """
    sync = [f"global_learner.sync_unit={sync}", "global_learner.sync_every=1", "global_learner.warmup_epochs=3"]
    both = setup_of(splits, [f"global_learner.gamma={gamma}", *sync])
    other = N if name == "linf" else L
    alone = setup_of(splits, [f"{other}=null", "global_learner.gamma=null", *sync])
    ends = []
    for setup in (both, alone):
        learners = {
            key: BaseLearner(key, setup.plan, setup.build_network(), splits["train"])
            for key in setup.config.base_learners
        }
        glob = GlobalLearner(setup.config)
        for window in setup.plan.windows:
            for learner in learners.values():
                learner.run_window(window.start, window.stop)
            theta_g = glob.combine([learner.contribution() for learner in learners.values()])
            if window.redistribute:
                for learner in learners.values():
                    learner.load_global(theta_g)
        ends.append((learners[name], theta_g))
    (learner, theta_g), (single, single_theta_g) = ends
    assert setup.plan.num_redistributions == (2 if "epoch_end" in sync[0] else 0)
    if "never" in sync[0]:
        for key in ("weights", "counters", "average"):
            assert np.array_equal(learner.state_dict()[key], single.state_dict()[key]), key
    np.testing.assert_allclose(learner.flat.weights, single.flat.weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(theta_g.weights, single_theta_g.weights, rtol=1e-5, atol=1e-5)
    assert np.abs(theta_g.weights - FlatWeights(setup.build_network()).weights.numpy()).max() > 0.05


@pytest.mark.parametrize("gamma", [None, 1])
def test_seat_by_its_own_recursion(splits, gamma):
    """C9: PGD-AT whose weights and statistics are averaged with the warmed-up decay; the average is what is shipped.

    With `mix: raw` that is theta_g, at any time; it is also the learner's own average. (`mix: averaged`, as in the
    official code of Generalist, averages once more.)
    """
    learners = [] if gamma else [f"{N}=null"]
    gamma = [f"global_learner.gamma={'null' if gamma is None else gamma}"]
    overrides = [*learners, *gamma, "global_learner.mix=raw", "global_learner.sync_unit=never"]
    setup = setup_of(splits, overrides)
    made = {
        key: BaseLearner(key, setup.plan, setup.build_network(), splits["train"]) for key in setup.config.base_learners
    }
    robust = made["linf"]
    average = robust.flat.weights.double().numpy().copy()
    for step in range(STEPS):
        for learner in made.values():
            learner.run_window(step, step + 1)
        decay = min(0.99, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * robust.flat.weights.double().numpy()
    theta_g = GlobalLearner(setup.config).combine([learner.contribution() for learner in made.values()])
    np.testing.assert_allclose(theta_g.weights, average, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(robust.model_snapshot().weights, average, rtol=1e-6, atol=1e-6)
