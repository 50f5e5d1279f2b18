"""Every preset plans, and one of each composition and network takes two steps on random images of its data's shape, cut
to one or two channels: what a learner is made of fits together. Figures are for real runs."""

import numpy as np
import pytest
import torch
from presets import CONFIGS, PRESETS, launch_line, load, overrides_in

from genray.config.load import load_config
from genray.data.splits import ImageData, Split
from genray.learners.base_learner import BaseLearner
from genray.learners.global_learner import GlobalLearner
from genray.recording.dry_run import plan_text
from genray.run import setup

SHAPES = {"digits": (10, 1, 8), "cifar100": (100, 3, 32), "mnist": (10, 1, 28)}  # others: 10 colours of 32 x 32
BATCH = 8
SHORT = [
    f"training.batch_size={BATCH}",
    "training.epochs=1",
    "training.drop_last=true",
    "data.train_examples=null",
    "data.validation_examples=0",
    "evaluation.select_on=test",
    "evaluation.examples=null",
    "global_learner.warmup_epochs=0",
    "global_learner.sync_unit=epoch_end",
    "global_learner.sync_every=1",
]


def random_images(source, **_):
    """Two batches to train on, of `source`'s shape."""
    classes, channels, side = SHAPES.get(source, (10, 3, 32))
    numbers = torch.Generator().manual_seed(0)

    def split(n):
        images = torch.randint(0, 256, (n, channels, side, side), generator=numbers, dtype=torch.uint8)
        return Split(images, torch.arange(n) % 4)

    return ImageData(split(2 * BATCH), split(4), tuple(map(str, range(classes))), source)


def shortened(name, folder):
    """The preset with two steps an epoch, two steps an attack and a thin network."""
    config = load(name)
    overrides = [*SHORT, f"model.width={1 if config.model.name.startswith('wrn') else 2}"]
    if ":" in config.model.name:  # of another library: at its own width, and its weights are the user's
        overrides = [*SHORT, "model.weights=null", "model.new_head=false"]
    if config.data.source == "image_folder":
        overrides += ["data.image_size=null", "data.home=auto"]
    for learner_name, learner in config.base_learners.items():
        at = f"base_learners.{learner_name}"
        overrides += [f"{at}.starts_from=null", f"{at}.from_epoch=0", f"{at}.until_epoch=null"]
        overrides += [f"{at}.attack.num_steps=2"] if learner.attack else []
        overrides += [f"{at}.attacks.{key}.num_steps=2" for key in learner.attacks or {}]
        overrides += [f"{at}.awp.warmup_epochs=0"] if learner.awp else []
    if config.data.extra:
        some = random_images(config.data.source).test
        np.savez(folder / "x.npz", image=some.images.numpy(), label=some.labels.numpy(), pseudo=True)
        overrides += [f"data.extra.path={folder / 'x.npz'}", "data.extra.batch_share=0.5"]
    return load_config(CONFIGS / name, [*overrides_in(launch_line(name)), *overrides])


def composition(name):
    """What its learners are made of; figures, data and networks aside."""
    config = load(name)
    kinds = [config.data.extra is None]
    for learner in config.base_learners.values():
        attacks = [learner.attack] if learner.attack else (learner.attacks or {}).values()
        kinds += [learner.objective.name, learner.optimizer.name, learner.awp is None]
        kinds += [(attack.norm, attack.algorithm, attack.mode, attack.start) for attack in attacks]
    return tuple(kinds)


# Of several the last: no wide network where a small one will do.
CHEAP_LAST = sorted(PRESETS, key=lambda name: "wrn" not in name)
ONE_OF_EACH = {load(name).model.name: name for name in PRESETS} | {composition(name): name for name in CHEAP_LAST}


@pytest.mark.parametrize("name", PRESETS)
def test_plans(name, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "load_image_data", random_images)
    prepared = setup.prepare(shortened(name, tmp_path))
    text = plan_text(prepared, parameters=1, places=["here"])
    for learner in prepared.config.base_learners:
        assert f"\nlearner        {learner}: " in text
    assert "1 epochs x 2 = 2 a learner" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ONE_OF_EACH.values())))
def test_takes_two_steps(name, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "load_image_data", random_images)
    prepared = setup.prepare(shortened(name, tmp_path))
    train, learners = prepared.splits["train"], []
    for name in prepared.config.base_learners:
        target = prepared.target_network(name)
        learners.append(BaseLearner(name, prepared.plan, prepared.build_network(), train, target=target))
    first = learners[0].flat.parameter.detach().clone()
    for learner in learners:
        done = learner.run_window(0, 2)
        assert np.isfinite(done.loss_sum) and done.num_examples == 2 * BATCH
        assert not torch.equal(learner.flat.parameter, first)  # all start from the same weights
    theta_g = GlobalLearner(prepared.config).combine([learner.contribution() for learner in learners])
    assert np.isfinite(theta_g.weights).all()
