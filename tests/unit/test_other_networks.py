"""Networks of timm, torchvision and a user's package: trained, resumed, attacked, saved and loaded like our own."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import genray
from genray.cli.parser import run_command
from genray.cli.train import main, parse_args
from genray.config import load_config
from genray.core import user_code
from genray.core.flat import FlatWeights
from genray.errors import CheckpointError, ConfigError, RunFolderError
from genray.evaluation.suite import COLUMNS
from genray.models import build_model
from genray.models.attack_copy import AttackCopy
from genray.parallel.whole_batch import per_process_layers
from genray.run.setup import prepare

OWN = """
    import torch
    import torch.nn.functional as F
    from torch import nn


    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x):
            y = self.conv(F.silu(self.norm(x)))
            if self.training:  # stochastic depth and dropout that no module shows
                y = F.dropout(y * (torch.rand(len(x), 1, 1, 1) > 0.2) / 0.8, 0.1)
            return x + y


    class Answer:
        def __init__(self, logits):
            self.logits = logits


    class Net(nn.Module):
        def __init__(self, num_classes, in_channels, width=4, answers=False):
            super().__init__()
            self.answers = answers
            self.stem = nn.Conv2d(in_channels, width, 3, stride=2)
            self.first, self.second = Block(width), Block(width)
            self.second.conv.weight = self.first.conv.weight
            self.head = nn.Linear(width, num_classes)
            self.extra = nn.Linear(2, 2)
            self.stem.requires_grad_(False)

        def forward(self, x):
            logits = self.head(self.second(self.first(self.stem(x))).mean((2, 3)))
            return Answer(logits) if self.answers else logits


    def wrong(num_classes):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 1))


    def nothing():
        return 3


    def leaves():
        raise SystemExit(3)


    class Unfit(nn.Module):
        def __init__(self, num_classes, what):
            super().__init__()
            self.what, self.only = what, nn.Linear(3 * 32 * 32, num_classes)
            self.norm = nn.BatchNorm1d(num_classes)
            self.to(torch.float64 if what == "float64" else torch.float32)

        def forward(self, x):
            logits = self.norm(self.only(x.to(self.only.weight.dtype).flatten(1)))
            logits = logits.detach() if self.what == "detached" else logits
            if self.what == "nan" or (self.what == "train nan" and self.training):
                logits = logits * float("nan")
            return (logits, x) if self.what == "tuple" and self.training else logits


    def only(num_classes):
        return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes)))
