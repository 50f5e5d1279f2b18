"""What a data set is known by: fingerprints in a run's records, and what they keep apart or together."""

import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import genray
from genray.core import memory
from genray.data.datasets import load_image_data
from genray.data.fingerprint import fingerprint, identify
from genray.data.splits import Split
from genray.errors import DataError, RunFolderError
from genray.recording import RunFolder
from genray.reporting.comparison import comparisons
from genray.reporting.found import find
from genray.training import dry_run

CONFIG = {
    "name": "a",
    "data": {"source": "image_folder", "validation_examples": 4},
    "model": {"name": "small_cnn", "width": 4},
    "training": {"epochs": 1, "batch_size": 16},
    "global_learner": {"gamma": 0.5},
    "evaluation": {"attack": {"num_steps": 1}},
    "base_learners": {
        "natural": {"objective": "natural", "lr": 0.01},
        "linf": {
            "objective": "adversarial",
            "lr": 0.01,
            "attack": {"norm": "linf", "epsilon": "8/255", "step_size": "2/255", "num_steps": 1},
        },
    },
}


def picture(label, index, kind="PNG"):
    pixels = np.random.default_rng(999 * label + index).integers(0, 60, (8, 8, 3), dtype=np.uint8)
    pixels[:4] += np.uint8(150 * label)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tree(folder, swapped=False):
    """12 training and 6 test images a class; the test images of the classes may be swapped."""
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                shown = 1 - label if swapped and part == "test" else label
                (folder / part / name / f"{i:03}.png").write_bytes(picture(shown, i + 500 * (part == "test")))
    return folder


def train(storage, path, name="a", seed=0, **options):
    overrides = {"name": name, "data.path": str(path), "seed": seed}
    return genray.train(CONFIG, overrides, storage=storage, runtime="local", **options)


# --- fingerprints -----------------------------------------------------------------------------------------------------

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 5, 4), dtype=np.uint8))
LABELS = torch.arange(50) % 7


def test_equal_images_have_equal_fingerprints_however_they_are_held():
    mark = fingerprint(IMAGES, LABELS)
    assert len(mark) == 16 and int(mark, 16)
    same = IMAGES.to(memory_format=torch.channels_last)
    for images in (same, IMAGES.float() / 255, IMAGES.double() / 255, (IMAGES.float() / 255).numpy()):
        assert fingerprint(torch.as_tensor(images), LABELS) == mark
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert fingerprint(IMAGES[order], LABELS[order]) == mark
    ordered = fingerprint(IMAGES, LABELS, ordered=True)
    assert ordered == fingerprint(same, LABELS, ordered=True) != fingerprint(IMAGES[order], LABELS[order], ordered=True)


def test_other_images_or_labels_have_other_fingerprints():
    one_pixel, one_label = IMAGES.clone(), LABELS.clone()
    one_pixel[49, 2, 4, 3] ^= 1
    one_label[0] = 6
    float_between = IMAGES.float() / 255 + 1e-4
    others = [
        (one_pixel, LABELS),
        (IMAGES, one_label),
        (IMAGES[:49], LABELS[:49]),
        (IMAGES, LABELS.roll(1)),
        (IMAGES.view(50, 3, 4, 5), LABELS),
        (float_between, LABELS),
    ]
    marks = {fingerprint(*other) for other in others} | {fingerprint(IMAGES, LABELS)}
    assert len(marks) == len(others) + 1


