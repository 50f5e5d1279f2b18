"""Real actors on this machine give the bits of the run in one process."""

import json
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, timeless
from PIL import Image

import genray

pytestmark = pytest.mark.ray


MODELS = ("model.pt", "model_last.pt", "learners/natural.pt", "learners/linf.pt")


# The robust learner trains by E-AT: its counts of successes decide what the next steps do.
E_AT = [
    "base_learners.linf.attack=null",
    "base_learners.linf.objective=e_at",
    "base_learners.linf.attacks={linf: {norm: linf, epsilon: 0.2, step_size: 0.1, num_steps: 2}, "
    "l1: {algorithm: apgd, norm: l1, epsilon: 3, num_steps: 2}}",
]


def _weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)["state_dict"]


RAW = [
    "global_learner.mix=raw",
    "evaluation.base_learners=true",
    "base_learners.natural.averaging.enabled=false",  # its own model is gone once theta_g is handed back
    *E_AT,
]
AVERAGED = [  # TRADES with AWP beside mixup, cutout and label smoothing
    "global_learner.mix=averaged",
    "base_learners.linf.objective=trades",
    "base_learners.linf.awp.gamma=0.005",
    "base_learners.linf.attack.tau=[[0, 0], [1/2, 1]]",
    "base_learners.natural.objective={name: natural, mixup: 1, label_smoothing: 0.1}",
    "base_learners.natural.augmentation.cutout=2",
]
RECIPE = [  # the settings of docs/recipes.md
    "base_learners.linf.attack.radius_clip=[0.5, 1.5]",
    "base_learners.linf.attack.scale=[[0, 0.5], [1/2, 1]]",
    "base_learners.linf.optimizer={name: adamw, decay_norms_and_biases: false, clip_norm: 0.5}",
    "base_learners.linf.lr=0.002",
    "base_learners.linf.augmentation={resized_crop: [0.5, 1], policy: trivialaugment, cutmix: 1}",
    "base_learners.natural.augmentation={policy: randaugment, erasing: 0.5, cutmix: 0.5}",
]
ANCHORED = [
    "base_learners.linf.objective={name: anchor, target: {learner: natural}, scale: 0.1, freeze_head: true}",
    "base_learners.linf.starts_from=natural",
    "base_learners.linf.from_epoch=1",
    "base_learners.natural.until_epoch=2",
    "checkpoint.every_steps=5",
]


def same_outcome(ours, theirs):
    for name in MODELS:
        mine, other = _weights(ours, name), _weights(theirs, name)
        assert list(mine) == list(other)
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    records = [timeless((folder / "metrics.jsonl").read_text()) for folder in (ours, theirs)]
    assert records[0] == records[1]
    assert [record["epoch"] for record in records[0]] == [1, 2, 3]
    assert records[0][-1]["redistributions"] > 3


@pytest.mark.parametrize("kind", [AVERAGED, ANCHORED, RECIPE], ids=["averaged", "anchored", "recipe"])
def test_the_resolved_configuration_gives_the_same_bits_on_ray(on_ray, tmp_path, small_run, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", image=pixels, label=np.arange(60) % 10, pseudo=True)
    extra = f"data.extra={{source: npz, path: {tmp_path / 'extra.npz'}, batch_share: 0.4}}"
    local = genray.train(None, [*small_run, *kind, extra], runtime="local", storage=str(tmp_path / "local"))
    resolved = yaml.safe_load((tmp_path / "local" / "digits" / "config.yaml").read_text())
    assert resolved.pop("versions")["torch"] == metadata.version("torch")
    there = genray.train(resolved, runtime="ray", storage=str(tmp_path / "ray"))
    assert local["models"] == there["models"]
    same_outcome(tmp_path / "ray/digits", tmp_path / "local/digits")


def test_resumed_on_the_other_runtime(on_ray, tmp_path, small_run):
    """A run that stopped goes on elsewhere and ends with the bits of the run that never stopped."""
    local = genray.train(None, [*small_run, *RAW], runtime="local", storage=str(tmp_path / "whole"))
    folder = tmp_path / "parts" / "digits"
    shutil.copytree(tmp_path / "whole/digits", folder)
    for file in (sorted((folder / "checkpoints").iterdir())[-1], *(folder / n for n in (*MODELS, "results.json"))):
        file.unlink()  # as if killed right after the second epoch's checkpoint
    resumed = genray.train(None, [*small_run, *RAW], runtime="ray", storage=str(tmp_path / "parts"), resume=True)
    assert resumed["models"] == local["models"]
    same_outcome(folder, tmp_path / "whole/digits")


@pytest.fixture
def tiny_colour_folder(tmp_path):
    """24 training and 8 test images of 3x32x32 in two classes."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in ("dark", "light"):
            target = tmp_path / "images" / part / label
            target.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 128, (32, 32, 3)) + (128 if label == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_papers_configuration_starts_on_ray(on_ray, tmp_path, tiny_colour_folder):
    """Two steps of the full ResNet-18 preset at batch 8; thinner, in one process: test_presets_train.py."""
    overrides = [
        "data.source=image_folder",
        f"data.path={tiny_colour_folder}",
        "data.validation_examples=8",
        "training.epochs=1",
        "training.batch_size=8",
        "training.drop_last=true",
        "global_learner.warmup_epochs=0",
        "global_learner.sync_unit=step",
        "global_learner.sync_every=1",
        "evaluation.attack.num_steps=1",
        "base_learners.linf.attack.num_steps=1",
    ]
    config = ROOT / "configs/cifar10_resnet18_generalist.yaml"
    genray.train(config, overrides, runtime="ray", storage=str(tmp_path))
    weights = _weights(tmp_path / "cifar10_resnet18_generalist", "model_last.pt")
    assert sum(v.numel() for k, v in weights.items() if "running" not in k and "num_batches" not in k) > 11_000_000
    assert all(torch.isfinite(value).all() for value in weights.values())
    record = json.loads((tmp_path / "cifar10_resnet18_generalist" / "metrics.jsonl").read_text())
    assert record["step"] == 2
    assert record["redistributions"] == 2
