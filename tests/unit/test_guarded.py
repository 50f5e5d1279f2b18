"""Networks with narrow strided 1 x 1 convolutions train on a CPU, where oneDNN's own gradient ends the process."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from genray.models.guarded import guard_weight_gradients


@pytest.mark.parametrize("stride", [2, (2, 1), 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_values_and_gradients_are_those_of_the_plain_convolution(stride, bias, size):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 1, stride=stride, bias=bias)
    x = torch.randn(2, 3, *size, requires_grad=True)
    weights = [parameter.double() for parameter in convolution.parameters()]
    expected = F.conv2d(x.double(), *weights, stride=stride)
    pull = torch.randn_like(expected)
    inputs = (x, *convolution.parameters())
    wanted = torch.autograd.grad((expected * pull).sum(), inputs)
    plain = convolution(x)
    (plain_gradient,) = torch.autograd.grad((plain * pull.float()).sum(), x)
    found = guard_weight_gradients(convolution)(x)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    gradients = torch.autograd.grad((found * pull.float()).sum(), inputs)
    assert torch.equal(found, plain) and torch.equal(gradients[0], plain_gradient)
    for mine, theirs in zip(gradients, wanted):
        assert torch.allclose(mine, theirs, atol=1e-5)


DIES_ALONE = """
import torch
from genray.models.guarded import guard_weight_gradients
torch.manual_seed(0)
for channels in (4, 8, 12):
    network = torch.nn.Conv2d(channels, 16, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
    guard_weight_gradients(network)
    x = torch.rand(2, channels, 64, 64).to(memory_format=torch.channels_last)
    for _ in range(5):
        network(x).sum().backward()
"""

# What `python -m genray.train --runtime local` and `python -m genray.evaluate` do, in one process.
TRAINS = """
import numpy, PIL.Image, pathlib, genray, torch
rng = numpy.random.default_rng(0)
for part in ("train", "test"):
    for label in "ab":
        folder = pathlib.Path(part, label)
        folder.mkdir(parents=True)
        for i in range(6):
            PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype="uint8")).save(folder / f"{i}.png")
overrides = ["data.source=image_folder", "data.path=.", "data.validation_examples=4", "model.name=resnet18",
             "model.width=8", "model.batch_norm=false", "model.mean=null", "model.std=null", "training.epochs=1",
             "training.batch_size=4", "base_learners.linf.attack.num_steps=1", "evaluation.attack.num_steps=1"]
genray.train(None, overrides, runtime="local", storage="runs")
from genray.data.datasets import load_image_data
test = load_image_data("image_folder", path=".").test
model = genray.load_model("runs/digits").to(memory_format=torch.channels_last)
genray.evaluate(model, test.images[:4], test.labels[:4], attacks="pgd20,fab_t", num_classes=2, engine="pyautoattack")
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [DIES_ALONE, TRAINS], ids=["a layer", "a run"])
def test_a_narrow_resnet_on_large_images_survives(code, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
