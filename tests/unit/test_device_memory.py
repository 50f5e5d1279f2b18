"""What learners take of a device's memory: the estimate against what they hold, and the lines where it is too much."""

import gc
from types import SimpleNamespace

import pytest
import torch
from small_learners import unit_config
from torch import nn

from genray.core import allocator
from genray.errors import LearnerError, PlacementError
from genray.learners.base_learner import BaseLearner
from genray.run import device_memory
from genray.run.device_memory import check_device_memory, learner_memory, memory_line, naming_memory
from genray.run.setup import prepare

ATTACK = {"norm": "linf", "epsilon": 0.1, "step_size": 0.05, "num_steps": 2}
LEARNERS = {
    "natural": {"objective": "natural", "optimizer": {"name": "sgd", "momentum": 0.9}},
    "plain": {"objective": "natural", "optimizer": {"name": "sgd", "momentum": 0}},
    "adam": {"objective": "natural", "optimizer": {"name": "adam"}},
    "linf": {"objective": "adversarial", "attack": ATTACK},
    "awp": {"objective": {"name": "trades", "beta": 6}, "attack": ATTACK, "awp": {"gamma": 0.01, "warmup_epochs": 0}},
}


def setup_of(*names, **sections):
    mixing = {"mixing_weights": {name: 1 / len(names) for name in names}}
    chosen = {name: {"lr": 0.01, **LEARNERS[name]} for name in names}
    evaluation = {"attack": {key: ATTACK[key] for key in ("norm", "epsilon", "step_size")}}
    return prepare(unit_config(chosen, global_learner=mixing, evaluation=evaluation, **sections))


def held():
    """Bytes of all tensors of 1000 numbers and more: of BatchNorms and activations of this network there are none."""
    gc.collect()
    found = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    tensors = [tensor for tensor in found if tensor.layout == torch.strided and tensor.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(number for number in storages.values() if number >= 4000)


@pytest.mark.parametrize("name", LEARNERS)
def test_flat_copies_are_those_a_learner_holds(name):
    setup = setup_of(name)
    before = held()
    learner = BaseLearner(name, setup.plan, setup.build_network(), setup.splits["train"])
    learner.run_window(0, 2)
    copies = (held() - before) / setup.weight_bytes
    expected = device_memory.flat_copies(setup.config.base_learners[name]) - (name == "awp")  # its change is gone again
    shared = 0.6 if "attack" in LEARNERS[name] else 0.0  # linear layers, in the attacked copy
    assert copies == pytest.approx(expected - shared, abs=0.1)
    assert learner.step == 2


def test_activations_of_a_network_by_hand():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    compute = setup_of("natural").config.compute
    setup = SimpleNamespace(
        build_network=lambda: network,
        architecture={"in_channels": 1, "image_size": (8, 8)},
        config=SimpleNamespace(compute=compute),
    )
    assert device_memory.activation_bytes(setup) == 4 * (64 + 32)  # the inputs of both layers; ReLU's output is one


def test_estimate_follows_batch_workers_and_precision():
    setup, double = setup_of("natural", "awp"), setup_of("natural", "awp", training={"epochs": 3, "batch_size": 64})
    needs, larger = (learner_memory(one, {"natural": 1, "awp": 1}) for one in (setup, double))
    assert larger["natural"].activations == pytest.approx(2 * needs["natural"].activations, rel=0.01)
    assert needs["awp"].activations == 2 * needs["natural"].activations  # TRADES: the clean and the adversarial batch
    assert learner_memory(double, {"natural": 2})["natural"].activations == needs["natural"].activations
    assert needs["natural"].images == setup.splits["train"].images.numel()
    assert needs["natural"].weights == 5 * setup.weight_bytes
    rounded = learner_memory(setup_of("natural", compute={"precision": "bf16"}), {"natural": 1})["natural"]
    assert rounded.activations < 0.7 * needs["natural"].activations
    assert f"natural {needs['natural']}; awp {needs['awp']}" in memory_line(setup)


def test_too_little_memory_is_one_line(monkeypatch):
    setup = setup_of("natural", "linf")
    needed = learner_memory(setup, {"natural": 1, "linf": 1})
    both = needed["natural"].total + needed["linf"].total - needed["natural"].images  # one copy of the images
    monkeypatch.setattr(device_memory, "free_on", lambda device: both)
    check_device_memory(setup, {"natural": 1, "linf": 1}, "cuda:0")
    check_device_memory(setup, {"natural": 1, "linf": 1}, "cpu")
    monkeypatch.setattr(device_memory, "free_on", lambda device: both - 1)
    with pytest.raises(PlacementError) as caught:
        check_device_memory(setup, {"natural": 1, "linf": 1}, "cuda:0")
    line = str(caught.value)
    assert line.startswith("base_learners.natural and base_learners.linf: expected at most the ") and "\n" not in line
    assert f"that cuda:0 has free, needs at least natural {needed['natural']}; linf {needed['linf']}; lower " in line
    assert line.endswith("training.batch_size (32) or set data.home: mapped or set compute.precision: bf16")


def test_a_share_of_a_device_is_checked(monkeypatch):
    setup = setup_of("natural")
    total = learner_memory(setup, {"natural": 1})["natural"].total
    monkeypatch.setattr(device_memory, "free_on", lambda device: 10 * total)
    properties = SimpleNamespace(total_memory=10 * total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    check_device_memory(setup, {"natural": 1}, "cuda:0", 0.11)
    with pytest.raises(PlacementError, match="expected at most the"):
        check_device_memory(setup, {"natural": 1}, "cuda:0", 0.09)


def test_a_full_device_is_one_line_about_the_learner():
    setup = setup_of("linf")
    with pytest.raises(LearnerError) as caught, naming_memory(setup, "linf"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has a total capacity of ...")
    line = str(caught.value)
    assert line.startswith("base_learners.linf: the memory of its device is full, needs at least linf ")
    assert "\n" not in line and "lower training.batch_size (32)" in line
    with pytest.raises(ValueError, match="another"), naming_memory(setup, "linf"):
        raise ValueError("another")


@pytest.fixture
def limits(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: found.append(args))
    monkeypatch.setattr(allocator, "os", SimpleNamespace(environ={}))
    return found


def test_shares_of_a_gpu_are_limited(limits):
    for device, share in (("cpu", 0.5), ("cuda:0", 1.0), ("cuda:0", 2.0)):
        allocator.share_gpu(device, share)
    assert not limits and not allocator.os.environ
    allocator.share_gpu("cuda:0", 0.45)
    assert limits == [(0.45, "cuda:0")]
    assert allocator.os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_for_the_allocator_stays(limits, name):
    allocator.os.environ[name] = "max_split_size_mb:64"
    allocator.share_gpu("cuda:0", 0.45)
    assert allocator.os.environ == {name: "max_split_size_mb:64"} and limits


def test_mapped_images_are_not_counted(tmp_path):
    setup = setup_of("natural", data={"source": "digits", "home": "mapped", "cache": str(tmp_path)})
    assert learner_memory(setup, {"natural": 1})["natural"].images == 0