"""
CASES = {  # model.name -> model.options
    "timm:vit_tiny_patch16_224": {"patch_size": 8, "depth": 2, "drop_path_rate": 0.3, "embed_dim": 24},
    "timm:convnext_atto": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "drop_path_rate": 0.3},
    "torchvision:mobilenet_v3_small": None,
    "own_networks:Net": {"width": 6},
}
SMALL = [
    "training.epochs=2", "training.batch_size=10", "data.validation_examples=10", "evaluation.attack.num_steps=2",
    "base_learners.linf.attack.num_steps=2", "global_learner.warmup_epochs=0", "global_learner.sync_unit=step",
    "global_learner.sync_every=3", "checkpoint.every_steps=3", "model.batch_norm=false", "model.width=null",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_networks(tmp_path_factory):
    """A package of the user's, in a folder of the path."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "own_networks.py").write_text(textwrap.dedent(OWN))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name in ("Net", "f", "nothing", "only", "wrong"):
            user_code.allow_import(f"own_networks:{name}")
        yield folder
    user_code._allowed.clear()
    sys.modules.pop("own_networks", None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 90 images of 32 x 32 pixels in three classes that their colour tells apart."""
    folder, numbers = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 10)):
        for label in range(3):
            (folder / part / "abc"[label]).mkdir(parents=True)
            for i in range(count):
                pixels = numbers.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / part / "abc"[label] / f"{i}.png")
    return [f"data={{source: image_folder, path: {folder}, validation_examples: 10}}"]


def overrides_of(name, images):
    return [*images, *SMALL, {"model": {"name": name, "options": CASES[name]}}]


def states(folder):
    files = [torch.load(folder / name, weights_only=True) for name in ("model.pt", "learners/linf.pt")]
    return [{key: value.clone() for key, value in file["state_dict"].items()} for file in files]


def equal(ours, theirs):
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs) for key in a]
    return all(torch.equal(a, b) for a, b in pairs)


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_trained_resumed_attacked_and_loaded(name, images, tmp_path):
    overrides = [*overrides_of(name, images), "data.train_examples=40", "data.test_examples=9"]
    genray.train(None, overrides, runtime="local", storage=str(tmp_path / "whole"))

    def stop(record):
        raise Stopped

    with pytest.raises(Stopped):
        genray.train(None, overrides, runtime="local", storage=str(tmp_path / "parts"), on_epoch=stop)
    genray.train(None, overrides, runtime="local", storage=str(tmp_path / "parts"), resume=True)
    assert equal(states(tmp_path / "whole/digits"), states(tmp_path / "parts/digits"))

    model = genray.load_model(tmp_path / "whole/digits", trust=True)
    x = torch.rand(2, 3, 32, 32)
    columns = COLUMNS if name.startswith("own") else ("pgd20", "apgd_ce")  # thousands of passes
    record = genray.evaluate(model, x, torch.tensor([0, 1]), attacks=columns, epsilon=0.02, engine="genray")
    assert set(record["norms"]["linf"]["columns"]) >= set(columns)
    genray.export(tmp_path / "whole/digits", "onnx")
    assert (tmp_path / "whole/digits/model.onnx").is_file()


@pytest.mark.ray
def test_both_runtimes_give_the_same_bits(images, tmp_path, no_ray):
    """Of a package of the user's, which a private Ray is sent; its dropout and depth are random."""
    name = "own_networks:Net"
    for runtime in ("local", "ray"):
        genray.train(None, overrides_of(name, images), runtime=runtime, storage=str(tmp_path / runtime))
    assert equal(states(tmp_path / "local/digits"), states(tmp_path / "ray/digits"))


@pytest.mark.ray
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("own")])
def test_both_runtimes_give_the_same_bits_for_networks_of_libraries(name, images, tmp_path, on_ray):
    overrides = [*overrides_of(name, images), "training.epochs=1", "data.train_examples=40", "data.test_examples=9"]
    for runtime in ("local", "ray"):
        genray.train(None, overrides, runtime=runtime, storage=str(tmp_path / runtime))
    assert equal(states(tmp_path / "local/digits"), states(tmp_path / "ray/digits"))


@pytest.mark.slow
def test_a_file_alone_imports_nothing(images, tmp_path, own_networks):
    """A fresh process, which nobody has told to import the factory."""
    genray.train(None, overrides_of("own_networks:Net", images), runtime="local", storage=str(tmp_path))
    line = [sys.executable, "-m", "genray.evaluate", str(tmp_path / "digits"), "--attacks", "natural"]
    path = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{own_networks}"}
    done = [
        subprocess.run([*line, *more], env=path, capture_output=True, text=True, cwd=tmp_path)
        for more in ([], ["--network", "own_networks:Net"])
    ]
    assert [one.returncode for one in done] == [2, 0], done[1].stderr
    assert "own_networks:Net is not imported because a file names it" in done[0].stderr


def test_a_factory_takes_the_place_of_a_name(images, tmp_path):
    def make(num_classes):
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))

    genray.train(None, [*images, *SMALL], runtime="local", storage=str(tmp_path), network=make)
    with pytest.raises(CheckpointError, match=r"is not imported because a file names it: load_model"):
        genray.load_model(tmp_path / "digits")
    model = genray.load_model(tmp_path / "digits", network=make)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


# --- what surrounds a network -----------------------------------------------------------------------------------------

SIZES = {"num_classes": 3, "in_channels": 3, "image_size": (32, 32)}


