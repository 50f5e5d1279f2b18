"""Files as each producer writes them, made here, must all load and give the logits of the network they came from."""

import argparse
import itertools
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_models import build, randomised
from torch import nn

from genray.errors import CheckpointError, ConfigError
from genray.interop.checkpoint_layouts import load_into, open_checkpoint, read_metadata
from genray.models import CIFAR10_MEAN, CIFAR10_STD, MODELS
from genray.models.fit import fitting_architectures

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
RST_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
OTHER_STATISTICS = ((0.5, 0.4, 0.3), (0.3, 0.2, 0.25))


def source(name):
    return randomised(build(name)).eval()


def logits(model, statistics=None):
    images = IMAGES
    if statistics:
        mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
        images = (images - mean) / std
    with torch.no_grad():
        return model.eval()(images)


def prefixed(state, prefix):
    return OrderedDict((prefix + key, value) for key, value in state.items())


def with_sub_block(state):
    """The unused first group that TRADES, MART, RST, FAT and Generalist files carry."""
    extra = {"sub_" + key: value + 1 for key, value in state.items() if key.startswith("block1.")}
    return OrderedDict(state) | extra


def buffers(mean_name, std_name, statistics, shape=(1, 3, 1, 1)):
    return {key: torch.tensor(v).view(shape) for key, v in zip((mean_name, std_name), statistics, strict=True)}


def without_counters(state):
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


# producer -> (architecture, what its file holds, statistics that the file itself brings)
LAYOUTS = {
    "generalist": ("wrn_32_10", lambda s: prefixed(with_sub_block(s), "module."), None),
    "generalist_preact": ("preact_resnet18_no_bn", lambda s: prefixed(s, "module."), None),
    "trades": ("wrn_34_10", with_sub_block, None),
    "trades_mnist": ("small_cnn", lambda s: s, None),
    "mart": ("resnet18", lambda s: s, None),
    "fat": (
        "wrn_34_10",
        lambda s: {
            "epoch": 120,
            "state_dict": prefixed(with_sub_block(s), "module."),
            "test_nat_acc": 0.89,
            "test_pgd20_acc": np.float64(0.46),
            "optimizer": {"state": {0: {"buf": torch.ones(2)}}, "param_groups": [{}]},
        },
        None,
    ),
    "rst_normalised": (
        "wrn_28_10",
        lambda s: {
            "num_classes": 10,
            "normalize_input": True,
            "state_dict": prefixed(
                buffers("0.mean", "0.std", RST_STATISTICS) | prefixed(with_sub_block(s), "1."), "module."
            ),
        },
        RST_STATISTICS,
    ),
    "rst_flag_alone": (
        "wrn_28_10",
        lambda s: {"num_classes": 10, "state_dict": prefixed(s, "module."), "normalize_input": True},
        RST_STATISTICS,
    ),
    "rice_epoch": ("preact_resnet18", lambda s: prefixed(s, "module."), None),
    "rice_best": (
        "preact_resnet18",
        lambda s: {
            "state_dict": prefixed(s, "module."),
            "test_robust_acc": np.float32(0.53),
            "test_loss": np.arange(3.0),
            "args": argparse.Namespace(lr=0.1),
        },
        None,
    ),
    "tmllib": (
        "preact_resnet18",
        lambda s: {
            "epoch": 3,
            "model_ST_state_dict": {key: value * 0 for key, value in s.items()},
            "model_state_dict": s,
            "optimizer_state_dict": {"state": {}},
            "perf": 0.5,
        },
        None,
    ),
    "robustbench_bare": ("preact_resnet18", lambda s: prefixed(s, "model."), None),
    "robustbench_mu": (
        "wrn_34_10",
        lambda s: {"state_dict": prefixed(s, "module.") | buffers("module.mu", "module.sigma", OTHER_STATISTICS)},
        OTHER_STATISTICS,
    ),
    "robustbench_mean": (
        "resnet18",
        lambda s: s | buffers("mean", "std", OTHER_STATISTICS, (3, 1, 1)),
        OTHER_STATISTICS,
    ),
    "robustbench_layer": (
        "resnet18",
        lambda s: buffers("normalize.mean", "normalize.std", OTHER_STATISTICS) | prefixed(s, "model."),
        OTHER_STATISTICS,
    ),
    "mair": (
        "resnet18",
        lambda s: {
            "rmodel": prefixed(s, "model.")
            | {"n_classes": torch.tensor(10)}
            | buffers("mean", "std", OTHER_STATISTICS, (3,)),  # notes only, MAIR never applies them
            "record_info": {"Epoch": 5},
        },
        None,
    ),
    "mair_normalised": (
        "resnet18",
        lambda s: {
            "rmodel": prefixed(s, "model.1.")
            | {"n_classes": torch.tensor(10)}
            | buffers("model.0.mean", "model.0.std", OTHER_STATISTICS, (3,))
        },
        OTHER_STATISTICS,
    ),
    "genray": (
        "resnet18",
        lambda s: {"format": "genray-model/1", "state_dict": s, "metadata": {"model": "resnet18", "seed": 1}},
        None,
    ),
    "genray_normalised": (
        "resnet18",
        lambda s: {
            "format": "genray-model/1",
            "state_dict": s,
            "metadata": {"architecture": {"mean": list(OTHER_STATISTICS[0]), "std": list(OTHER_STATISTICS[1])}},
        },
        OTHER_STATISTICS,
    ),
    "compiled": ("resnet18", lambda s: prefixed(s, "_orig_mod."), None),
    "compiled_blocks": (
        "resnet18",
        lambda s: {"module." + key.replace("layer2.", "layer2._orig_mod."): value for key, value in s.items()},
        None,
    ),
    "deep": ("wrn_28_10", lambda s: prefixed(with_sub_block(s), "student.model.module._orig_mod.backbone."), None),
    "lightning": (
        "preact_resnet18",
        lambda s: {
            "pytorch-lightning_version": "2.4",
            "state_dict": prefixed(s, "net."),
            "hyper_parameters": {"lr": 1},
        },
        None,
    ),
    "averaged_model": (
        "resnet18",
        lambda s: {"swa": prefixed(s, "module.") | {"n_averaged": torch.tensor(7)}, "metrics": {"acc": torch.ones(2)}},
        None,
    ),
    "other_layer_name": (
        "resnet18",
        lambda s: prefixed(
            buffers("preprocess._mean", "preprocess._std", OTHER_STATISTICS) | prefixed(s, "classifier."), "module."
        ),
        OTHER_STATISTICS,
    ),
    "before_torch_0_4_1": ("resnet18", without_counters, None),
    "pickled_parameters": (
        "resnet18",
        lambda s: {key: nn.Parameter(value) if "weight" in key else value for key, value in s.items()},
        None,
    ),
}


