"""Columns whose images are made on other networks and tried on the model."""

import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import genray
from genray.attacks import ExampleDraw, GradientAttack
from genray.cli.evaluate import main, parse_args
from genray.cli.parser import run_command
from genray.errors import InputError
from genray.evaluation.checks import look_at_numbers
from genray.evaluation.hidden_gradients import look_at_layers
from genray.models import build_model

HOW = {"epsilon": "0.15", "block_size": 25}


def flags_of(folder):
    return {name: np.array(values) for name, values in pq.read_table(folder / "results.parquet").to_pydict().items()}


def by_hand(model, networks, x, y, name):
    """PGD-100 on each network in turn, for images one by one, on what the model still classifies correctly."""
    stand = []
    for i in range(len(x)):
        draw, image, label = ExampleDraw(0, name, [i]), x[i : i + 1], y[i : i + 1]
        stands = bool(model(image).argmax(1) == label)
        for network in networks:
            if stands:
                moved = GradientAttack("linf", 0.15, 0.15 / 4, 100)(network, image, label, draw)
                stands = bool(model(moved).argmax(1) == label)
        stand.append(stands)
    return np.array(stand)


def test_images_are_made_on_each_base_learner_and_tried_on_the_model(trained_run, model, digits, tmp_path):
    x, y = digits[0][:40], digits[1][:40]
    columns = ["transfer", f"transfer_from={trained_run}/learners/natural.pt", "pgd100"]
    record = genray.evaluate(model, x, y, attacks=columns, transfer=trained_run, output=tmp_path, **HOW)
    flags = flags_of(tmp_path)
    natural, linf = (genray.load_model(trained_run / f"learners/{name}.pt") for name in ("natural", "linf"))
    ours, pixels = flags["linf_transfer"], x.float() / 255
    assert (ours == by_hand(model, (linf, natural), pixels, y, "transfer")).all()
    alone = flags[f"linf_{columns[1]}"]
    assert (alone == by_hand(model, (natural,), pixels, y, columns[1])).all()
    assert max(ours.sum(), alone.sum()) < flags["natural"].sum()
    notes = {a["name"]: a["notes"] for a in record["protocol"]["threats"][0]["attacks"]}
    assert list(notes["transfer"]) == ["transfer: made on linf, natural"]
    assert record["protocol"]["engines"]["linf"]["transfer"] == "genray"


def test_the_command_takes_the_runs_own_learners(trained_run, tmp_path, capsys):
    argv = [str(trained_run), "--attacks", f"transfer,transfer_from={trained_run}", "--examples", "20"]
    assert run_command(main, parse_args([*argv, "--epsilon", "0.1,0.2", "--output", str(tmp_path / "out")])) == 0
    table = capsys.readouterr().out
    assert re.search(r"natural +transfer +transfer_from=", table) and "note: transfer: made on linf, natural" in table
    assert run_command(main, parse_args([*argv, "--output", str(tmp_path / "out"), "--resume"])) == 2  # another radius
    flags = flags_of(tmp_path / "out")
    assert (flags["linf_0.1_transfer"] >= flags["linf_0.2_transfer"]).all()


def test_networks_of_python(model, digits):
    x, y = digits[0][:20], digits[1][:20]

    class Blind(nn.Module):  # its images are those of a random start
        def forward(self, x):
            return x.flatten(1)[:, :10] * 0

    record = genray.evaluate(model, x, y, attacks="transfer", transfer={"blind": Blind()}, **HOW)
    strong = genray.evaluate(
        model, x, y, attacks="transfer,pgd100", transfer={"blind": Blind(), "itself": model}, **HOW
    )
    values = [r["norms"]["linf"]["columns"]["transfer"]["value"] for r in (record, strong)]
    assert values[0] > values[1]
    assert abs(values[1] - strong["norms"]["linf"]["columns"]["pgd100"]["value"]) <= 0.05


def test_another_network_cannot_go_on_with_an_evaluation(trained_run, model, digits, tmp_path):
    x, y = digits[0][:10], digits[1][:10]
    how = HOW | {"attacks": "transfer", "output": tmp_path}
    genray.evaluate(model, x, y, transfer={"one": model}, **how)
    natural = trained_run / "learners/natural.pt"
    with pytest.raises(InputError, match="cannot resume another evaluation: transfer.transfer.one not what it was"):
        genray.evaluate(model, x, y, transfer={"one": natural}, resume=True, **how)


