"""What a model file says of its model, what it leaves open, and what an evaluation says where the two differ."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from published_classes import BasicBlock, PreActBlock, RawPreActBlock, ResNet, SoftplusPreActBlock

import genray
from genray.cli.evaluate import main, parse_args
from genray.cli.parser import run_command
from genray.interop.checkpoint_layouts import load_into, read_metadata
from genray.models import build_model

QUICK = ["--attacks", "pgd20", "--examples", "20"]
VARIANTS = {  # name -> (the other code's network, our network)
    "robust": (lambda: ResNet(PreActBlock, 3, bn_before_fc=True), "preact_resnet18"),
    "E-AT": (lambda: ResNet(SoftplusPreActBlock, 3, bn_before_fc=True), "preact_resnet18_softplus"),
    "Generalist": (lambda: ResNet(PreActBlock, 3), "preact_resnet18_no_bn"),
    "Wong2020Fast": (lambda: ResNet(RawPreActBlock, 3), "preact_resnet18_no_bn_raw_shortcut"),
}


def command(*argv):
    return run_command(main, parse_args([str(arg) for arg in argv]))


def evaluated(capsys, model, *argv):
    """The record, and what was printed: (results.json, stdout, stderr)."""
    capsys.readouterr()
    with tempfile.TemporaryDirectory() as out:
        assert command(model, *argv, "--output", out) == 0
        record = json.loads((Path(out) / "results.json").read_text())
    printed = capsys.readouterr()
    return record, printed.out, printed.err


# ---- variants that no tensor tells apart


def published(make):
    """A network of another code, every tensor off its initial value, with statistics of images."""
    torch.manual_seed(1)
    network = make()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(8, 3, 32, 32))
        network.eval()
        network.linear.bias -= network(torch.rand(8, 3, 32, 32)).mean(0)
    return network


@pytest.mark.parametrize("producer", VARIANTS)
@torch.no_grad()
def test_a_published_network_has_a_name_that_gives_its_logits(producer):
    make, name = VARIANTS[producer]
    theirs, images = published(make), torch.rand(4, 3, 32, 32)
    errors = {}
    for _, other in VARIANTS.values():
        if other.startswith(name.partition("18")[0]) and ("no_bn" in other) == ("no_bn" in name):
            ours = build_model(other, num_classes=3, in_channels=3, image_size=(32, 32))
            load_into(ours, theirs.state_dict(), normalize="none")
            errors[other] = float((ours.eval()(images) - theirs(images)).abs().max() / theirs(images).abs().max())
    right = errors.pop(name)
    assert right < 1e-5 and len(errors) == 1 and min(errors.values()) > 0.01


def test_an_ambiguous_file_is_a_finding_that_says_what_to_pass(tmp_path, capsys):
    """The images lie in the folders of the classes that the file's own network gives them."""
    name, shape = VARIANTS["Wong2020Fast"][1], {"num_classes": 3, "in_channels": 3, "image_size": (32, 32)}
    theirs = published(lambda: build_model(name, width=4, **shape))
    pixels = (torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 255).byte()
    with torch.no_grad():
        labels = theirs(pixels / 255).argmax(1).tolist()
    assert len(set(labels)) == 3
    for part in ("train", "test"):
        for i, (image, label) in enumerate(zip(pixels, labels)):
            folder = tmp_path / "data" / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    file, data = (
        tmp_path / "model.pt",
        ["--data", f"image_folder:{tmp_path / 'data'}", "--attacks", "natural", "--width", 4],
    )
    torch.save({"state_dict": {f"module._orig_mod.{k}": v for k, v in theirs.state_dict().items()}}, file)
    record, out, err = evaluated(capsys, file, *data)
    (finding,) = record["findings"]
    right = record["natural"]["value"] * 24
    assert right < 24
    assert finding.startswith(
        "the file does not tell all of its network; taken was --arch preact_resnet18_no_bn --normalize none "
        f"({right:.0f} of 24 images right), not "
    )
    own = "--arch preact_resnet18_no_bn_raw_shortcut --normalize none"
    assert f"{own} (24 of 24 images right)" in finding and "--normalize cifar10 (" in finding
    assert f"! {finding}" in out and f"! {finding}" in err.splitlines()
    record, out, err = evaluated(capsys, file, *data, *own.split())
    assert record["findings"] == [] and record["natural"]["value"] == 1 and "!" not in out + err


