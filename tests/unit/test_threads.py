"""Threads follow the size of the work: of an evaluation's blocks and of learners; afterwards torch has what it had."""

import pytest
import torch
from torch import nn

import genray
from genray.config import load_config
from genray.core.threads import threads_kept, work_threads
from genray.evaluation import job
from genray.models import build_model
from genray.models.flops import architecture_flops, forward_flops
from genray.run.devices import evaluation_threads, learner_threads

DIGITS = {"name": "small_cnn", "num_classes": 10, "in_channels": 1, "image_size": (8, 8), "width": None, "mean": None,
          "batch_norm": True, "std": None}  # fmt: skip
CIFAR = DIGITS | {"name": "resnet18", "in_channels": 3, "image_size": (32, 32), "batch_norm": False}


def test_flops_are_those_of_the_convolutions_and_products():
    """Two of a multiplication and an addition; ResNet-18 on 32 x 32 has 0.56 billion of those (He et al., 2016)."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    assert forward_flops(model, torch.rand(7, 2, 4, 4)) == 7 * 2 * (16 * 3 * 2 * 9 + 48 * 5)
    random = torch.get_rng_state()
    assert architecture_flops(CIFAR) == pytest.approx(2 * 0.556e9, rel=0.01)
    assert torch.equal(torch.get_rng_state(), random)
    assert forward_flops(lambda x: x.flatten(1), torch.rand(1, 2, 4, 4)) == float("inf")


@pytest.mark.parametrize("flops, most, threads", [(0, 8, 1), (1.9e9, 8, 1), (2e9, 8, 2), (1e12, 8, 8), (1e12, 1, 1)])
def test_a_thread_has_enough_to_do(flops, most, threads):
    assert work_threads(flops, most) == threads


@pytest.mark.parametrize("architecture, threads", [(DIGITS, 1), (CIFAR, 6)])
def test_learners_of_tiny_images_have_one_thread_whatever_they_may_have(architecture, threads):
    config = load_config(overrides=["base_learners.linf.resources.num_cpus=6.5"])
    assert learner_threads(config, architecture, "linf") == threads
    assert learner_threads(config, architecture, "natural") == 1
    assert evaluation_threads(config, architecture) == threads


@pytest.mark.slow
@pytest.mark.parametrize("side, size, expected", [(8, 200, {1}), (96, 30, {1, 2})])
def test_tasks_of_an_evaluation_have_as_many_threads_as_they_are_worth(side, size, expected, monkeypatch):
    shape = {"num_classes": 3, "in_channels": 1, "image_size": (side, side)}
    model, seen = build_model("small_cnn", **shape, seed=0).eval(), set()
    run_task = job.run_task

    def watched(task, *args):
        seen.add(torch.get_num_threads())
        return run_task(task, *args)

    monkeypatch.setattr(job, "run_task", watched)
    x = torch.rand((size + 1, 1, side, side), generator=torch.Generator().manual_seed(0))
    with threads_kept():
        torch.set_num_threads(2)
        genray.evaluate(model, x, torch.zeros(size + 1, dtype=torch.int64), attacks="natural", block_size=size)
        assert torch.get_num_threads() == 2
    assert seen <= expected and max(seen) == max(expected)
