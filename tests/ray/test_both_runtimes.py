"""Real actors on this machine give the bits of the run in one process."""

import json
from importlib import metadata

import numpy as np
import pytest
import ray
import torch
import yaml
from conftest import ROOT, timeless
from PIL import Image

import genray

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def private_ray():
    """One for all runs; that a run starts and ends its own is in test_loopback.py and test_kills.py."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="genray")
    yield
    ray.shutdown()


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


KINDS = {
    "raw": [
        "global_learner.mix=raw",
        "evaluation.base_learners=true",
        "base_learners.natural.averaging.enabled=false",  # its own model is gone once theta_g is handed back
        *E_AT,
    ],
    "averaged": [  # TRADES with AWP beside mixup, cutout and label smoothing
        "global_learner.mix=averaged",
        "base_learners.linf.objective=trades",
        "base_learners.linf.awp.gamma=0.005",
        "base_learners.linf.attack.tau=[[0, 0], [1/2, 1]]",
        "base_learners.natural.objective={name: natural, mixup: 1, label_smoothing: 0.1}",
        "base_learners.natural.augmentation.cutout=2",
    ],
    "anchored": [
        "base_learners.linf.objective={name: anchor, target: {learner: natural}, scale: 0.1, freeze_head: true}",
        "base_learners.linf.starts_from=natural",
        "base_learners.linf.from_epoch=1",
        "base_learners.natural.until_epoch=2",
        "checkpoint.every_steps=5",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_ray_and_local_give_the_same_bits(tmp_path, small_run, kind):
    overrides = [*small_run, *KINDS[kind]]
    local = genray.train(None, overrides, runtime="local", storage=str(tmp_path / "local"))
    on_ray = genray.train(None, overrides, runtime="ray", storage=str(tmp_path / "ray"))

    for name in MODELS:
        ours, theirs = _weights(tmp_path / "local" / "digits", name), _weights(tmp_path / "ray" / "digits", name)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert local["models"] == on_ray["models"]
    ours, theirs = ((tmp_path / kind / "digits" / "metrics.jsonl").read_text() for kind in ("local", "ray"))
    assert timeless(ours) == timeless(theirs)
    assert timeless(ours)[-1]["redistributions"] > 3


def test_resumed_on_the_other_runtime(tmp_path, small_run):
    """A run that stopped goes on elsewhere and ends with the bits of the run that never stopped."""
    small_run = small_run + E_AT
    whole = genray.train(None, small_run, runtime="local", storage=str(tmp_path / "whole"))
    folder = tmp_path / "parts" / "digits"
    genray.train(None, small_run, runtime="local", storage=str(tmp_path / "parts"))
    states = sorted((folder / "checkpoints").iterdir())
    states[-1].unlink()  # as if killed right after the second epoch's checkpoint
    for name in (*MODELS, "results.json"):
        (folder / name).unlink()

    resumed = genray.train(None, small_run, runtime="ray", storage=str(tmp_path / "parts"), resume=True)

    assert resumed["models"] == whole["models"]
    for name in MODELS:
        ours, theirs = _weights(folder, name), _weights(tmp_path / "whole" / "digits", name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]


def test_resolved_config_gives_the_same_run_again(tmp_path, small_run):
    first = genray.train(None, small_run, runtime="local", storage=str(tmp_path / "first"))
    resolved = yaml.safe_load((tmp_path / "first" / "digits" / "config.yaml").read_text())
    assert resolved.pop("versions")["torch"] == metadata.version("torch")
    again = genray.train(resolved, runtime="local", storage=str(tmp_path / "again"))
    assert again["models"] == first["models"]


@pytest.fixture
def tiny_colour_folder(tmp_path):
    """40 training and 8 test images of 3x32x32 in two classes."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 4)):
        for label in ("dark", "light"):
            target = tmp_path / "images" / part / label
            target.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 128, (32, 32, 3)) + (128 if label == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_papers_configuration_starts_on_both_runtimes(tmp_path, tiny_colour_folder):
    """Four steps of the full ResNet-18 preset at batch 8."""
    overrides = [
        "data.source=image_folder",
        f"data.path={tiny_colour_folder}",
        "data.validation_examples=8",
        "training.epochs=1",
        "training.batch_size=8",
        "training.drop_last=true",
        "global_learner.warmup_epochs=0",
        "global_learner.sync_unit=step",
        "global_learner.sync_every=2",
        "evaluation.attack.num_steps=1",
        "base_learners.linf.attack.num_steps=1",
    ]
    config = ROOT / "configs/cifar10_resnet18_generalist.yaml"
    results = {}
    for runtime in ("local", "ray"):
        results[runtime] = genray.train(config, overrides, runtime=runtime, storage=str(tmp_path / runtime))
    name = "cifar10_resnet18_generalist"
    ours, theirs = (_weights(tmp_path / runtime / name, "model_last.pt") for runtime in ("local", "ray"))
    assert sum(v.numel() for k, v in ours.items() if "running" not in k and "num_batches" not in k) > 11_000_000
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    record = json.loads((tmp_path / "ray" / name / "metrics.jsonl").read_text())
    assert record["step"] == 4
    assert record["redistributions"] == 2
