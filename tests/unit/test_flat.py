"""Aligned flat weights: where the views begin, what the padding holds, and what travels and is stored."""

import numpy as np
import pytest
import torch
from small_learners import small_network, through_a_file, unit_config
from torch import nn

from genray.core.flat import ALIGNMENT, FlatWeights, Layout
from genray.learners.base_learner import BaseLearner
from genray.models import MODELS, build_model
from genray.run.setup import prepare

SMALL = {"small_cnn": 2, "wrn_28_10": 1, "wrn_32_10": 1, "wrn_34_10": 1}


def network_of(name, classes):
    width, own = SMALL.get(name, 3), {"batch_norm": True} if name == "small_cnn" else {}
    return build_model(name, num_classes=classes, in_channels=3, image_size=(32, 32), width=width, **own)


def starts(views, base):
    return [view.data_ptr() - base.data_ptr() for view in views]


def begin_where_they_should(flat, tensors, owner):
    tensors = [tensor for tensor in tensors if tensor.numel()]  # an empty one is nowhere
    found = starts(tensors, owner)
    assert all(start % ALIGNMENT == 0 for start in found), found
    ends = [start + tensor.numel() * tensor.element_size() for start, tensor in zip(found, tensors)]
    assert found[0] == 0 and all(end <= start for end, start in zip(ends, found[1:]))
    assert ends[-1] <= owner.numel() * owner.element_size()


def padding(layout, flat):
    """The elements between the tensors."""
    mask = torch.ones(len(flat), dtype=torch.bool)
    for part in layout.parts(mask):
        part.fill_(False)
    assert int(mask.sum()) == len(flat) - layout.packed_size
    return flat.detach()[mask]