# ---- what a file of genray says


def test_every_model_of_a_run_says_what_it_was_trained_for_and_on(trained_run, digits):
    first = build_metadata(trained_run / "learners" / "natural.pt")
    for name in ("model.pt", "model_last.pt", "learners/natural.pt", "learners/linf.pt"):
        found = build_metadata(trained_run / name)
        assert found["threat_models"] == [{"norm": "linf", "epsilon": "0.1"}]
        assert found["class_names"] == [str(k) for k in range(10)]
        assert found["data"] == first["data"] and found["data"]["source"] == "digits"
        assert found["data"]["test_images"] == 100
        origin = genray.load_model(trained_run / name).origin
        assert origin.image_shape == (1, 8, 8) and [str(t) for t in origin.threats] == ["linf 0.1 (0.1)"]


def build_metadata(file):
    return json.loads(json.dumps(read_metadata(file)))


@pytest.mark.parametrize("form", ["model.pt", "learners/linf.pt", "mixture"])
def test_a_model_file_is_measured_at_its_own_radius(form, trained_run, tmp_path, capsys):
    source = trained_run / form
    if form == "mixture":
        assert command(trained_run, "--save-mixture", "natural=0.5,linf=0.5", "--output", tmp_path / "mixtures") == 0
        (source,) = (tmp_path / "mixtures").glob("*.pt")
    shutil.copy(source, tmp_path / "alone.pt")
    record, _, err = evaluated(capsys, tmp_path / "alone.pt", "--data", "digits", *QUICK)
    assert record["protocol"]["threats"][0]["epsilon"] == "0.1" and record["findings"] == [] and "!" not in err
    if form == "model.pt":
        whole, _, _ = evaluated(capsys, trained_run, *QUICK)
        assert whole["norms"] == record["norms"]


@pytest.mark.parametrize("layout", ["trades", "robustbench"])
def test_an_exported_state_dict_says_it_too_beside_names_that_others_load(layout, trained_run, tmp_path):
    about = read_metadata(trained_run / "model.pt")
    about["architecture"] = {"name": "resnet18", "num_classes": 10, "in_channels": 3, "image_size": [32, 32]}
    network = build_model("resnet18", num_classes=10, in_channels=3, image_size=(32, 32), seed=0).eval()
    content = {"format": "genray-model/1", "state_dict": network.state_dict(), "metadata": about}
    torch.save(content, tmp_path / "run.pt")
    exported = genray.export(tmp_path / "run.pt", layout)
    ResNet(BasicBlock, 10).load_state_dict(torch.load(exported, weights_only=True), strict=True)
    assert genray.load_model(exported).origin == genray.load_model(tmp_path / "run.pt").origin
    assert read_metadata(exported) == about


def test_another_radius_or_norm_than_the_models_is_said(trained_run, capsys, digits):
    at = [*QUICK, "--norms", "linf,l2", "--epsilon", "linf=8/255"]
    record, out, err = evaluated(capsys, trained_run, *at)
    finding = "measured at linf 8/255 (0.0313725), l2 128/255 (0.501961), the model was trained for linf 0.1 (0.1)"
    assert record["findings"] == [finding] and f"! {finding}\n" in out and f"! {finding}\n" in err
    by_hand = genray.evaluate(
        genray.load_model(trained_run), digits[0][:20], digits[1][:20],
        attacks="pgd20", norms="linf,l2", epsilon={"linf": "8/255"},
    )  # fmt: skip
    assert by_hand["findings"] == [finding] and by_hand["norms"] == record["norms"]
    assert genray.evaluate(genray.load_model(trained_run), *(part[:20] for part in digits), attacks="pgd20")[
        "protocol"
    ]["threats"][0]["epsilon"] == "0.1"  # fmt: skip