def test_test_images_among_the_training_images_are_counted():
    train, test = Split(IMAGES[:30], LABELS[:30]), Split(torch.cat([IMAGES[25:40], IMAGES[45:]]), LABELS[:20])
    record, notes = identify({"train": train, "validation": Split(IMAGES[45:47], LABELS[45:47]), "test": test})
    assert notes == ["7 of 20 test images are training images too"]
    assert {part: entry["examples"] for part, entry in record.items()} == {"train": 30, "validation": 2, "test": 20}


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on pets (and on a copy elsewhere), and on other images in a folder of the same name."""
    home = tmp_path_factory.mktemp("same")
    pets, xray = tree(home / "pets/data"), tree(home / "xray/data", swapped=True)
    shutil.copytree(pets, home / "copied")
    for name, path, seed in (("pets", pets, 0), ("xray", xray, 0), ("copy", home / "copied", 1)):
        train(home / "runs", path, name, seed)
    return home


def test_a_report_tells_data_apart_by_their_images(runs, tmp_path):
    """`data` and `data` are two comparisons, `data` and `copied` with the same images are one."""
    made = comparisons(find([str(runs / "runs")]))
    marks = {
        name: json.loads((runs / f"runs/{name}/results.json").read_text())["protocol"]["fingerprint"]
        for name in ("pets", "xray", "copy")
    }
    assert marks["pets"] == marks["copy"] != marks["xray"]
    rows = {
        comparison.setting.data: [e.label for group in comparison.groups for e in group.entries] for comparison in made
    }
    assert sorted(map(sorted, rows.values())) == [["copy", "pets"], ["xray"]]
    assert f"data ({marks['xray'][:6]})" in rows

    older = tmp_path / "runs"  # without fingerprints the names are all that is known
    shutil.copytree(runs / "runs", older)
    for name in marks:
        results = json.loads((older / f"{name}/results.json").read_text())
        del results["protocol"]["fingerprint"]
        (older / f"{name}/results.json").write_text(json.dumps(results))
    assert sorted(comparison.setting.data for comparison in comparisons(find([str(older)]))) == ["copied", "data"]


def test_the_protocol_hash_is_of_the_images(runs):
    model = genray.load_model(runs / "runs/pets")
    hashes = {}
    for name in ("pets/data", "xray/data", "copied"):
        test = load_image_data("image_folder", path=runs / name).test
        for images in (test.images, test.images.float() / 255):
            record = genray.evaluate(model, images, test.labels, attacks="pgd20", norms="linf")
            hashes.setdefault(name, set()).add(record["protocol"]["hash"])
    assert hashes["pets/data"] == hashes["copied"] != hashes["xray/data"]
    assert all(len(found) == 1 for found in hashes.values())


@pytest.mark.parametrize("change", ["an image fewer", "another pixel", "a test label"])
def test_a_run_does_not_go_on_with_other_data(runs, tmp_path, change):
    storage, data = tmp_path / "runs", tmp_path / "moved"
    shutil.copytree(runs / "runs", storage)
    shutil.copytree(runs / "pets/data", data)
    (storage / "pets/results.json").unlink()
    train(storage, data, "pets", resume=True)  # the same images elsewhere
    (storage / "pets/results.json").unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in storage.rglob("*") if path.is_file()}
    if change == "an image fewer":
        for name in ("cat", "dog"):
            (data / "train" / name / "000.png").unlink()
    elif change == "another pixel":
        (data / "train/cat/000.png").write_bytes(picture(1, 77))
    else:
        (data / "test/cat/000.png").rename(data / "test/dog/100.png")
    part = "test" if change == "a test label" else "train"
    with pytest.raises(RunFolderError, match=f"not those the run began with: {part} had .* images") as caught:
        train(storage, data, "pets", resume=True)
    assert caught.value.exit_code == 2
    assert before == {path: path.read_bytes() for path in storage.rglob("*") if path.is_file()}
    (storage / "pets/data.json").unlink()  # a run of an older genray
    train(storage, data, "pets", resume=True)


# --- columns, counts and memory before anything is decoded ------------------------------------------------------------


def parquet(folder, blobs, column="image"):
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        table = pa.table({column: blobs, "label": np.arange(len(blobs)) % 2, "fold": np.arange(len(blobs)) // 2 % 2})
        pq.write_table(table, folder / f"{part}.parquet")
    return folder


def plan_of(path, *overrides):
    changes = [f"data.path={path}", "data.source=parquet", *overrides]
    return dry_run(CONFIG, changes, None, "local", None)


def not_measured(text):
    return [line for line in text.splitlines() if not re.search("free on this machine|^time  |^memory  ", line)]


def test_a_dry_run_decodes_the_first_image_only(tmp_path):
    good = [picture(i % 2, i) for i in range(40)]
    text = plan_of(parquet(tmp_path / "x", [good[0], *[b"no image"] * 39]))
    assert "36 train, 4 validation, 40 test; 3x8x8 like the first image, 2 classes" in text
    assert "image column image, label column label" in text and "label_column: label" in text
    assert not_measured(plan_of(parquet(tmp_path / "x", good))) == not_measured(text)
    with pytest.raises(DataError, match=r"train\.parquet, row 0: expected an image file"):
        plan_of(parquet(tmp_path / "y", [b"no image"] * 40))


def test_what_does_not_fit_into_memory_is_refused_before_it_is_decoded(tmp_path):
    path = parquet(tmp_path / "x", [picture(0, 0), *[b"no image"] * 39])
    huge = {"data.source": "parquet", "data.path": str(path), "data.image_size": [200_000, 200_000]}
    huge["data.home"] = "resident"
    with pytest.raises(DataError, match=r"data: 40 train images and 40 test images") as caught:
        genray.train(CONFIG, huge, storage=tmp_path / "runs", runtime="local")
    needed = 80 * 3 * 200_000**2
    assert f"({needed:,} bytes) of memory, expected at most the" in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2 and not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match=rf"twice take .*\({2 * needed:,} bytes\)"):
        genray.train(CONFIG, huge, storage=tmp_path / "runs")
    assert f"images take 0.01 MiB ({80 * 3 * 8 * 8:,} bytes) of memory, " in plan_of(path)


def test_columns_are_named_in_the_runs_folder_and_may_be_left_to_it(tmp_path):
    path = parquet(tmp_path / "x", [picture(i % 2, i) for i in range(40)])
    overrides = {"data.source": "parquet", "data.path": str(path)}
    genray.train(CONFIG, overrides, storage=tmp_path, runtime="local")
    stored = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert (stored["data"]["image_column"], stored["data"]["label_column"]) == ("image", "label")
    (tmp_path / "a/results.json").unlink()
    genray.train(CONFIG, overrides, storage=tmp_path, runtime="local", resume=True)
    folder = RunFolder(tmp_path, "a")
    with pytest.raises(RunFolderError, match="data.label_column was label, is fold"):
        other = overrides | {"data.label_column": "fold"}
        genray.train(CONFIG, other, storage=tmp_path, runtime="local", resume=True)
    assert folder.storage.exists("results.json")


# --- memory -----------------------------------------------------------------------------------------------------------


def machine(root, available, **files):
    """A machine's files, as proc(5) and the kernel's cgroup documentation describe them."""
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {available} kB\n"} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_is_the_least_that_is_left(tmp_path):
    assert memory.free_memory(tmp_path / "none") is None
    assert memory.free_memory(machine(tmp_path / "plain", 1000)) == 1000 * 1024
    group = "sys/fs/cgroup/job"
    second = {
        "proc/self/cgroup": "0::/job/step\n",
        f"{group}/step/memory.max": "max\n",
        f"{group}/step/memory.current": "5\n",
        f"{group}/memory.max": "700000\n",
        f"{group}/memory.current": "600000\n",
        f"{group}/memory.stat": "anon 1\ninactive_file 50000\n",
    }
    assert memory.free_memory(machine(tmp_path / "v2", 1000, **second)) == 150_000
    assert memory.free_memory(machine(tmp_path / "v2", 100)) == 102_400
    group = "sys/fs/cgroup/memory"
    first = {
        "proc/self/cgroup": "4:cpu:/\n3:memory:/docker/x\n0::/\n",
        f"{group}/memory.limit_in_bytes": "300000\n",  # in a container the group's own path is the host's
        f"{group}/memory.usage_in_bytes": "400000\n",
        f"{group}/memory.stat": "total_inactive_file 150000\n",
    }
    assert memory.free_memory(machine(tmp_path / "v1", 1000, **first)) == 50_000
    (tmp_path / "v1" / group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory.free_memory(tmp_path / "v1") == 1000 * 1024
