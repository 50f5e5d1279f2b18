"""Exported files, loaded strictly by the other codes' classes or by onnxruntime, give the logits of the run's model."""

import json
import sys

import onnxruntime
import pytest
import torch
from PIL import Image
from published_classes import BasicBlock, Normalised, PreActBlock, RawPreActBlock, ResNet, SmallCNN, WideResNet

import genray
from genray.cli.export import main, parse_args
from genray.cli.parser import run_command
from genray.errors import GenrayError
from genray.interop.checkpoint_layouts import load_into
from genray.interop.onnx_file import onnx_bytes
from genray.models import build_model
from genray.recording.run_folder import model_bytes

THREATS = [{"norm": "linf", "epsilon": "8/255"}]
STATISTICS = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.25]}
CIFAR = {"num_classes": 7, "in_channels": 3, "image_size": [32, 32]}
MNIST = {"num_classes": 10, "in_channels": 1, "image_size": [28, 28]}


def write_model(path, **architecture):
    """A model file as a run writes it, every tensor off its initial value logits of ordinary size, several classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    network = build_model(**architecture, seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, value in network.named_parameters():
            if value.ndim == 1 or name.endswith("fc3.weight"):  # BatchNorm, biases, and what starts at zero
                value.add_(torch.randn(value.shape, generator=generator) / 5)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1
        images = images_for(architecture, 16)
        network.train()(images)  # running statistics
        head = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        head.bias -= network.eval()(images).mean(0)  # so that no class wins everywhere
    path.write_bytes(
        model_bytes(network.state_dict(), {"architecture": architecture, "run": "r1", "threat_models": THREATS})
    )
    return path


def images_for(architecture, n=3):
    """Noise on a colour of each image's own."""
    generator, channels = torch.Generator().manual_seed(n), architecture["in_channels"]
    colours = torch.rand((n, channels, 1, 1), generator=generator)
    return 0.6 * colours + 0.4 * torch.rand((n, channels, *architecture["image_size"]), generator=generator)


def assert_same(found, expected):
    assert expected.std() > 0.01 and expected.abs().max() < 1e3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# layout, architecture, the other code's class