def test_frozen_and_tied_parameters_in_the_flat_weights():
    network = build_model("own_networks:Net", **SIZES, seed=0)
    stem = network.body.stem.weight.clone()
    trained = {p for p in network.parameters() if p.requires_grad}
    flat = FlatWeights(network)
    assert flat.parameter.numel() == sum(p.numel() for p in trained)
    assert network.body.first.conv.weight is network.body.second.conv.weight
    with torch.no_grad():
        flat.weights.add_(1.0)
    assert torch.equal(network.body.stem.weight, stem) and network.body.head.weight.mean() > 0.5


@pytest.mark.parametrize("name", CASES)
def test_the_attacked_copy_follows_and_keeps_the_classifier_in_float32(name):
    network = build_model(name, **SIZES, options=CASES[name], seed=0).eval()
    x = torch.rand(2, 3, 32, 32)
    copy = AttackCopy(network, dtype=torch.bfloat16)
    assert copy.body.get_submodule(network.classifier).weight.dtype == torch.float32
    assert {p.dtype for p in copy.parameters()} == {torch.float32, torch.bfloat16}
    exact = AttackCopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    exact.refresh()
    torch.testing.assert_close(exact(x), network(x), rtol=1e-4, atol=1e-5)


def test_the_classifier_is_the_layer_that_gives_the_logits_and_not_the_last_one():
    assert build_model("own_networks:Net", **SIZES).classifier == "body.head"  # `extra` stands behind it
    answers = build_model("own_networks:Net", **SIZES, options={"answers": True})
    assert answers(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_layers_that_cannot_be_trained_by_several_processes_are_named():
    assert per_process_layers(build_model("resnet18", width=2, **SIZES)) == []
    convnext = build_model("timm:convnext_atto", **SIZES, options=CASES["timm:convnext_atto"])
    assert "DropPath" in per_process_layers(convnext)[0]
    several = [nn.BatchNorm1d(2), nn.Dropout2d(0.5), nn.BatchNorm2d(2, affine=False), nn.SyncBatchNorm(2)]
    assert len(per_process_layers(nn.Sequential(*several, nn.Dropout2d(0.0), nn.Dropout(0.5)))) == 4


def test_several_workers_are_refused_for_them(images):
    config = load_config(None, [*overrides_of("timm:convnext_atto", images), "base_learners.linf.workers=2"])
    with pytest.raises(ConfigError, match=r"base_learners.linf.workers: expected 1, because of the layer .*DropPath"):
        prepare(config, decode=False)


# --- initial weights --------------------------------------------------------------------------------------------------


def make_file(path, name="resnet18", seed=1, **changes):
    """A plain state dict of a network, as other programs save it."""
    options = {} if ":" in name else {"width": 2}
    network = build_model(name, **(SIZES | changes), **options, seed=seed)
    torch.save(getattr(network, "body", network).state_dict(), path)
    return network


def setup_of(images, *overrides, name="resnet18", width=2):
    model = {"model": {"name": name, "width": width, "batch_norm": False}}
    return prepare(load_config(None, [*images, *SMALL, model, *overrides]), decode=False)


@pytest.mark.parametrize("name", ["resnet18", "own_networks:Net", "torchvision:mobilenet_v3_small"])
def test_a_run_begins_at_the_weights_of_a_file(name, images, tmp_path):
    there = make_file(tmp_path / "w.pt", name)
    setup = setup_of(images, f"model.weights={tmp_path}/w.pt", name=name, width=None if ":" in name else 2)
    ours, theirs = setup.build_network().state_dict(), there.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert setup.initial.record["new"] == [] and len(setup.initial.record["sha256"]) == 64
    assert "initial weights:" in setup.notes[-1]


def test_names_that_all_begin_alike_are_found_below_a_wrapper(images, tmp_path):
    there = build_model("own_networks:only", **SIZES, seed=1).body
    torch.save({f"module.{name}": value for name, value in there.state_dict().items()}, tmp_path / "w.pt")
    setup = setup_of(images, f"model.weights={tmp_path}/w.pt", name="own_networks:only", width=None)
    assert torch.equal(setup.build_network().body[0][1].weight, there[0][1].weight)


def test_a_new_head_is_made_anew_and_said(images, tmp_path):
    there = make_file(tmp_path / "w.pt", num_classes=7)
    fields = [f"model.weights={tmp_path}/w.pt"]
    with pytest.raises(ConfigError, match=r"model.weights: .*linear.weight is \(7, 16\), .* model.new_head: true"):
        setup_of(images, *fields)
    setup = setup_of(images, *fields, "model.new_head=true")
    network = setup.build_network()
    assert torch.equal(network.conv1.weight, there.conv1.weight) and network.linear.weight.shape == (3, 16)
    assert setup.initial.record["new"] == setup.initial.record["left_out"] == ["linear.weight", "linear.bias"]
    assert torch.equal(network.linear.weight, setup_of(images).build_network().linear.weight), "as without a file"


def test_frozen_parameters_stay_as_they_are(images, tmp_path):
    there = make_file(tmp_path / "w.pt")
    fields = [f"model.weights={tmp_path}/w.pt", "model.freeze=[conv1.*, layer1.*]", "model.name=resnet18"]
    genray.train(None, [*images, *SMALL, *fields, "model.width=2"], runtime="local", storage=str(tmp_path / "runs"))
    state = genray.load_model(tmp_path / "runs/digits").state_dict()
    assert torch.equal(state["conv1.weight"], there.conv1.weight)
    assert not torch.equal(state["linear.weight"], there.linear.weight)
    torch.save({}, tmp_path / "w.pt")
    (tmp_path / "runs/digits/results.json").unlink()
    with pytest.raises((ConfigError, CheckpointError), match="w.pt: holds no state dict"):
        genray.train(None, [*images, *SMALL, *fields, "model.width=2"], runtime="local",
                     storage=str(tmp_path / "runs"), resume=True)  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_needs_no_weights_file(images, tmp_path):
    """The checkpoint has the frozen parameters, and how the file's network normalised its inputs."""
    small = [*images, *SMALL, "model.name=resnet18", "model.width=2"]
    start = [*small, "training.epochs=1", "name=start", "model.mean=[0.5, 0.4, 0.3]", "model.std=[0.2, 0.3, 0.2]"]
    genray.train(None, start, runtime="local", storage=str(tmp_path))
    line = [*small, f"model.weights={tmp_path}/start", "model.freeze=[conv1.*, layer1.*]", "model.new_head=true"]
    genray.train(None, line, runtime="local", storage=str(tmp_path / "whole"))

    def stop(record):
        raise Stopped

    with pytest.raises(Stopped):
        genray.train(None, line, runtime="local", storage=str(tmp_path / "parts"), on_epoch=stop)
    (tmp_path / "start").rename(tmp_path / "moved")
    genray.train(None, line, runtime="local", storage=str(tmp_path / "parts"), resume=True)
    ours, theirs = states(tmp_path / "whole/digits"), states(tmp_path / "parts/digits")
    assert equal(ours, theirs) and torch.equal(ours[0]["conv1.weight"], states(tmp_path / "moved")[0]["conv1.weight"])
    means = [genray.load_model(tmp_path / part / "digits").normalize.mean.flatten() for part in ("whole", "parts")]
    assert torch.equal(*means) and means[0].tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_another_file_than_the_run_began_with_is_refused(images, tmp_path):
    make_file(tmp_path / "w.pt")
    line = [*images, *SMALL, f"model.weights={tmp_path}/w.pt", "model.name=resnet18", "model.width=2"]

    def stop(record):
        raise Stopped

    with pytest.raises(Stopped):
        genray.train(None, line, runtime="local", storage=str(tmp_path / "runs"), on_epoch=stop)
    make_file(tmp_path / "w.pt", seed=2)
    with pytest.raises(RunFolderError, match="not those the run began with: initial weights had .*w.pt .sha256"):
        genray.train(None, line, runtime="local", storage=str(tmp_path / "runs"), resume=True)


# --- bad input --------------------------------------------------------------------------------------------------------

WRONG = {
    "unknown": ("model.name=resnt18", "model.name: expected one of small_cnn,"),
    "timm": ("model.name=timm:resnt18", "model.name: expected a network of timm.list_models(), got 'resnt18'"),
    "torchvision": ("model.name=torchvision:nope", "model.name: expected one of torchvision.models, got 'nope'"),
    "module": ("model.name=not_there.x:f", "model.name: expected a module that can be imported, got 'not_there.x'"),
    "standard library": ("model.name=subprocess:run", "expected code of your own, got one of Python's own"),
    "attribute": ("model.name=own_networks:f", "model.name: expected own_networks to have f"),
    "no module": ("model.name=own_networks:nothing", "to return a torch.nn.Module, got int"),
    "logits": ("model.name=own_networks:wrong", "to return logits of shape (2, 3) for 2 images, got (2, 4)"),
    "options": ("model={name: own_networks:Net, options: {depth: 3}}", "own_networks:Net cannot be built: TypeError"),
    "pretrained": ("model={name: timm:resnet18, options: {pretrained: true}}", "model.options.pretrained: expected"),
    "ours": ("model={name: resnet18, options: {depth: 3}}", "model.options: has no effect with resnet18"),
    "freeze": ("model={name: resnet18, width: 2, freeze: [nope.*]}", "model.freeze: expected patterns of parameter"),
    "all frozen": ("model={name: resnet18, width: 2, freeze: ['*']}", "model.freeze: expected patterns that leave"),
    "head": ("model={name: resnet18, new_head: true}", "model.new_head: has no effect without model.weights"),
    "absent": ("model={name: resnet18, weights: nowhere.pt}", "model.weights: nowhere.pt: no such file"),
    "leaves": ("model.name=own_networks:leaves", "own_networks:leaves cannot be built: SystemExit: 3"),
    "float64": ("model={name: own_networks:Unfit, options: {what: float64}}", "only.weight is torch.float64"),
    "detached": ("model={name: own_networks:Unfit, options: {what: detached}}", "expected logits with gradients"),
    "nan": ("model={name: own_networks:Unfit, options: {what: nan}}", "expected finite logits, those of own_netwo"),
    "train nan": ("model={name: own_networks:Unfit, options: {what: train nan}}", "are NaN or infinite in train mode"),
    "nan option": ("model={name: own_networks:Net, options: {width: .nan}}", "model.options: expected plain values"),
    "tuple": ("model={name: own_networks:Unfit, options: {what: tuple}}", ".logits, came tuple in train mode"),
    "one": ("training.batch_size=49; model={name: own_networks:Unfit, options: {what: one}}", "on a batch of 1"),
}  # fmt: skip


@pytest.mark.parametrize("factory", [3, "own_networks:Net", nn.Linear(2, 2)])
def test_one_line_for_what_is_no_factory(factory, tmp_path):
    torch.save({"format": "genray-model/1", "metadata": {"architecture": {"name": "a:b", **SIZES}}}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"network: expected a function or class that makes the network, got"):
        genray.load_model(tmp_path / "m.pt", network=factory)


@pytest.mark.parametrize("case", WRONG)
def test_one_line_for_a_wrong_network(case, images, tmp_path, capsys):
    override, says = WRONG[case]
    line = ["--runtime", "local", "--storage", str(tmp_path / "runs"), *images, *SMALL, *override.split("; ")]
    assert run_command(main, parse_args(line)) == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert len(err) == 1 and says in err[0]
    assert not (tmp_path / "runs/digits/config.yaml").exists()


def test_weights_of_another_network(images, tmp_path):
    make_file(tmp_path / "w.pt", "preact_resnet18")
    with pytest.raises(CheckpointError, match="model.weights: .*does not fit the model"):
        setup_of(images, f"model.weights={tmp_path}/w.pt")
