"""Settings of training recipes that do not go together, each refused in one line."""

import pytest

from genray.config import load_config
from genray.errors import ConfigError

L = "base_learners.linf"
REFUSED = {
    "selective decay of nothing": (
        [f"{L}.optimizer={{name: adam, decay_norms_and_biases: false}}"],
        f"{L}.optimizer.decay_norms_and_biases: has no effect without weight_decay",
    ),
    "a scale that does not end at 1": (
        [f"{L}.attack.scale=[[0, 0], [1, 0.5]]"],
        f"{L}.attack.scale: expected 1 at the end (epsilon is the final radius), got 0.5",
    ),
    "SiLU in a small CNN": (
        ["model.activation=silu"],
        "model.activation: has no effect with small_cnn; it is for our residual networks",
    ),
    "SiLU in E-AT's network": (
        ["model={name: preact_resnet18_softplus, activation: silu}"],
        "model.activation: has no effect with preact_resnet18_softplus; it is for our residual networks",
    ),
    "a crop from large to small": (
        [f"{L}.augmentation.resized_crop=[1, 0.5]"],
        f"{L}.augmentation.resized_crop: expected [smallest, largest], got [1.0, 0.5]",
    ),
    "two crops": (
        [f"{L}.augmentation={{resized_crop: [0.5, 1], crop_padding: 2}}"],
        f"{L}.augmentation.crop_padding: expected 0 with resized_crop, got 2",
    ),
    "strength of what has none": (
        [f"{L}.augmentation={{policy: trivialaugment, magnitude: 5}}"],
        f"{L}.augmentation.magnitude: has no effect with policy trivialaugment; it is for randaugment",
    ),
    "labels that TRADES cannot mix": (
        [f"{L}.objective=trades", f"{L}.augmentation.cutmix=1"],
        f"{L}.augmentation.cutmix: expected 0 with objective trades; natural and adversarial mix labels, once",
    ),
    "CutMix and mixup": (
        ["base_learners.natural={objective: {name: natural, mixup: 1}, augmentation: {cutmix: 1}, lr: 0.1}"],
        "base_learners.natural.augmentation.cutmix: expected 0 with mixup; natural and adversarial mix labels, once",
    ),
    "CutMix and FAT": (
        [f"{L}.attack.tau=1", f"{L}.augmentation.cutmix=1"],
        f"{L}.augmentation.cutmix: expected 0 with attack.tau, which stops at a misclassified label",
    ),
    "clip to nothing": (
        [f"{L}.optimizer.clip_norm=0"],
        f"{L}.optimizer.clip_norm: expected a number above 0, got 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    overrides, line = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert str(error.value).removeprefix("configuration: ").strip() == line