def test_wrong_networks_are_one_line(trained_run, model, digits, tmp_path, capsys):
    x, y = digits[0][:10], digits[1][:10]
    (tmp_path / "run").mkdir()
    shutil.copy(trained_run / "config.yaml", tmp_path / "run")
    (tmp_path / "bad.pt").write_bytes(b"no model")
    wrong = {
        "evaluation attack transfer: expected networks to make images on, got none": {"attacks": "transfer"},
        "transfer: has no effect without the column transfer": {"attacks": "pgd20", "transfer": trained_run},
        "transfer: expected at least one network, got none": {"attacks": "transfer", "transfer": {}},
        "expected base learners in learners/ for the column": {"attacks": "transfer", "transfer": tmp_path / "run"},
        "expected a run folder for the column transfer": {"attacks": "transfer", "transfer": tmp_path / "bad.pt"},
        "evaluation attack transfer_from=: expected a run folder": {"attacks": "transfer_from="},
        "none.pt: no such file": {"attacks": f"transfer_from={tmp_path}/none.pt"},
        "bad.pt: is not a PyTorch model file": {"attacks": f"transfer_from={tmp_path}/bad.pt"},
        "transfer: few: expected logits of 10 classes as the model's, got 3": {
            "attacks": "transfer", "transfer": {"few": lambda x: x.flatten(1)[:, :3]},
        },
        "transfer: wide: cannot take float32 images": {
            "attacks": "transfer", "transfer": {"wide": nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten())},
        },
        "evaluation attack: expected one of .*transfer_from=FILE, got 'transfers'": {"attacks": "transfers"},
    }  # fmt: skip
    for message, arguments in wrong.items():
        with pytest.raises(InputError, match=message) as error:
            genray.evaluate(model, x, y, **arguments, **HOW)
        assert "\n" not in str(error.value)
    file = str(trained_run / "model.pt")
    assert run_command(main, parse_args([file, "--data", "digits", "--attacks", "transfer", "--examples", "5"])) == 2
    assert re.fullmatch(r"error: .*expected a run folder for the column transfer; .*\n", capsys.readouterr().err)


def test_a_transfer_column_below_all_others_is_a_finding():
    rates = {"natural": 0.9, "pgd20": 0.6, "aa": 0.55, "transfer": 0.3}
    (finding,) = look_at_numbers(rates, 1000)
    assert finding.startswith(
        "transfer, whose images are made on other networks, beats every attack on the model itself"
    )
    assert (
        look_at_numbers(rates | {"aa": 0.29}, 1000) == []
        and look_at_numbers({"natural": 0.9, "transfer": 0.3}, 9) == []
    )


class Layer(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


HIDING = {
    "round": lambda x: torch.round(x * 8) / 8,
    "sign": torch.sign,
    "heaviside": lambda x: torch.heaviside(x - 0.5, torch.ones(1)),
    "floor": lambda x: x.mul(8).floor_().div(8),
    "gt": lambda x: (x > 0.5).float(),
    "lt": lambda x: torch.where(x < 0.5, 0.0, x),
    "topk": lambda x: x * torch.zeros_like(x).scatter(1, x.topk(20, 1).indices, 1.0),
    "to": lambda x: x.mul(255).to(torch.uint8).float() / 255,
    "threshold": nn.Threshold(0.2, 0.0),
    "hardshrink": nn.Hardshrink(0.2),
    "argmax": lambda x: x + x.argmax(1, keepdim=True),
}


@pytest.mark.parametrize("name", HIDING)
def test_a_layer_that_hides_gradients_is_found_and_named(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), Layer(HIDING[name]), nn.Linear(64, 10)).eval()
    (finding,) = look_at_layers(network, torch.rand(2, 1, 8, 8))
    assert re.match(rf"layers hide gradients \({name} in 1(\.change)? \(\w+\)\): ", finding), finding


@pytest.mark.parametrize(
    "name",
    ["small_cnn", "resnet18", "preact_resnet18", "wrn_32_10", "torchvision:mobilenet_v3_small", "torchvision:vit_b_16"],
)
def test_ordinary_networks_hide_none(name):
    if "torchvision" in name:
        pytest.importorskip("torchvision")
    width = 2 if name in ("resnet18", "preact_resnet18", "wrn_32_10") else None
    size = (224, 224) if "vit" in name else (32, 32)
    network = build_model(name, width=width, num_classes=10, in_channels=3, image_size=size).eval()
    before = [p.requires_grad for p in network.parameters()]
    assert look_at_layers(network, torch.rand(1, 3, *size)) == []
    assert [p.requires_grad for p in network.parameters()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_rounded_weights_hide_nothing():
    class Binary(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x.flatten(1), self.weight.sign())

    assert look_at_layers(Binary(64, 10), torch.rand(2, 1, 8, 8)) == []