class Odd(nn.Module):
    """Tensors of odd sizes, a number, an empty one, a tied one and integer counters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 7), nn.Linear(7, 1)
        self.scale, self.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3))
        self.twin = self.first
        self.norms = nn.ModuleList(nn.BatchNorm1d(n) for n in (7, 1, 129))

    def forward(self, x):
        return self.second(self.norms[0](self.first(x))) * self.scale


# --- where the views begin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, "odd"])
def test_every_view_is_aligned(name):
    network = Odd() if name == "odd" else network_of(name, 11)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    flat = FlatWeights(network.to(memory_format=torch.channels_last), alignment=ALIGNMENT)
    trained, buffers = list(network.parameters()), list(network.buffers())
    floating = [b for b in buffers if b.dtype == torch.float32 and b.dim() == 1]  # not the constants of normalisation
    begin_where_they_should(flat, [*trained, *floating], flat.weights)
    begin_where_they_should(flat, [p.grad for p in trained], flat.parameter.grad)
    if integer := [b for b in buffers if b.dtype == torch.int64]:
        begin_where_they_should(flat, integer, flat.counters)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not padding(flat.layout, flat.weights).any() and len(padding(flat.layout, flat.weights)) > 0


@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_classes_is_aligned(name):
    """Sizes are linear in the number of classes, which networks of 2, 3 and 1000 classes show."""

    def sizes(classes):
        network = network_of(name, classes)
        return [t.numel() for t in [*network.parameters(), *(b for b in network.buffers() if b.dim() == 1)]]

    two, three = sizes(2), sizes(3)
    for classes in range(2, 1001):
        each = tuple(a + (classes - 2) * (b - a) for a, b in zip(two, three, strict=True))
        offsets = Layout(each, ALIGNMENT // 4).offsets
        assert all(offset * 4 % ALIGNMENT == 0 for offset in offsets)
        assert all(0 <= b - a - size < ALIGNMENT // 4 for a, b, size in zip(offsets, offsets[1:], each))
    assert list(each) == sizes(1000)


def test_packing_and_unpacking_undo_each_other():
    layout = Layout((3, 0, 64, 65, 1), 64)
    assert layout.offsets == (0, 64, 64, 128, 256, 320) and layout.packed_size == 133
    packed = torch.arange(1.0, 134.0)
    flat = torch.zeros(320)
    layout.unpack_(flat, packed)
    assert flat[:4].tolist() == [1, 2, 3, 0] and flat[64] == 4 and flat[128] == 68 and flat[192] == 132
    assert flat[193:256].eq(0).all() and flat[256] == 133 and flat[257:].eq(0).all()
    assert torch.equal(layout.pack(flat), packed)


def test_without_padding_nothing_is_copied_unless_asked():
    layout, flat = Layout((3, 4), 1), torch.rand(7)
    assert layout.pack(flat, copy=False) is flat
    assert layout.pack(flat) is not flat and torch.equal(layout.pack(flat), flat)


# --- a learner with aligned weights ---------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "clipped": {"name": "sgd", "momentum": 0.9, "clip_norm": 0.1, "decay_norms_and_biases": False},
    "adam": {"name": "adam", "weight_decay": 5e-4},
    "adamw": {"name": "adamw", "weight_decay": 0.1, "decay_norms_and_biases": False},
}


def make_learner(optimizer):
    learner = {
        "objective": "adversarial",
        "attack": {"norm": "linf", "epsilon": 0.1, "step_size": 0.05, "num_steps": 2},
        "optimizer": OPTIMIZERS[optimizer],
        "lr": 0.01,
        "awp": {"gamma": 0.01, "warmup_epochs": 0},
        "averaging": {"decay": 0.5},
    }
    setup = prepare(unit_config({"linf": learner}))
    return BaseLearner("linf", setup.plan, small_network(), setup.splits["train"])


def arrays(state):
    return {"optimizer": 0, **state} | {f"optimizer.{key}": value for key, value in state["optimizer"].items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_padding_stays_zero_and_changes_nothing(monkeypatch, optimizer):
    dense = make_learner(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr("genray.core.flat.alignment_on", lambda device: ALIGNMENT)
        padded = make_learner(optimizer)
    for learner in (dense, padded):
        learner.run_window(0, 2)
        learner.load_global(learner.contribution())
        learner.run_window(2, 4)
    flat = padded.flat
    assert len(flat.weights) > len(dense.flat.weights) and len(flat.counters) == 4 * ALIGNMENT // 8
    moments = [v for v in padded.optimizer.optimizer.state_dict()["state"][0].values() if v is not None and v.dim()]
    assert moments and all(not padding(flat.trained_layout, moment).any() for moment in moments)
    assert not padding(flat.trained_layout, flat.parameter.grad).any()
    assert not any(padding(flat.layout, values).any() for values in (flat.weights, padded.average, padded.share))
    assert not padding(flat.counter_layout, flat.counters).any()
    theirs, ours = arrays(dense.state_dict()), arrays(padded.state_dict())
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        if isinstance(value, np.ndarray):  # fused SGD rounds what is left over after the last whole vector otherwise
            assert ours[key].shape == value.shape and np.allclose(ours[key], value, rtol=1e-4, atol=1e-5), key
    assert np.abs(theirs["weights"] - padded.flat.snapshot(0).weights).max() < 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_of_one_layout_is_loaded_into_the_other(monkeypatch, optimizer):
    dense, again = make_learner(optimizer), make_learner(optimizer)
    monkeypatch.setattr("genray.core.flat.alignment_on", lambda device: ALIGNMENT)
    padded = make_learner(optimizer)
    dense.run_window(0, 3)
    state = through_a_file(dense.state_dict())
    padded.load_state_dict(state)
    back = through_a_file(padded.state_dict())
    again.load_state_dict(back)
    first, last = arrays(dense.state_dict()), arrays(again.state_dict())
    for key, value in first.items():
        assert np.array_equal(value, last[key]) if isinstance(value, np.ndarray) else True, key
    assert first["step"] == last["step"] == 3
    assert not any(padding(padded.flat.layout, v).any() for v in (padded.flat.weights, padded.average, padded.share))
    for learner in (dense, padded):
        learner.run_window(3, 4)
    assert np.allclose(dense.contribution().weights, padded.contribution().weights, rtol=1e-4, atol=1e-5)
