"""Adversarial images as they are stored: their flags, perturbations and 8-bit versions, computed again by hand."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import genray
from genray.cli.evaluate import main, parse_args
from genray.cli.parser import run_command
from genray.errors import ConfigError, DataError
from genray.evaluation.record import record_table

EPSILON = {"linf": ["0.05", "0.15"], "l2": "0.6"}
HOW = {"attacks": "pgd20,aa", "norms": ("linf", "l2"), "epsilon": EPSILON, "block_size": 15, "engine": "genray"}


@pytest.fixture(scope="module")
def saved(model, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "out"
    x, y = digits
    return folder, genray.evaluate(model, x[:30], y[:30], output=folder, save_images=True, **HOW)


def test_the_stored_images_give_the_flags_of_the_record(saved, model, digits):
    folder, _ = saved
    images, flags = genray.load_images(folder), pq.read_table(folder / "results.parquet").to_pandas()
    x, y = digits[0][:30].float() / 255, digits[1][:30]
    moved = torch.from_numpy(images["image"])
    assert moved.dtype == torch.float32 and moved.shape[1:] == (1, 8, 8) and len(moved) > 30
    with torch.no_grad():
        after = model(moved).argmax(1).numpy()
    assert (images["after"] == after).all() and (images["after"] != images["label"]).all()
    assert (images["label"] == y.numpy()[images["index"]]).all() and (images["before"] == images["label"]).all()
    delta = (moved - x[images["index"]]).flatten(1)
    for norm, length in (("linf", delta.abs().amax(1)), ("l2", delta.norm(dim=1))):
        of = images["norm"] == norm
        np.testing.assert_allclose(images["length"][of], length.numpy()[of], rtol=1e-5)
        assert (images["length"][of] <= images["epsilon"][of].astype(float) * (1 + 1e-5)).all()
    names = {"aa_apgd_ce": "aa", "aa_apgd_t": "aa", "aa_fab_t": "aa", "aa_square": "aa", "pgd20": "pgd20"}
    for norm, radius, column in (
        ("linf", "0.05", "linf_0.05"), ("linf", "0.15", "linf_0.15"), ("l2", "0.6", "l2")
    ):  # fmt: skip
        for attack in ("pgd20", "aa"):
            stand = flags["natural"].to_numpy().copy()
            for i, at in enumerate(images["index"]):
                inside = images["norm"][i] == norm and float(images["epsilon"][i]) <= float(radius)
                stand[at] &= not (inside and names[images["attack"][i]] == attack)
            assert (stand == flags[f"{column}_{attack}"]).all()


def test_the_record_counts_what_survives_8_bits(saved, model, digits):
    folder, record = saved
    images, x = genray.load_images(folder), digits[0][:30].float() / 255
    lost = 0
    for ball, part in record["norms"].items():
        norm, _, radius = ball.partition("_")
        radius = radius or EPSILON[norm]
        for attack, counts in part["images"].items():
            of = (images["norm"] == norm) & (images["epsilon"] == radius) & (images["attack"] == attack)
            rounded = np.rint(images["image"][of] * 255) / np.float32(255)
            with torch.no_grad():
                wrong = model(torch.from_numpy(rounded)).argmax(1).numpy() != images["label"][of]
            delta = (rounded - x.numpy()[images["index"][of]]).reshape(of.sum(), 64)
            length = np.abs(delta).max(1, initial=0) if norm == "linf" else np.sqrt((delta**2).sum(1))
            inside = wrong & (length <= float(radius) * (1 + 1e-5))
            assert counts == {
                "stored": of.sum(),
                "wrong": of.sum(),
                "wrong_in_8_bits": wrong.sum(),
                "in_8_bits": inside.sum(),
            }
            lost += of.sum() - inside.sum()
            line = f"stored images of {attack}: {of.sum()}, read back {of.sum()} fool the model"
            assert line in record_table(record)
    assert lost > 0  # 0.05 is no multiple of 1 / 255


def test_an_evaluation_without_images_is_made_again_with_them_and_a_stopped_one_goes_on(saved, model, digits, tmp_path):
    x, y = digits
    how = HOW | {"output": tmp_path, "attacks": "pgd20"}
    genray.evaluate(model, x[:30], y[:30], **how)
    with pytest.raises(DataError, match="there are no images"):
        genray.load_images(tmp_path)
    genray.evaluate(model, x[:30], y[:30], save_images=True, resume=True, **how)
    (tmp_path / "images" / "l2-pgd20-000001.parquet").unlink()
    genray.evaluate(model, x[:30], y[:30], save_images=True, resume=True, **how)
    images, others = genray.load_images(tmp_path / "images"), genray.load_images(saved[0])
    same = others["attack"] == "pgd20"
    assert all((images[name] == others[name][same]).all() for name in images)


def test_wrong_places_of_images(model, digits, trained_run, tmp_path, capsys):
    x, y = digits
    with pytest.raises(ConfigError, match="save_images: expected output, the folder that they go to, got none"):
        genray.evaluate(model, x[:4], y[:4], save_images=True)
    (tmp_path / "images").mkdir()
    for content in (b"", b"PAR1 and no more", (trained_run / "config.yaml").read_bytes()):
        (tmp_path / "images" / "a.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"images/a.parquet: expected images that genray wrote: [^\n]+$"):
            genray.load_images(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    argv = [str(trained_run), "--attacks", "pgd20", "--examples", "4", "--save-images", "--output", str(file)]
    assert run_command(main, parse_args(argv)) == 2
    assert re.fullmatch(r"error: .*file: cannot be made: .*\n", capsys.readouterr().err)


def test_the_command_writes_images_and_says_so(trained_run, tmp_path, capsys):
    argv = [str(trained_run), "--attacks", "pgd20", "--examples", "30", "--epsilon", "0.1,0.2", "--save-images"]
    assert run_command(main, parse_args([*argv, "--output", f"file://{tmp_path}/out"])) == 0
    images, out = genray.load_images(f"file://{tmp_path}/out"), capsys.readouterr().out
    for radius, line in zip(("0.1", "0.2"), re.findall("stored images of pgd20: .*", out), strict=True):
        assert line.startswith(f"stored images of pgd20: {(images['epsilon'] == radius).sum()}, ")