@pytest.mark.parametrize(("producer", "old_format"), list(zip(LAYOUTS, itertools.cycle((False, True)))))
def test_every_layout_loads_and_gives_the_same_logits(producer, old_format, tmp_path):
    name, content, statistics = LAYOUTS[producer]
    original = source(name)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content(original.state_dict()), path, _use_new_zipfile_serialization=not old_format)
    model = build(name, seed=9)
    assert (logits(model) - logits(original)).abs().max() > 1e-3  # so that a load which does nothing is seen
    model.train()
    load_into(model, path)
    assert model.training
    torch.testing.assert_close(logits(model), logits(original, statistics), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(original.state_dict())
    expected = "wrn_34_10" if name == "wrn_32_10" else name
    assert expected in fitting_architectures(open_checkpoint(path).state)


def test_state_dict_in_memory_loads_without_being_changed():
    original = source("wrn_28_10")
    state = prefixed(with_sub_block(original.state_dict()), "module.")
    names = list(state)
    model = build("wrn_28_10", seed=9)
    load_into(model, state)
    torch.testing.assert_close(logits(model), logits(original))
    assert list(state) == names
    original.conv1.weight.data.zero_()
    assert model.conv1.weight.any()  # a copy, not a view of the source


def test_what_a_file_holds_loads_again_with_its_normalisation(tmp_path):
    original = source("resnet18")
    torch.save({"state_dict": original.state_dict(), "normalize_input": True}, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt")
    state = found.state | found.statistics
    assert state["normalize.mean"].shape == state["normalize.std"].shape == (3,)
    model = build("resnet18", seed=9)
    load_into(model, state)
    torch.testing.assert_close(logits(model), logits(original, RST_STATISTICS))


@pytest.mark.parametrize(
    ("normalize", "statistics"),
    [
        ("cifar10", (CIFAR10_MEAN, CIFAR10_STD)),
        (OTHER_STATISTICS, OTHER_STATISTICS),
        ("none", None),
        (None, RST_STATISTICS),
    ],
)
def test_explicit_normalisation_overrules_the_file(normalize, statistics, tmp_path):
    original = source("preact_resnet18")
    torch.save({"state_dict": original.state_dict(), "normalize_input": True}, tmp_path / "a.pt")
    model = build("preact_resnet18", seed=9)
    load_into(model, tmp_path / "a.pt", normalize=normalize)
    torch.testing.assert_close(logits(model), logits(original, statistics))


def test_model_keeps_its_own_normalisation_when_the_file_is_silent():
    original, model = source("resnet18"), build("resnet18", mean=OTHER_STATISTICS[0], std=OTHER_STATISTICS[1])
    load_into(model, original.state_dict())
    torch.testing.assert_close(logits(model), logits(original, OTHER_STATISTICS))
    load_into(model, original.state_dict(), normalize="none")
    torch.testing.assert_close(logits(model), logits(original))


def test_disagreeing_normalisation_is_refused_and_nothing_changes():
    model = build("resnet18", mean=OTHER_STATISTICS[0], std=OTHER_STATISTICS[1])
    before = logits(model)
    state = source("resnet18").state_dict() | buffers("mean", "std", RST_STATISTICS)
    with pytest.raises(CheckpointError, match="the model was built with .* pass normalize="):
        load_into(model, state)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("bad", ["imagenet", (0.5,), ([0.5], [0.2], [0.1])])
def test_unknown_normalisation_is_a_configuration_error(bad):
    with pytest.raises(ConfigError, match='expected "cifar10", "cifar100", "none" or'):
        load_into(build("resnet18"), source("resnet18").state_dict(), normalize=bad)


def test_genray_metadata(tmp_path):
    metadata = {"model": "resnet18", "width": 4, "seed": 1}
    state = source("resnet18").state_dict()
    torch.save({"format": "genray-model/1", "state_dict": state, "metadata": metadata}, tmp_path / "a.pt")
    torch.save({"state_dict": state, "metadata": metadata}, tmp_path / "b.pt")
    assert read_metadata(tmp_path / "a.pt") == metadata
    assert read_metadata(tmp_path / "b.pt") == {}


def test_prefix_is_stripped_only_where_every_key_has_it():
    state = source("resnet18").state_dict()
    state["module.linear.bias"] = state.pop("linear.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(linear.bias\), 1 unexpected \(module.linear.bias\)"):
        load_into(build("resnet18"), state)


@pytest.mark.parametrize("part", [None, "ema_state_dict", "model_state_dict"])
def test_of_several_weights_one_is_taken_and_the_others_are_named(part, tmp_path):
    """Raw weights, their average and an optimiser's tensors in one file."""
    raw, average = source("resnet18"), randomised(build("resnet18"), seed=2).eval()
    content = {
        "ema_state_dict": prefixed(average.state_dict(), "module."),
        "model_state_dict": raw.state_dict(),
        "optimizer": {"exp_avg": torch.ones(3, 3)},
        "same": dict(raw.state_dict()),
    }
    torch.save(content, tmp_path / "model.pt")
    model = build("resnet18", seed=9)
    load_into(model, tmp_path / "model.pt", part=part, normalize="none")
    torch.testing.assert_close(logits(model), logits(average if part == "ema_state_dict" else raw))
    says = "several weights of one network: model_state_dict was taken, not ema_state_dict; --weights NAME decides"
    assert [says in finding for finding in model.origin.findings] == ([True] if part is None else [])


def test_one_of_two_networks_in_a_state_dict_is_taken_by_its_prefix(tmp_path):
    teacher, student = source("wrn_28_10"), source("resnet18")
    state = prefixed(teacher.state_dict(), "teacher.") | prefixed(student.state_dict(), "student.")
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    assert fitting_architectures(open_checkpoint(tmp_path / "model.pt").state) == []
    model = build("resnet18", seed=9)
    load_into(model, tmp_path / "model.pt", part="student")
    torch.testing.assert_close(logits(model), logits(student))
    with pytest.raises(CheckpointError, match="holds no weights called pupil, but state_dict"):
        open_checkpoint(tmp_path / "model.pt", "pupil")


@pytest.mark.parametrize("wrap", ["nn.Sequential", "bare"])
def test_a_file_that_is_silent_about_normalisation_is_a_finding(wrap):
    """In nn.Sequential(normalising layer, network) that layer may leave nothing in the state dict."""
    state = prefixed(source("resnet18").state_dict(), "1." if wrap == "nn.Sequential" else "")
    for normalize, found in ((None, 1), ("none", 0), ("cifar100", 0)):
        model = build("resnet18", seed=9)
        load_into(model, state, normalize=normalize)
        assert ["how the network's input is normalised" in text for text in model.origin.findings] == [True] * found
    torch.testing.assert_close(logits(model), logits(source("resnet18"), CIFAR100_STATISTICS))
    for stated in ({"normalize_input": False}, {"normalize_input": True}):
        model = build("resnet18", seed=9)
        load_into(model, {"state_dict": state, **stated})
        assert model.origin.findings == ()


def test_sub_block1_is_unexpected_outside_wide_resnets():
    state = source("resnet18").state_dict() | {"sub_block1.x": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"1 unexpected \(sub_block1.x\)"):
        load_into(build("resnet18"), state)


# ---- files that must be refused, each with one readable line


class Hostile:
    """Would create a file if it were ever unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def refusal(path, model=None):
    with pytest.raises(CheckpointError) as caught:
        load_into(model or build("resnet18"), path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_damage_anywhere_near_the_start_is_one_readable_line(old_format, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(source("small_cnn").state_dict(), path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    for position in range(1, 2000, 53):
        path.write_bytes(whole[:position])
        refusal(path, build("small_cnn"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_torch_file_is_refused_and_never_run(protocol, tmp_path):
    path, target = tmp_path / "model.pt", tmp_path / "touched"
    state = source("resnet18").state_dict() | {"evil": Hostile(target)}
    torch.save({"state_dict": state}, path, pickle_protocol=protocol)
    assert "contains code or objects other than tensors" in refusal(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the file does bite where it is trusted
    assert target.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_plain_pickle_is_refused_and_never_run(protocol, tmp_path):
    path, target = tmp_path / "model.pt", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"state_dict": Hostile(target)}, protocol))
    # Protocol 0 is plain text, which no version of torch.save has written.
    expected = "is not a PyTorch model file" if protocol == 0 else "contains code or objects other than tensors"
    assert expected in refusal(path)
    assert not target.exists()


def test_mismatch_names_the_first_of_each_kind_and_what_would_fit(tmp_path):
    torch.save(prefixed(build("preact_resnet18", num_classes=100).state_dict(), "module."), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert "missing (bn1.weight, bn1.bias, bn1.running_mean and 13 more)" in message
    assert "unexpected (bn.weight, bn.bias, bn.running_mean and 2 more)" in message
    assert "layer2.0.bn1.weight (4,) instead of (8,)" in message
    assert "it fits preact_resnet18 or preact_resnet18_softplus (width 4, 3 input channels, 100 classes)" in message


def test_mismatch_changes_nothing():
    model = build("resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="no architecture known to genray fits it"):
        load_into(model, source("resnet18").state_dict() | {"linear.bias": torch.ones(3)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.bias": torch.full((10,), float("nan"))}, "linear.bias holds NaN"),
        ({"linear.bias": torch.ones(10).to_sparse()}, "linear.bias is not an ordinary dense tensor"),
        ({"linear.bias": torch.ones(10, device="meta")}, "linear.bias is not an ordinary dense tensor"),
        (buffers("mean", "std", ((0.5, 0.5), (0.2, 0.2)), (2,)), "normalises 2 channels, the model takes 3"),
        (buffers("mean", "std", ((0.5,) * 3, (0.0,) * 3), (3,)), "positive stds"),
        ({"mean": torch.ones(3)}, "normalize.mean but not the other half"),
        (buffers("mean", "std", ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))), r"not on the pixel scale \[0, 1\]"),
    ],
)
def test_unusable_values(change, message):
    with pytest.raises(CheckpointError, match=message):
        load_into(build("resnet18"), source("resnet18").state_dict() | change)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_guess_finds_each_architecture_at_any_width(name, shape):
    expected = "wrn_34_10" if name == "wrn_32_10" else name
    state = build(name, shape=shape, width=3, num_classes=7).state_dict()
    fitting = fitting_architectures(state)
    assert expected in fitting and fitting_architectures(without_counters(state)) == fitting
    # Those that no tensor tells apart: the two PreActResNet-18 with a BatchNorm before the classifier, the two without.
    assert len(fitting) == (2 if name.startswith("preact") else 1)


def test_guess_knows_small_cnn_with_batch_norm_and_refuses_near_misses():
    assert fitting_architectures(build("small_cnn", batch_norm=True).state_dict()) == ["small_cnn"]
    deeper = build("resnet18").state_dict() | {"layer1.2.conv1.weight": torch.ones(4, 4, 3, 3)}
    assert fitting_architectures(deeper) == []
    assert fitting_architectures({"linear.weight": torch.ones(2, 2)}) == []


def test_public_checkpoint_of_the_autoattack_package_loads():
    package = pytest.importorskip("pyautoattack")
    path = Path(package.__file__).parent / "examples" / "model_test.pt"
    if not path.exists():
        pytest.skip("the installed pyautoattack has no example checkpoint")
    state = open_checkpoint(path).state
    assert fitting_architectures(state) == ["resnet18"]
    model = build("resnet18", width=None)
    load_into(model, path)
    assert logits(model).argmax(1).shape == (2,)
    assert torch.equal(model.linear.bias, state["linear.bias"])
