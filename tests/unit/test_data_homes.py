"""Images in memory, in a mapped file and in image files give the same batches, whoever decodes them and how often."""

import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, descendants, run_outcome, wait_for
from PIL import Image
from test_bad_input import check, run

import genray
from genray.config import load_config
from genray.core import rng
from genray.data import home_choice
from genray.data.augment import Augmentation
from genray.data.cache import Stored
from genray.data.datasets import load_image_data
from genray.data.fingerprint import digests
from genray.data.home_choice import choose_home
from genray.data.homes import Joined, Mapped, Resident
from genray.data.loader import BatchLoader
from genray.data.splits import Split
from genray.errors import DataError
from genray.learners.crafting import Source
from genray.recording import RunRecorder
from genray.run.setup import prepare

SIDE, EACH, CLASSES = 8, 9, ("a", "b", "c")
AUGMENTATION = Augmentation(crop_padding=1, flip=True)
WAYS = [("resident", 0), ("mapped", 0), ("files", 0), ("files", 1), ("files", 2)]


def jpeg(number):
    """Of a size of its own, every fifth one grey."""
    noise, size = np.random.default_rng(number), (SIDE + number % 5, SIDE + number % 3)
    pixels = noise.integers(0, 256, size if number % 5 == 4 else (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/<class>/NN.jpg and test/<class>/NN.jpg."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(CLASSES):
        for part, first, count in (("train", 0, EACH), ("test", 500, 3)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                (root / part / name / f"{i:02d}.jpg").write_bytes(jpeg(first + 100 * label + i))
    return root


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """The same images, in the order in which a folder is read, in two files of several row groups."""
    root = tmp_path_factory.mktemp("parquet")
    for part, first, count in (("train", 0, EACH), ("test", 500, 3)):
        rows = [(jpeg(first + 100 * label + i), label) for i in range(count) for label in range(3)]
        for shard in range(2):
            some = rows[shard * 7 :][: 7 if shard == 0 else None]
            table = pa.table({"image": [{"bytes": blob} for blob, _ in some], "label": [label for _, label in some]})
            pq.write_table(table, root / f"{part}-0000{shard}-of-00002.parquet", row_group_size=3)
    return root


def by_pillow(number):
    image = Image.open(io.BytesIO(jpeg(number)))
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def expected_batch(step, *, seed=4, key="k", batch_size=7):
    """By Pillow and the keyed order, one image after another."""
    numbers = [(100 * label + i, label) for i in range(EACH) for label in range(3)]
    epoch, position = divmod(step, -(-len(numbers) // batch_size))
    order = torch.randperm(len(numbers), generator=rng.generator("cpu", seed, key, "order", epoch)).tolist()
    chosen = [numbers[i] for i in order[position * batch_size :][:batch_size]]
    images = torch.stack([by_pillow(number) for number, _ in chosen])
    images = AUGMENTATION(images, rng.generator("cpu", seed, key, "augmentation", step))
    return images.float() / 255, torch.tensor([label for _, label in chosen])


def opened(path, home, cache, **options):
    source = "parquet" if list(path.glob("*.parquet")) else "image_folder"
    return load_image_data(source, path=path, image_size=(SIDE, SIDE), home=home, cache=str(cache), **options)


def loader(split, workers=0, batch_size=7):
    keys = {"seed": 4, "order_key": "k", "augmentation_key": "k", "augmentation": AUGMENTATION, "device": "cpu"}
    return BatchLoader(split, batch_size=batch_size, decoding_workers=workers, **keys)


@pytest.mark.parametrize(("home", "workers"), WAYS)
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_batches_are_those_of_slow_code(tmp_path, request, kind, home, workers):
    """Two epochs with a short batch, then steps that do not follow, as after a resume."""
    data = opened(request.getfixturevalue(kind), home, tmp_path)
    batches, again = loader(data.train, workers), loader(data.train, workers)
    for source, steps in ((batches, range(8)), (batches, (3, 4)), (again, (6, 7, 1))):
        for step in steps:
            images, labels = source.batch(step)
            x, y = expected_batch(step)
            assert torch.equal(images, x) and torch.equal(labels, y)
    test = data.test.take(slice(2, 5))
    assert test[1].tolist() == [2, 0, 1] and torch.equal(test[0][0], by_pillow(500 + 200))
    assert data.test.home.nbytes == (9 * 3 * SIDE**2 if home == "resident" else 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_decode(folder, tmp_path, workers):
    """As many as the configuration says, for as long as batches are taken."""
    config = load_config(None, options(folder, "files", tmp_path, workers))
    setup, before = prepare(config), descendants(os.getpid())
    source = Source("natural", setup.plan, setup.splits["train"], "cpu")
    source.batch(0)
    assert len(descendants(os.getpid()) - before) == workers
    del source
    wait_for(lambda: descendants(os.getpid()) <= before, "the end of the decoding processes")


def test_the_global_generator_is_left_alone(folder, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loader(opened(folder, "files", tmp_path).train, workers=1).batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_split_has_no_tensor_outside_data():
    """Code that takes `.images` of a split holds all of them."""
    of_a_split = re.compile(r"(split|splits\[.*\]|train|test|validation|examples|data)\.images\b")
    for file in (ROOT / "genray").rglob("*.py"):
        assert file.parent.name == "data" or not of_a_split.search(file.read_text())


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = [
    "model={name: small_cnn, width: 4}",
    "training.epochs=2",
    "training.batch_size=6",
    "data.validation_examples=3",
    "base_learners.linf.attack.num_steps=1",
    "base_learners.natural.augmentation={crop_padding: 1, flip: true}",
    "base_learners.linf.data_order=own",
    "global_learner.warmup_epochs=0",
    "global_learner.sync_unit=step",
    "global_learner.sync_every=2",
    "global_learner.batch_norm=reestimate",
    "evaluation.attack.num_steps=1",
    "checkpoint.every_steps=2",
]


def options(path, home, cache, workers=1):
    data = {"source": "image_folder", "path": str(path), "image_size": [SIDE, SIDE], "home": home}
    data |= {"cache": str(cache), "decoding_workers": workers}
    return [*RUN, *(f"data.{name}={json.dumps(value)}" for name, value in data.items())]


@pytest.fixture(scope="module")
def resident_run(folder, tmp_path_factory):
    storage = tmp_path_factory.mktemp("resident")
    genray.train(None, options(folder, "resident", storage), runtime="local", storage=str(storage))
    return storage / "digits"


@pytest.mark.parametrize(("home", "workers"), WAYS[1:4])
def test_a_run_stopped_within_an_epoch_ends_as_the_resident_one(
    folder, resident_run, tmp_path, monkeypatch, home, workers
):
    overrides, done = options(folder, home, tmp_path / "cache", workers), RunRecorder.window_done

    def stop_in_epoch_two(self, window, *args):
        if window.stop == 6:
            raise KeyboardInterrupt
        done(self, window, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "window_done", stop_in_epoch_two)
        with pytest.raises(KeyboardInterrupt):
            genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    if home == "mapped":  # may be another place, and another number of processes
        overrides = options(folder, home, tmp_path / "elsewhere", 0)
    genray.train(None, overrides, runtime="local", storage=str(tmp_path), resume=True)
    assert run_outcome(tmp_path / "digits") == run_outcome(resident_run)
    marks = [json.loads((run / "data.json").read_text()) for run in (tmp_path / "digits", resident_run)]
    assert (marks[0] == marks[1]) == (home == "mapped")


@pytest.mark.ray
@pytest.mark.parametrize(("home", "workers"), [("mapped", 0), ("files", 1)])
def test_actors_find_the_images_where_they_are(folder, resident_run, tmp_path, on_ray, home, workers):
    overrides = options(folder, home, tmp_path / "cache", workers)
    genray.train(None, overrides, runtime="ray", storage=str(tmp_path))
    assert run_outcome(tmp_path / "digits") == run_outcome(resident_run)


def test_python_ends_without_a_word(folder, tmp_path):
    """The processes that decode are ended before Python ends its children by signals, whoever holds them."""
    code = f"""
import sys
sys.path += {sys.path!r}
from test_data_homes import loader, opened
batches = loader(opened(__import__("pathlib").Path({str(folder)!r}), "files", {str(tmp_path)!r}).train, 2)
batches.batch(0)
batches.itself = batches
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# --- cache files ------------------------------------------------------------------------------------------------------


def test_a_file_is_made_once(folder, tmp_path, monkeypatch):
    """Four processes at the same time, then this one: nobody writes it anew."""
    make = Stored._make

    def noted(self, *args):
        with open(tmp_path / "made", "a") as file:
            file.write(f"{self.part}\n")
        time.sleep(1)  # all of them are there by then
        make(self, *args)

    monkeypatch.setattr(Stored, "_make", noted)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=opened, args=(folder, "mapped", tmp_path / "new")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted((tmp_path / "made").read_text().split()) == ["test", "train"]
    files = sorted(file for file in (tmp_path / "new").iterdir() if file.suffix != ".lock")
    assert [file.suffix for file in files] == [".pixels"] * 2  # train and test, and nothing that is half written
    before = [file.stat() for file in files]
    split = opened(folder, "mapped", tmp_path / "new").train
    assert [file.stat() for file in files] == before
    assert torch.equal(split.images, opened(folder, "resident", tmp_path).train.images)


@pytest.mark.parametrize(("kind", "home"), [("folder", "mapped"), ("folder", "files"), ("parquet", "files")])
def test_another_node_makes_its_own_file(tmp_path, request, kind, home):
    """What is sent holds no images; where the file is missing, it is made; one of other images is refused."""
    path = request.getfixturevalue(kind)
    split = opened(path, home, tmp_path).train.select(torch.tensor([20, 3, 11]))
    sent, images, labels = pickle.dumps(split, protocol=5), *split.take()
    assert torch.equal(images, torch.stack([by_pillow(number) for number in (206, 1, 203)]))
    for file in tmp_path.glob("*-train-*"):
        file.unlink()
    found = pickle.loads(sent).take()
    assert torch.equal(found[0], images) and torch.equal(found[1], labels)
    assert images[1].numpy().tobytes() not in sent and jpeg(1) not in sent
    for made in tmp_path.glob("*-train-*d"):  # encoded; the pixels below
        made.write_bytes(made.read_bytes().replace(b'"content": "', b'"content": "0', 1))
        with pytest.raises(DataError, match="holds others"):
            pickle.loads(sent)


def test_a_file_of_other_data_is_refused(folder, tmp_path, capsys):
    other = tmp_path / "images"
    for file in folder.rglob("*.jpg"):
        target = other / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    opened(other, "mapped", tmp_path / "cache")
    (other / "train/b/03.jpg").write_bytes(jpeg(777))
    (cached,) = (tmp_path / "cache").glob("image_folder-train-*.pixels")
    overrides = options(other, "mapped", tmp_path / "cache")
    check(capsys, tmp_path, f"data.cache: expected the train images of image_folder {other} (", *overrides)
    cached.write_bytes(cached.read_bytes()[:100])
    check(capsys, tmp_path, f"{cached} is damaged; remove it", *overrides)
    cached.unlink()
    assert torch.equal(opened(other, "mapped", tmp_path / "cache").train.images[10], by_pillow(777))
    (tmp_path / "file").write_text("")
    check(capsys, tmp_path, "data.cache: cannot write", *options(other, "mapped", tmp_path / "file"))


# --- broken files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder, tmp_path):
    """The folder with the fourth file of class b cut off, and the same without it."""
    for name in ("broken", "without"):
        for file in folder.rglob("*.jpg"):
            target = tmp_path / name / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    cut = tmp_path / "broken/train/b/03.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "without/train/b/03.jpg").unlink()
    return tmp_path / "broken", cut


@pytest.mark.parametrize(("home", "workers"), WAYS[1:])
def test_a_broken_file_is_named(broken, tmp_path, capsys, home, workers):
    path, cut = broken
    overrides = [*options(path, home, tmp_path / "cache", workers), "data.validation_examples=0"]
    found = run("--runtime", "local", "--storage", tmp_path / "runs", *overrides, "evaluation.select_on=test")
    err = capsys.readouterr().err
    assert found == 2 and err.splitlines()[-1].startswith(f"error: {cut}: expected an image file with 8 bits a channel")
    assert {file.suffix for file in (tmp_path / "cache").glob("*-train-*")} <= {".lock"}  # nothing half-written


@pytest.mark.parametrize("home", ["resident", "mapped", "files"])
def test_broken_files_are_left_out_counted_and_recorded(broken, tmp_path, home):
    path, cut = broken
    whole = opened(path.parent / "without", "resident", tmp_path)
    for _ in range(2):  # the second time from a file, where there is one
        data = opened(path, home, tmp_path / "cache", on_broken="skip")
        assert torch.equal(data.train.labels.bincount(), whole.train.labels.bincount())
        numbers = [label * 100 + i for i in range(EACH) for label in range(3) if (label, i) != (1, 3)]
        assert torch.equal(data.train.images, torch.stack([by_pillow(number) for number in numbers]))
        assert data.train.labels.tolist() == [number // 100 for number in numbers]
        assert data.notes == (f"left out: 1 broken train image ({cut})",)
    overrides = [*options(path, home, tmp_path / "cache"), "data.on_broken=skip"]
    genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    assert json.loads((tmp_path / "digits/data.json").read_text())["train"]["examples"] == 3 * EACH - 1 - 3
    assert json.loads((tmp_path / "digits/data.json").read_text())["train"]["broken"] == ["train/b/03.jpg"]


# --- extra images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["resident", "mapped"])
def test_extra_images_at_a_share_of_seven_tenths(tmp_path, home):
    """Against a computation by hand: 7 of 10 images of a batch are the next of the extra ones in their own order."""
    noise = np.random.default_rng(3)
    image, label = noise.integers(0, 256, (50, 8, 8, 1), dtype=np.uint8), np.arange(50) % 10
    np.savez(tmp_path / "x.npz", image=image, label=label, pseudo=np.arange(50) % 2 == 0)
    extra = f"data.extra={{source: npz, path: {tmp_path}/x.npz, batch_share: 0.7}}"
    cached = [f"data.home={home}", f"data.cache={tmp_path}/cache", "data.train_examples=300", "training.batch_size=10"]
    setup = prepare(load_config(None, [*cached, extra, "data.validation_examples=100", "seed=5"]))
    plain = prepare(load_config(None, ["data.train_examples=300", "data.validation_examples=100"])).splits["train"]
    train, own, given = setup.splits["train"], plain.images, torch.from_numpy(image).permute(0, 3, 1, 2)
    assert len(own) == setup.plan.num_train == 200 and len(train) == 250
    assert isinstance(train.home, Resident if home == "resident" else Joined)

    def stream(name, size):
        passes = [torch.randperm(size, generator=rng.generator("cpu", 5, "shared", "order", name, i)) for i in range(9)]
        return iter(torch.cat(passes).tolist())

    next_own, next_extra = stream("own", 200), stream("extra", 50)
    source = Source("natural", setup.plan, train, "cpu")
    for step in range(25):  # into the second epoch, and the fourth pass over the extra images
        of_extra, of_own = [next(next_extra) for _ in range(7)], [next(next_own) for _ in range(3)]
        batch = source.batch(step)
        assert torch.equal(batch.x, torch.cat([given[of_extra], own[of_own]]).float() / 255)
        assert batch.y.tolist() == [*label[of_extra], *plain.labels[of_own].tolist()]
        assert batch.labelled.tolist() == [i % 2 == 1 for i in of_extra] + [True] * 3
    assert list(train.home.digests()) == digests(torch.cat([own, given]))
    if home == "mapped":
        assert train.home.nbytes == 0 and isinstance(pickle.loads(pickle.dumps(train)).home.homes[1], Mapped)


# --- the choice -------------------------------------------------------------------------------------------------------


def test_auto_chooses_by_size_and_says_so(monkeypatch, folder, tmp_path):
    assert choose_home("auto", 10, str(tmp_path), True) == ("resident", "")
    monkeypatch.setattr(home_choice, "free_memory", lambda: 3000)
    assert choose_home("auto", 1500, str(tmp_path), True) == ("resident", "")
    assert choose_home("resident", 10**9, str(tmp_path), True) == ("resident", "")
    home, says = choose_home("auto", 1501, str(tmp_path), True)
    assert home == "mapped" and says.startswith(f"data.home: mapped to a file in {tmp_path}, since the images take")
    assert choose_home("auto", 10**18, str(tmp_path), True)[0] == "files"
    assert choose_home("auto", 10**18, str(tmp_path), False)[0] == "mapped"
    data = opened(folder, "auto", tmp_path)
    assert isinstance(data.train.home, Mapped) and len(data.notes) == 1 and "free" in data.notes[0]


def test_homes_that_a_source_cannot_have(capsys, tmp_path):
    check(capsys, tmp_path, "data.home: expected auto, resident or mapped with source digits", "data.home=files")
    with pytest.raises(DataError, match='data.home: expected resident or mapped, since "digits" has no image files'):
        load_image_data("digits", home="files", cache=str(tmp_path))


def test_grey_files_with_a_coloured_one(tmp_path):
    """Decoded, all become colours; file by file, the coloured one is named."""
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                mode = "RGB" if (part, name, i) == ("train", "b", 2) else "L"
                Image.new(mode, (4, 4), 10 * i).save(tmp_path / part / name / f"{i}.png")
    whole = load_image_data("image_folder", path=tmp_path)
    mapped = load_image_data("image_folder", path=tmp_path, home="mapped", cache=str(tmp_path / "cache"))
    for part in ("train", "test"):
        one, other = getattr(whole, part), getattr(mapped, part)
        assert one.shape == other.shape == (3, 4, 4) and torch.equal(one.images, other.images)
        assert list(one.home.digests()) == list(other.home.digests())
    files = load_image_data("image_folder", path=tmp_path, home="files", cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="train/b/2.png: expected a grey image like the first, came colours"):
        files.train.take()
    assert isinstance(files.train, Split) and files.train.take(slice(2))[0].shape == (2, 1, 4, 4)


@pytest.mark.parametrize("home", ["resident", "mapped", "files"])
def test_broken_rows_of_parquet(tmp_path, home):
    """The first one, one that is cut off and one that is null."""
    blobs = [b"no image", *(jpeg(number) for number in range(1, 9))]
    blobs[3], blobs[6] = blobs[3][:200], None
    for part in ("train", "test"):
        table = {"image": [{"bytes": blob} for blob in blobs], "label": [i % 2 for i in range(9)]}
        pq.write_table(pa.table(table), tmp_path / f"{part}-00000-of-00001.parquet", row_group_size=2)
    with pytest.raises(DataError, match="train-00000-of-00001.parquet, row 0: expected an image file"):
        opened(tmp_path, home, tmp_path / "cache")
    data = opened(tmp_path, home, tmp_path / "cache", on_broken="skip")
    assert torch.equal(data.train.images, torch.stack([by_pillow(number) for number in (1, 2, 4, 5, 7, 8)]))
    assert data.train.labels.tolist() == [1, 0, 0, 1, 1, 0]
    assert data.broken["train"] == [f"train-00000-of-00001.parquet, row {row}" for row in (0, 3, 6)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_of_another_size_is_named(folder, tmp_path, workers):
    """Only when it is decoded; the first test image has the size of the first training image."""
    shutil.copytree(folder / "train", tmp_path / "train")
    shutil.copytree(folder / "train", tmp_path / "test")
    data = load_image_data("image_folder", path=tmp_path, home="files", cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"\d\d.jpg: expected \d+x\d+ pixels \(H x W\) like the first image, came"):
        loader(data.train, workers).batch(0)