CLASSES = {
    "trades, WRN-28": ("trades", {"name": "wrn_28_10", "width": 2, **CIFAR}, lambda: WideResNet(4, 2, 7, True)),
    "trades, ResNet-18": ("trades", {"name": "resnet18", **CIFAR}, lambda: ResNet(BasicBlock, 7)),
    "trades, SmallCNN": ("trades", {"name": "small_cnn", **MNIST}, SmallCNN),
    "robustbench, WRN-34": ("robustbench", {"name": "wrn_34_10", "width": 1, **CIFAR}, lambda: WideResNet(5, 1, 7, 0)),
    "robustbench, normalised WRN-32": (
        "robustbench",
        {"name": "wrn_32_10", "width": 1, **CIFAR, **STATISTICS},
        lambda: Normalised(WideResNet(5, 1, 7, False)),
    ),
    "robustbench, normalised ResNet-18": (
        "robustbench",
        {"name": "resnet18", **CIFAR, **STATISTICS},
        lambda: Normalised(ResNet(BasicBlock, 7)),
    ),
    "robustbench, PreActResNet-18 with bn": (
        "robustbench",
        {"name": "preact_resnet18", **CIFAR},
        lambda: ResNet(PreActBlock, 7, bn_before_fc=True),
    ),
    "robustbench, PreActResNet-18 without": (
        "robustbench",
        {"name": "preact_resnet18_no_bn", **CIFAR},
        lambda: ResNet(PreActBlock, 7),
    ),
    "robustbench, PreActResNet-18 without, raw shortcut": (
        "robustbench",
        {"name": "preact_resnet18_no_bn_raw_shortcut", **CIFAR},
        lambda: ResNet(RawPreActBlock, 7),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSES)
@torch.no_grad()
def test_the_other_codes_class_gives_the_same_logits(case, tmp_path):
    layout, architecture, build = CLASSES[case]
    source = write_model(tmp_path / "run" / "model.pt", **architecture)
    file = genray.export(source.parent, layout)
    assert file == str(source.with_name(f"model_{layout}.pt"))
    images, model = images_for(architecture), genray.load_model(source)
    theirs = build()
    theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(theirs.eval()(images), model(images))

    back = build_model(
        architecture["name"], width=architecture.get("width"), **{key: architecture[key] for key in CIFAR}
    )
    load_into(back, file)
    assert_same(back.eval()(images), model(images))


@torch.no_grad()
def test_an_exported_file_is_evaluated_like_any_checkpoint(tmp_path):
    """Images lie in the folders of the classes that the run's model gives them, every fourth one aside."""
    from genray.cli.evaluate import main, parse_args

    architecture = {"name": "wrn_28_10", "width": 1, **CIFAR, "num_classes": 3, **STATISTICS}
    file = genray.export(write_model(tmp_path / "model.pt", **architecture), "robustbench")
    pixels = (images_for(architecture, 16) * 255).byte()
    found = genray.load_model(tmp_path / "model.pt")(pixels / 255).argmax(1).tolist()
    assert len(set(found)) > 1
    for part in ("train", "test"):
        for i, (image, label) in enumerate(zip(pixels, found)):
            folder = tmp_path / "data" / part / str(label if i % 4 else (label + 1) % 3)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    assert len(list((tmp_path / "data/test").iterdir())) == 3
    options = ["--data", f"image_folder:{tmp_path / 'data'}", "--width", "1", "--attacks", "pgd20"]
    main(parse_args([file, *options, "--output", str(tmp_path / "out")]))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["natural"]["value"] == 0.75


ONNX = {
    "digits": {"name": "small_cnn", "width": 8, "batch_norm": True, "num_classes": 10, "in_channels": 1}
    | {"image_size": [8, 8], "mean": [0.3], "std": [0.4]},
    "colour": {"name": "preact_resnet18", "width": 4, **CIFAR, **STATISTICS},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONNX)
@torch.no_grad()
def test_onnx_gives_the_same_logits_for_any_number_of_images(name, tmp_path):
    architecture = ONNX[name]
    source = write_model(tmp_path / "model.pt", **architecture)
    session = onnxruntime.InferenceSession(genray.export(source, "onnx"), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert told["run"] == "r1" and json.loads(told["threat_models"]) == THREATS
    model = genray.load_model(source)
    for n in (1, 2, 9):
        images = images_for(architecture, n)
        assert_same(torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), model(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt"]


def test_an_onnx_file_with_other_logits_is_not_kept():
    class Counting(torch.nn.Module):
        calls = 0.0

        def forward(self, x):
            self.calls += 1
            return x.flatten(1) + self.calls

    with pytest.raises(GenrayError, match="logits differ"):
        onnx_bytes(Counting(), (1, 2, 2), {})


# --- refused, in one line, and nothing written ----------------------------------------------------------------------


def run(*argv):
    try:
        return run_command(main, parse_args([str(arg) for arg in argv]))
    except SystemExit as stop:  # argparse
        return stop.code


def refused(capsys, folder, says, *argv):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert says in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


DIGITS = {"name": "small_cnn", "num_classes": 10, "in_channels": 1, "image_size": [8, 8]}
UNFIT = [
    ("trades", {"name": "preact_resnet18", "width": 2, **CIFAR}, "it has no preact_resnet18, only small_cnn, resnet18"),
    ("trades", DIGITS, "expected image_size (28, 28) for small_cnn, got (8, 8)"),
    ("trades", {"name": "wrn_28_10", "width": 1, **CIFAR, **STATISTICS}, "no place for the model's normalisation"),
    ("trades", {"name": "small_cnn", **MNIST, "batch_norm": True}, "expected batch_norm False"),
    ("robustbench", {"name": "small_cnn", **MNIST}, "it has no small_cnn"),
    ("robustbench", {"name": "resnet18", "width": 4, **CIFAR}, "expected width 64 for resnet18, got 4"),
]


@pytest.mark.parametrize(("layout", "architecture", "says"), UNFIT)
def test_what_the_other_code_has_no_class_for(layout, architecture, says, tmp_path, capsys):
    source = write_model(tmp_path / "model.pt", **architecture)
    refused(capsys, tmp_path, says, source, "--layout", layout)


def test_wrong_arguments(tmp_path, capsys, monkeypatch):
    source = write_model(tmp_path / "model.pt", name="small_cnn", **MNIST)
    (tmp_path / "there.pt").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    trades = ["--layout", "trades"]
    refused(capsys, tmp_path, "there.pt: exists", source, *trades, "--output", tmp_path / "there.pt")
    refused(capsys, tmp_path, "got a folder", source, *trades, "--output", tmp_path / "folder")
    refused(capsys, tmp_path, "is not a folder", source, *trades, "--output", tmp_path / "there.pt" / "x.pt")
    refused(capsys, tmp_path, "no such file", tmp_path / "absent.pt", *trades)
    refused(capsys, tmp_path, "not a PyTorch model file", tmp_path / "there.pt", *trades)
    refused(capsys, tmp_path, "invalid choice: 'tardes'", source, "--layout", "tardes")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(capsys, tmp_path, "pip install 'genray[onnx]'", source, "--layout", "onnx")
    assert run(source, *trades, "--output", tmp_path / "there.pt", "--overwrite") == 0
    assert capsys.readouterr().out == f"the model is in {tmp_path / 'there.pt'}\n"
    assert set(torch.load(tmp_path / "there.pt", weights_only=True)) == set(SmallCNN().state_dict())
