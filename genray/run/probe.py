"""Measures what a step of each learner costs on one device."""

import statistics

from genray.learners.base_learner import BaseLearner
from genray.run.setup import RunSetup

STEPS = 3


def step_seconds(setup: RunSetup, device: str, threads: dict) -> dict:
    """Learner name -> seconds of a step: the median of a few real ones after a first that does not count.

    Args:
        setup: the prepared run.
        device: where to compute.
        threads: learner name -> torch's threads.
    """
    steps, found = min(STEPS + 1, setup.plan.total_steps), {}
    for name in setup.config.base_learners:
        train = setup.splits["train"]
        learner = BaseLearner(name, setup.plan, setup.build_network(), train, device, threads[name])
        seconds = [learner.run_window(step, step + 1).seconds for step in range(steps)]
        found[name] = statistics.median(seconds[1:] or seconds)
    return found
