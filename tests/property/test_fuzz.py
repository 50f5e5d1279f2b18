"""Seeded damage to everything that is read: whatever comes, one clear line and exit code 2, and nothing is touched."""

import hashlib
import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import genray
from genray.cli.parser import run_command
from genray.cli.train import main, parse_args
from genray.config import load_config
from genray.data.datasets import load_image_data
from genray.errors import CheckpointError, DataError, RunFolderError
from genray.recording import RunFolder

STATES, MODELS, STORED, PARQUETS = 60, 60, 120, 80
ODD_VALUES = [
    "", "null", "~", "-1", "0", "1e999", ".nan", ".inf", "-.inf", "[]", "{}", "[[0, 1]]", "8/0", "1/3/5", "'", '"',
    "&a *a",
    "!!python/object/apply:os.system ['exit 1']", "!!binary aGk=", "2001-01-01", "0x1F", "\u0000", "é" * 50, "[" * 60,
    "9" * 400, "true", "*missing", "? a", "- a", "%TAG ! x", "yes\n  no: maybe", "{a: {b: {c: d}}}",
]  # fmt: skip


def untouched(folder):
    """A digest of all that is in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def run(capsys, *argv):
    code = run_command(main, parse_args([str(a) for a in argv]))
    out, err = capsys.readouterr()
    assert "Traceback" not in err + out
    return code, err


def damaged_text(rng, text):
    """One to three small mistakes in a YAML text."""
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 2:
            lines[at] = " " * rng.randrange(5) + lines[at].strip()
        elif kind == 3 and ":" in lines[at]:
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(ODD_VALUES)
        elif kind == 4 and lines[at].strip():
            position = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:position] + rng.choice(":{}[],&*#?|-<>=!%@`\\\t'\"é\x07") + lines[at][position:]
        elif kind == 5 and len(lines[at]) > 2:
            position = rng.randrange(len(lines[at]) - 1)
            lines[at] = lines[at][:position] + lines[at][position + 1] + lines[at][position] + lines[at][position + 2 :]
        elif kind == 6 and ":" in lines[at]:
            lines[at] = lines[at].replace(":", rng.choice("xyz") + ":", 1)
        else:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        text = "\n".join(lines)
    return text


def damaged_bytes(rng, data):
    """Cut, flipped, overwritten, doubled or shuffled."""
    data, kind = bytearray(data), rng.randrange(6)
    at, length = rng.randrange(len(data)), rng.randint(1, 200)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at : at + length] = rng.randbytes(length)
    elif kind == 3:
        data[at : at + length] = bytes(length)
    elif kind == 4:
        data[at:at] = rng.randbytes(length)
    else:
        other = rng.randrange(len(data))
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    return bytes(data)


def cases(seed, count, data, damage):
    """`count` different damaged versions."""
    rng, seen = random.Random(seed), {data}
    while len(seen) <= count:
        version = damage(rng, data)
        if version not in seen:
            seen.add(version)
            yield version


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run of one epoch, and the arguments it was started with."""
    storage = tmp_path_factory.mktemp("small")
    overrides = ["training.epochs=1", "data.train_examples=150", "data.test_examples=20", "data.validation_examples=20"]
    overrides += ["model.width=4", "base_learners.linf.attack.num_steps=1", "evaluation.attack.num_steps=1"]
    overrides += ["checkpoint.every_steps=1", "checkpoint.keep=1", "global_learner.warmup_epochs=0"]
    genray.train(None, overrides, runtime="local", storage=str(storage))
    return storage, overrides


def test_checkpoints(small, capsys):
    storage, overrides = small
    (state,) = (storage / "digits" / "checkpoints").iterdir()
    whole, results = state.read_bytes(), storage / "digits" / "results.json"
    ended = results.read_bytes()
    results.unlink()  # a finished run needs no checkpoint
    try:
        for number, data in enumerate(cases(1, STATES, whole, damaged_bytes)):
            state.write_bytes(data)
            with pytest.raises(CheckpointError, match="not a readable checkpoint|no whole checkpoint") as caught:
                RunFolder(str(storage), "digits").read_newest_state()
            assert str(state) in str(caught.value)
            if number % 4 == 0:  # through the command, which takes longer
                before = untouched(storage)
                code, err = run(capsys, "--resume", "--runtime", "local", "--storage", storage, *overrides)
                assert (code, err.count("\n")) == (2, 1), err
                assert str(state) in err
                assert untouched(storage) == before
    finally:
        state.write_bytes(whole)
        results.write_bytes(ended)


def test_models(small, tmp_path):
    """Refused by name, or (where only the seal is gone) what it was."""
    model = small[0] / "digits" / "model.pt"
    expected, refused = genray.load_model(model).state_dict(), 0
    for data in cases(2, MODELS, model.read_bytes(), damaged_bytes):
        (tmp_path / "model.pt").write_bytes(data)
        try:
            got = genray.load_model(tmp_path / "model.pt").state_dict()
            assert all(torch.equal(got[key], expected[key]) for key in expected)
        except CheckpointError as error:
            assert str(tmp_path / "model.pt") in str(error)
            refused += 1
    assert refused > 0.9 * MODELS


def test_stored_configurations(small, tmp_path):
    """`config.yaml` of a run to go on with: refused by name or understood, never executed."""
    text = (small[0] / "digits" / "config.yaml").read_text()
    config = load_config(None, small[1])
    folder = RunFolder(str(tmp_path), "digits")
    folder.storage.write("config.yaml", text.encode())
    folder.check_resumable(config)
    refused = 0
    for damaged in cases(3, STORED, text, damaged_text):
        folder.storage.write("config.yaml", damaged.encode())
        try:
            folder.check_resumable(config)
        except RunFolderError as error:
            assert "digits" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > STORED / 2


def test_parquet_files(tmp_path):
    """Either refused by name, or still images and labels (a flipped bit in a label is a label)."""
    noise = np.random.default_rng(0)

    def png():
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": ""}

    for part, count in (("train", 40), ("test", 10)):
        table = pa.table({"image": pa.array([png() for _ in range(count)]), "label": np.arange(count) % 4})
        pq.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    file, refused = tmp_path / "train-00000-of-00001.parquet", 0
    for data in cases(4, PARQUETS, file.read_bytes(), damaged_bytes):
        file.write_bytes(data)
        try:
            found = load_image_data("parquet", path=tmp_path).train
            assert found.images.shape[1:] == (1, 8, 8) and len(found.images) == len(found.labels)
        except DataError as error:
            assert "parquet" in str(error) or "class" in str(error) or "label" in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused > PARQUETS / 2
