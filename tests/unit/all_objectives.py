"""A learner of each objective and kind of attack, small enough for tests."""

import torch
from small_learners import small_network, unit_config

from genray.data.datasets import load_image_data
from genray.data.splits import Split
from genray.learners.base_learner import BaseLearner
from genray.run.plan import make_plan

LINF = {"norm": "linf", "epsilon": 0.1, "step_size": 0.05, "num_steps": 3}
L2 = {"norm": "l2", "epsilon": 0.5, "step_size": 0.2, "num_steps": 3}
L1 = {"norm": "l1", "epsilon": 2, "step_size": 1, "num_steps": 3}
NORMS = {"attacks": {"linf": LINF, "l2": L2, "l1": L1}}
ADAPTIVE = {
    "attacks": {
        name: {"norm": name, "epsilon": epsilon, "num_steps": 3, "start": "zero", "algorithm": "apgd"}
        for name, epsilon in {"linf": 0.1, "l1": 2}.items()
    }
}
ANCHOR = {"name": "anchor", "cross_entropy": 0.5, "target": {"learner": "other"}}
LEARNERS = {
    "natural": {"objective": "natural"},
    "natural mixup": {"objective": {"name": "natural", "mixup": 1.0, "label_smoothing": 0.1}},
    "adversarial": {"objective": "adversarial", "attack": LINF},
    "adversarial l2": {"objective": {"name": "adversarial", "beta": 0.5}, "attack": L2},
    "adversarial l1": {"objective": "adversarial", "attack": L1},
    "adversarial margin, radii": {"objective": "adversarial", "attack": {**LINF, "radius_clip": [0.5, 1.5]}},
    "adversarial, train mode": {"objective": "adversarial", "attack": {**LINF, "mode": "train"}},
    "adversarial, CutMix": {"objective": "adversarial", "attack": LINF, "augmentation": {"cutmix": 0.5}},
    "fat": {"objective": "adversarial", "attack": {**LINF, "tau": 1, "step_noise": 0.01}},
    "apgd l1": {"objective": "adversarial", "attack": ADAPTIVE["attacks"]["l1"]},
    "apgd linf": {"objective": "adversarial", "attack": ADAPTIVE["attacks"]["linf"]},
    "anchor": {"objective": ANCHOR, "attack": LINF},
    "trades": {"objective": {"name": "trades", "beta": 6}, "attack": {**LINF, "start": "gaussian"}},
    "trades AWP": {
        "objective": {"name": "trades", "beta": 6},
        "attack": {**LINF, "start": "gaussian"},
        "awp": {"gamma": 0.01, "warmup_epochs": 0},
    },
    "mart": {"objective": {"name": "mart", "beta": 5}, "attack": LINF},
    "iat": {"objective": {"name": "iat", "alpha": 1.0}, "attack": LINF},
    "rst": {"objective": {"name": "rst", "beta": 0.5}, "attack": LINF},
    "max": {"objective": "max", **NORMS},
    "avg": {"objective": "avg", **NORMS},
    "sat": {"objective": "sat", **NORMS},
    "msd": {"objective": "msd", **NORMS},
    "e_at": {"objective": "e_at", **ADAPTIVE},
    "adam, clipped": {"objective": "natural", "optimizer": {"name": "adam", "clip_norm": 1.0}},
    "adamw, no decay of biases": {
        "objective": "natural",
        "optimizer": {"name": "adamw", "weight_decay": 0.1, "decay_norms_and_biases": False},
    },
}


def partly_labelled():
    """160 digits, a third of them as pseudo-labelled."""
    digits = load_image_data("digits").train.first(160)
    return Split(digits.images, digits.labels, torch.arange(160) % 3 > 0)


def make_learner(options, train, dropout=0.0, device="cpu"):
    learner = {"lr": 0.05, "averaging": {"decay": 0.9}, "optimizer": {"name": "sgd", "momentum": 0.9}, **options}
    names = {"mine": learner}
    names |= {"other": {"objective": "natural", "lr": 0.05}} if options["objective"] is ANCHOR else {}
    data = {"source": "digits", "extra": {"source": "npz", "path": "-"}}
    mixing = {"mixing_weights": {name: 1 / len(names) for name in names}}
    config = unit_config(names, data=data, evaluation={"attack": LINF}, global_learner=mixing)
    target = small_network() if options["objective"] is ANCHOR else None
    return BaseLearner("mine", make_plan(config, len(train)), small_network(dropout), train, device, target=target)
