"""The Hugging Face Hub through its file system, here a local one of the same interface; safetensors; model cards."""

import io
import json
import re
import shutil
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

import genray
from genray.cli.export import main, parse_args
from genray.cli.parser import run_command
from genray.data.datasets import load_image_data
from genray.errors import CheckpointError, RunFolderError
from genray.interop import safetensors_file
from genray.interop.checkpoint_layouts import load_into
from genray.models import build_model
from genray.recording.run_folder import model_bytes
from genray.storage import Storage

pytest.importorskip("safetensors")
ARCHITECTURE = {"name": "small_cnn", "num_classes": 10, "in_channels": 1, "image_size": [8, 8], "width": 4}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder that `hf://` names."""
    folder = tmp_path / "hub"
    folder.mkdir()

    class StandIn(DirFileSystem):
        cachable = False

        def __init__(self):
            super().__init__(path=str(folder), fs=LocalFileSystem())

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", StandIn)
    return folder


def write_model(path):
    network = build_model(**ARCHITECTURE, seed=0)
    with torch.no_grad():
        for number, value in enumerate(network.parameters()):
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) / 5)
    path.parent.mkdir(parents=True, exist_ok=True)
    threats = [{"norm": "linf", "epsilon": "8/255"}]
    path.write_bytes(model_bytes(network.state_dict(), {"architecture": ARCHITECTURE, "threat_models": threats}))
    return path


def same(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_model_goes_to_the_hub_and_comes_back(hub, tmp_path):
    file = write_model(tmp_path / "model.pt")
    (hub / "user/name").mkdir(parents=True)
    written = genray.export(file, "safetensors", "hf://user/name/model.safetensors")
    assert written == "hf://user/name/model.safetensors"
    assert sorted(path.name for path in (hub / "user/name").iterdir()) == ["README.md", "model.safetensors"]
    before, after = genray.load_model(file), genray.load_model("hf://user/name")
    assert same(before, after) and after.origin == before.origin and after.origin.threats
    assert "genray.load_model('hf://user/name')" in (hub / "user/name/README.md").read_text()
    (hub / "user/other").mkdir()
    (hub / "user/other/model.pt").write_bytes(file.read_bytes())
    assert same(before, genray.load_model("hf://user/other"))


def test_others_read_our_file_and_we_read_theirs(tmp_path):
    """By the package itself; without metadata of ours it is a bare state dict."""
    from safetensors.torch import load_file, save_file

    file = write_model(tmp_path / "model.pt")
    model = genray.load_model(file)
    theirs = load_file(genray.export(file, "safetensors"))
    assert all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "bare.safetensors")
    network = build_model(**ARCHITECTURE, seed=5)
    load_into(network, tmp_path / "bare.safetensors")
    assert same(network, model)
    with pytest.raises(CheckpointError, match="expected a model written by genray"):
        genray.load_model(tmp_path / "bare.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (whole[:-10], whole[:40], whole[:9] + b"x" + whole[10:]):
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged\.safetensors: is corrupt or truncated \("):
            genray.load_model(tmp_path / "damaged.safetensors")


def test_images_come_from_the_hub(hub):
    noise = np.random.default_rng(0)
    (hub / "datasets/user/images").mkdir(parents=True)
    for part, count in (("train", 20), ("test", 8)):
        images = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": ""})
        table = pa.table({"image": pa.array(images), "label": np.arange(count) % 4})
        pq.write_table(table, hub / f"datasets/user/images/{part}-00000-of-00001.parquet")
    found = load_image_data("parquet", path="hf://datasets/user/images")
    local = load_image_data("parquet", path=str(hub / "datasets/user/images"))
    for part in ("train", "test"):
        for one, other in zip(getattr(found, part).take(slice(None)), getattr(local, part).take(slice(None))):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_the_card_has_what_the_records_have(trained_run, tmp_path):

    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (x, y), output = genray.test_images(run), run / "evaluation"
    model = genray.load_model(run)
    genray.evaluate(model, x[:20], y[:20], attacks=["pgd20"], norms=["linf"], output=output)
    record = json.loads((output / "results.json").read_text())
    record["findings"].append("the whole is suspect")
    record["norms"]["linf"]["findings"].append("this ball is suspect")
    (output / "results.json").write_text(json.dumps(record))
    genray.export(run, "safetensors")
    card = (run / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "genray"
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| (\d+) \|$", text, re.M)
    }
    results = json.loads((run / "results.json").read_text())
    expected = {name: found for name, found in results["models"]["global"].items() if name != "natural"}
    expected |= {"natural": record["natural"], "linf pgd20": record["norms"]["linf"]["columns"]["pgd20"]}
    assert expected.keys() <= rows.keys()
    for name, found in expected.items():
        percents = [f"{100 * found[key]:.2f}" for key in ("value", "low", "high")]
        assert list(rows[name]) == [*percents, str(found["examples"])], name
    findings = [*record["findings"], *record["norms"]["linf"]["findings"]]
    assert len(findings) >= 2 and all(f"- {line}\n" in card for line in findings)
    assert f"`{record['protocol']['hash']}`" in card and results["protocol"]["attack"] in card


def test_files_that_are_there_are_kept(tmp_path, capsys):
    file = write_model(tmp_path / "model.pt")
    (tmp_path / "README.md").write_text("mine")
    assert run_command(main, parse_args([str(file), "--layout", "safetensors"])) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/README.md: exists; choose another --output")
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "README.md").read_text() == "mine"


def test_what_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    def absent(protocol):
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    words = r"storage 'hf://user/name': huggingface_hub is not installed; pip install 'genray\[hub\]'"
    with pytest.raises(RunFolderError, match=words):
        Storage("hf://user/name")
    file = write_model(tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert run_command(main, parse_args([str(file), "--layout", "safetensors"])) == 2
    assert capsys.readouterr().err == "error: safetensors is not installed; pip install 'genray[hub]'\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_the_hub_is_huggingface_hubs_own():
    pytest.importorskip("huggingface_hub")
    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"
    assert safetensors_file.FORMAT == "genray-model/1"
