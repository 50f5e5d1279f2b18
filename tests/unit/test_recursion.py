"""theta_g against the serial recursion of the papers, step by step in float64, written here anew (methods A1)."""

import numpy as np
import pytest
import torch

from genray.config import load_config
from genray.learners.base_learner import BaseLearner
from genray.learners.global_learner import GlobalLearner
from genray.run.setup import prepare


def recursion_step(theta_g, robust, natural, s, gamma, limit):
    """theta_g <- d_s theta_g + (1 - d_s)(gamma theta_r + (1 - gamma) theta_n), d_s = min(alpha', (1+s)/(10+s))."""
    d = min(limit, (1 + s) / (10 + s))
    return d * theta_g + (1 - d) * (gamma * robust + (1 - gamma) * natural)


@pytest.mark.parametrize("mix", ["averaged", "raw"])
@pytest.mark.parametrize("schedules_by", ["step", "epoch"])
def test_whole_run_equals_the_per_step_recursion(small_run, mix, schedules_by):
    """Redistribution, BatchNorm, dropout, changing gamma and the warm-up of d_s are all active."""
    config = load_config(None, [*small_run, f"global_learner.mix={mix}", f"training.schedules_by={schedules_by}"])
    setup = prepare(config)
    plan, alpha = setup.plan, config.base_learners["linf"].averaging.decay
    learners = {
        name: BaseLearner(name, plan, setup.build_network(), setup.splits["train"]) for name in ("natural", "linf")
    }
    glob = GlobalLearner(config)
    theta_0 = learners["linf"].flat.weights.double().numpy().copy()
    reference, averages = theta_0.copy(), {name: theta_0.copy() for name in learners}
    epochs, per_epoch = 3, plan.steps_per_epoch
    redistributed = 0

    for window in plan.windows:
        for s in range(window.start, window.stop):
            raw = {}
            for name, learner in learners.items():
                learner.run_window(s, s + 1)
                raw[name] = learner.flat.weights.double().numpy().copy()
                d = min(alpha, (1 + s) / (10 + s))
                averages[name] = d * averages[name] + (1 - d) * raw[name]
            position = s / (epochs * per_epoch) if schedules_by == "step" else (s // per_epoch + 1) / epochs
            gamma = np.interp(position, [0, 1 / 3, 1], [1, 0.8, 0.3])
            mixed = averages if mix == "averaged" else raw
            reference = recursion_step(reference, mixed["linf"], mixed["natural"], s, gamma, 0.99)
        theta_g = glob.combine([learner.contribution() for learner in learners.values()])
        # Relative to the scale of each weight: running variances are not near 1.
        np.testing.assert_allclose(theta_g.weights, reference, rtol=1e-6, atol=1e-6)
        if window.redistribute:
            redistributed += 1
            for learner in learners.values():
                learner.load_global(theta_g)
                assert torch.equal(learner.flat.weights, torch.from_numpy(theta_g.weights))
    assert redistributed >= 4
    assert not np.allclose(reference, theta_0, atol=1e-2)