def test_mixtures_of_a_run_are_held_to_what_it_was_trained_for(trained_run, tmp_path, capsys):
    out = tmp_path / "mixtures"
    line = ["--mixtures", "0.5", "--split", "test", "--epsilon", "0.2", *QUICK, "--output", out]
    assert command(trained_run, *line) == 0
    records = [json.loads(file.read_text()) for file in out.glob("test/*/results.json")]
    says = "measured at linf 0.2 (0.2), the model was trained for linf 0.1 (0.1)"
    assert len(records) == 4 and all(record["findings"] == [says] for record in records)


def folder_of_digits(where, digits, rename=str, change=lambda image: image):
    for part in ("train", "test"):
        for i, (image, label) in enumerate(zip(*digits)):
            folder = where / part / rename(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(image[0].numpy())).save(folder / f"{i:03}.png")
    return ["--data", f"image_folder:{where}", "--attacks", "natural"]


def test_other_data_than_the_models_are_said(trained_run, tmp_path, capsys, digits):
    shutil.copy(trained_run / "model.pt", tmp_path / "model.pt")
    file = tmp_path / "model.pt"
    reversed_names = folder_of_digits(tmp_path / "a", digits, rename=lambda label: "zyxwvutsrq"[label])
    record, _, _ = evaluated(capsys, file, *reversed_names)
    assert record["findings"] == [
        "the model tells 10 classes apart (0, 1, 2 and 7 more), the data are labelled with 10 (q, r, s and 7 more): "
        "label numbers may mean something else"
    ]
    half = [part[digits[1] < 5] for part in digits]
    record, _, _ = evaluated(capsys, file, *folder_of_digits(tmp_path / "b", half))
    assert "the data are labelled with 5 (0, 1, 2 and 2 more)" in record["findings"][0]
    record, _, _ = evaluated(capsys, file, *folder_of_digits(tmp_path / "c", digits))
    assert record["findings"] == [
        "the images are not the test images of the model's run (digits); they are of image_folder"
    ]


def test_a_file_of_an_older_version_and_one_that_is_illegible(trained_run, tmp_path, capsys):
    content = torch.load(trained_run / "model.pt", weights_only=True)
    for name in ("threat_models", "data"):
        del content["metadata"][name]
    shutil.copytree(trained_run, tmp_path / "old", ignore=shutil.ignore_patterns("evaluat*"))
    torch.save(content, tmp_path / "old" / "model.pt")
    record, _, _ = evaluated(capsys, tmp_path / "old", *QUICK)  # the run folder's configuration says the radius
    assert record["protocol"]["threats"][0]["epsilon"] == "0.1" and record["findings"] == []
    content["metadata"]["threat_models"] = [{"norm": "l7", "epsilon": "0.1"}]
    torch.save(content, tmp_path / "bad.pt")
    assert command(tmp_path / "bad.pt", "--data", "digits", *QUICK) == 2
    assert "bad.pt: says nothing legible of its model" in capsys.readouterr().err


def test_another_image_size_than_the_models_is_said():
    made = {"num_classes": 4, "in_channels": 3, "image_size": (16, 16)}
    network = build_model("resnet18", width=2, seed=0, **made).eval()
    about = {"architecture": {"name": "resnet18", "width": 2, **made}}
    load_into(network, {"format": "genray-model/1", "state_dict": network.state_dict(), "metadata": about})
    record = genray.evaluate(network, torch.rand(4, 3, 24, 24), torch.arange(4), attacks="natural")
    assert "the images are 3 x 24 x 24 (C x H x W), the model was trained on 3 x 16 x 16" in record["findings"]
