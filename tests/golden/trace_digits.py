"""The first 20 losses of both base learners on digits; `python tests/golden/trace_digits.py` writes them anew.

A change that is meant to keep the numbers (a refactoring, a faster kernel in float32) has to keep this file. One that
changes them on purpose writes it anew in a commit of its own, which says why.
"""

import json
from pathlib import Path

from genray.config import load_config
from genray.learners.base_learner import BaseLearner
from genray.learners.global_learner import GlobalLearner
from genray.run.setup import prepare

FILE = Path(__file__).parent / "digits_cpu.json"
STEPS, EVERY = 20, 5  # theta_g is handed back every 5 steps
OVERRIDES = ["training.epochs=1", "training.batch_size=32", "data.train_examples=900"]
PLAIN = ["compute.channels_last=false", "compute.fold_batch_norm=false"]  # PGD's signs amplify any rounding


def trace(compute=PLAIN, device="cpu") -> dict:
    """Learner name -> its losses; and the L2 norm of theta_g at the end."""
    setup = prepare(load_config(None, [*OVERRIDES, *compute]))
    learners = {
        name: BaseLearner(name, setup.plan, setup.build_network(), setup.splits["train"], device)
        for name in setup.config.base_learners
    }
    glob, losses = GlobalLearner(setup.config), {name: [] for name in learners}
    for step in range(STEPS):
        for name, learner in learners.items():
            stats = learner.run_window(step, step + 1)
            losses[name].append(stats.loss_sum / stats.num_examples)
        theta_g = glob.combine([learner.contribution() for learner in learners.values()])
        if (step + 1) % EVERY == 0:
            for learner in learners.values():
                learner.load_global(theta_g)
    return {"losses": losses, "norm_of_theta_g": float((theta_g.weights.astype("float64") ** 2).sum() ** 0.5)}


if __name__ == "__main__":
    FILE.write_text(json.dumps(trace(), indent=1) + "\n")
