"""What `benchmarks/gpu_check.py` takes along: images in parts, each of which is there before training begins."""

import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import features

from genray.data.splits import Split

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))


def colours(number, seed):
    """Images of two colours each, which compress well, and labels."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(256, (number, 3, 2, 1), dtype=torch.uint8, generator=generator)
    return Split(halves.repeat_interleave(16, 2).expand(-1, -1, -1, 32).contiguous(), torch.arange(number) % 10)


def packed(monkeypatch, folder, **options):
    data = SimpleNamespace(train=colours(50, 0), test=colours(20, 1))
    monkeypatch.setattr(gpu_check, "load_image_data", lambda **source: data)
    gpu_check.pack(Namespace(**{"pack": "a folder", "output": folder, "mib": 55, "most": None, **options}))
    return data, sorted(folder.iterdir())


def keys(x, y):
    return sorted(zip((row.tobytes() for row in x), y.tolist()))


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_parts_hold_every_image_once_and_unchanged(monkeypatch, tmp_path):
    data, files = packed(monkeypatch, tmp_path, most=40)
    assert [file.name for file in files] == ["part1of2.npz", "part2of2.npz"]
    found = gpu_check.unpack(files)
    for name in ("train", "test"):
        split = getattr(data, name)
        expected = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        assert keys(*found[name]) == keys(expected, split.labels.numpy())
        assert len(np.load(files[0])["test"]) == 40 and 0 < np.load(files[0])["test"].sum() < 20


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_parts_have_the_size_that_was_asked_for(monkeypatch, tmp_path):
    _, files = packed(monkeypatch, tmp_path, mib=0.004)
    assert len(files) > 1
    assert all(len(np.load(file)["content"]) <= 0.004 * 2**20 for file in files)


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
def test_training_waits_for_all_parts(monkeypatch, tmp_path):
    _, (first, _) = packed(monkeypatch, tmp_path / "parts", most=40)
    args = Namespace(work=tmp_path / "work", data=[first], left=lambda: 100)
    gpu_check.store(args)
    found = gpu_check.training(args)
    assert found["left_out"].startswith("1 of the 2 parts of the data are in ")


def test_a_part_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="expected a file that --pack wrote"):
        gpu_check.store(Namespace(work=tmp_path, data=[tmp_path / "none.npz"]))
