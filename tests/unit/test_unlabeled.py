"""Training images without labels: dropped labels, images of another source, batches with a share of them."""

import io
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_bad_input import check

from genray.config import load_config
from genray.core import rng
from genray.data.datasets import load_image_data, validation_split
from genray.data.loader import BatchLoader
from genray.data.order import Shares
from genray.data.reading import Reading
from genray.data.splits import Split
from genray.data.unlabeled import dropped_labels, load_unlabeled
from genray.errors import DataError
from genray.models import build_model
from genray.run.setup import prepare

# --- dropped labels ---------------------------------------------------------------------------------------------------

LABELS = torch.from_numpy(np.random.default_rng(0).choice(5, 400, p=[0.4, 0.3, 0.2, 0.06, 0.04]))


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.905])
def test_each_class_loses_the_same_share(fraction):
    dropped = dropped_labels(LABELS, fraction, True, 0)
    assert dropped.sum() == int(400 * fraction + 0.5)
    for label in range(5):
        mine = LABELS == label
        assert abs(int(dropped[mine].sum()) - fraction * int(mine.sum())) < 1
    assert torch.equal(dropped, dropped_labels(LABELS, fraction, True, 0))
    assert not torch.equal(dropped, dropped_labels(LABELS, fraction, True, 1))


def test_an_unbalanced_choice_does_not_look_at_labels():
    dropped = dropped_labels(LABELS, 0.3, False, 0)
    assert dropped.sum() == 120
    assert torch.equal(dropped, dropped_labels(LABELS.flip(0), 0.3, False, 0))
    counts = [int(dropped_labels(LABELS, 0.3, False, seed)[LABELS == 0].sum()) for seed in range(40)]
    assert 0.27 < sum(counts) / 40 / int((LABELS == 0).sum()) < 0.33 and len(set(counts)) > 5


def test_one_half_takes_each_image_about_as_often():
    often = sum(dropped_labels(LABELS, 0.5, True, seed).double() for seed in range(200)) / 200
    assert abs(often.mean() - 0.5) < 0.01 and often.min() > 0.3 and often.max() < 0.7


@pytest.mark.parametrize(("fraction", "balanced"), [(0.0001, True), (0.9999, False), (0.99, True)])
def test_too_few_labels(fraction, balanced):
    with pytest.raises(DataError, match=r"data\.unlabeled\.fraction: expected to (drop|keep)"):
        dropped_labels(LABELS, fraction, balanced, 0)


def setup_with(*overrides):
    base = ["data.validation_examples=100", "data.unlabeled={source: fraction, fraction: 0.25}"]
    return prepare(load_config(None, [*base, *overrides]))


def test_the_validation_part_keeps_out():
    train, validation = validation_split(load_image_data("digits").train, 100, 0)
    setup = setup_with()
    mixed = setup.splits["train"]
    assert torch.equal(mixed.images, train.images) and torch.equal(setup.splits["validation"].images, validation.images)
    assert (~mixed.labelled).sum() == round(0.25 * len(train)) == len(setup.dropped_labels)
    assert torch.equal(mixed.labels, torch.where(mixed.labelled, train.labels, -1))
    assert torch.equal(setup.dropped_labels, train.labels[~mixed.labelled])
    assert setup.plan.num_train == len(train) == 1337


def test_share_zero_leaves_the_labelled_images():
    mixed, alone = setup_with().splits["train"], setup_with("data.unlabeled.batch_share=0")
    train = alone.splits["train"]
    assert torch.equal(train.images, mixed.images[mixed.labelled])
    assert torch.equal(train.labels, mixed.labels[mixed.labelled])
    assert train.labelled is None and alone.plan.num_train == len(mixed)


# --- batches with a share ---------------------------------------------------------------------------------------------


def numbered(mask):
    """A split whose images carry their number and whose labels say whether they are labelled."""
    numbers = torch.arange(len(mask))
    images = torch.stack([numbers % 256, numbers // 256], 1).to(torch.uint8)[:, :, None, None]
    return Split(images, mask.long(), mask)


def loader(mask, share, size, batch, order_key="shared"):
    keys = {"seed": 3, "order_key": order_key, "augmentation_key": order_key, "augmentation": None, "device": "cpu"}
    return BatchLoader(numbered(mask), batch_size=batch, unlabeled_share=share, epoch_examples=size, **keys)


def read(batches, step):
    images, labels = batches.batch(step)
    x = (images[:, :, 0, 0] * 255).round().long()
    return (x[:, 0] + 256 * x[:, 1]).tolist(), labels.bool(), batches.labelled(step)


@pytest.mark.parametrize(("share", "size", "batch"), [(0.5, 70, 16), (0.3, 61, 10), (0.9, 500, 32), (0.25, 120, 4)])
def test_batches_have_their_share(share, size, batch):
    mask = torch.arange(300) % 7 < 2  # 86 labelled
    batches = loader(mask, share, size, batch)
    assert batches.num_examples == size and batches.steps_per_epoch == -(-size // batch)
    seen = {True: [], False: []}
    for step in range(12 * batches.steps_per_epoch):
        numbers, own, labelled = read(batches, step)
        place = step % batches.steps_per_epoch
        length = min(batch, size - place * batch)
        assert len(numbers) == length and torch.equal(own, labelled) and torch.equal(mask[numbers], labelled)
        assert int((~labelled).sum()) == int(share * length + 0.5)
        for number, is_own in zip(numbers, labelled.tolist()):
            seen[is_own].append(number)
    for is_own, numbers in seen.items():  # one shuffled pass after another, across epochs
        count = int((mask == is_own).sum())
        passes = [numbers[i : i + count] for i in range(0, len(numbers) - count + 1, count)]
        assert passes and all(sorted(p) == (mask == is_own).nonzero().flatten().tolist() for p in passes)
        assert len({tuple(p) for p in passes}) == len(passes)


def test_batches_are_a_function_of_the_step():
    mask = torch.arange(90) % 3 == 0
    one, other, own = loader(mask, 0.5, 70, 16), loader(mask, 0.5, 70, 16), loader(mask, 0.5, 70, 16, "linf")
    forward = [read(one, step)[0] for step in range(20)]
    assert [read(other, step)[0] for step in reversed(range(20))] == forward[::-1]
    assert [read(own, step)[0] for step in range(20)] != forward


def test_without_a_share_all_are_shuffled_together():
    mask = torch.arange(90) % 3 == 0
    batches = loader(mask, None, None, 30)
    parts = [read(batches, step) for step in range(3)]
    assert sorted(n for numbers, _, _ in parts for n in numbers) == list(range(90))
    assert all(5 <= int(labelled.sum()) <= 15 for _, _, labelled in parts)
    assert all(torch.equal(mask[numbers], labelled) for numbers, _, labelled in parts)


def test_share_zero_repeats_the_labelled_images():
    order = Shares(torch.ones(10, dtype=torch.bool), 0.0, 25, 5, partial(rng.generator, "cpu", 0))
    numbers = [*order(0).tolist(), *order(1).tolist()]
    assert all(sorted(numbers[i : i + 10]) == list(range(10)) for i in range(0, 50, 10))


# --- images of another source -----------------------------------------------------------------------------------------

GREY = np.random.default_rng(1).integers(0, 256, (12, 8, 8), dtype=np.uint8)
RGB = np.random.default_rng(2).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def loaded(shape=(1, 8, 8), **options):
    unlabeled = "{" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}"
    data = load_config(None, [f"data.unlabeled={unlabeled}"]).data
    return load_unlabeled(data, torch.empty((0, *shape), dtype=torch.uint8), Reading()).numpy()


@pytest.mark.parametrize("layout", ["grey", "one channel", "channels last", "channels first"])
def test_npz(tmp_path, layout):
    first = RGB.transpose(0, 3, 1, 2)
    arrays = {"grey": GREY, "one channel": GREY[..., None], "channels last": RGB, "channels first": first}
    file = tmp_path / "images.npz"
    np.savez(file, image=arrays[layout], label=np.arange(len(arrays[layout])))
    expected = GREY[:, None] if layout in ("grey", "one channel") else first
    assert np.array_equal(loaded(expected.shape[1:], source="npz", path=file), expected)
    assert np.array_equal(loaded(expected.shape[1:], source="npz", path=f"file://{file}", examples=5), expected[:5])


def write_parquet(file, images, **columns):
    table = {"image": pa.array([{"bytes": png(image), "path": ""} for image in images]), **columns}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), file)


def test_parquet_without_labels(tmp_path):
    write_parquet(tmp_path / "b.parquet", GREY[5:])
    write_parquet(tmp_path / "a.parquet", GREY[:5], label=[-7] * 5)
    assert np.array_equal(loaded(source="parquet", path=tmp_path)[:, 0], GREY)
    assert np.array_equal(loaded(source="parquet", path=tmp_path, examples=7)[:, 0], GREY[:7])


def test_of_a_data_set_with_splits_only_train_is_read(tmp_path):
    for part, some in (("train", slice(0, 8)), ("test", slice(8, 10)), ("validation", slice(10, 12))):
        write_parquet(tmp_path / "hub" / "data" / f"{part}-00000-of-00001.parquet", GREY[some])
        folder = tmp_path / "tree" / part / "a"
        folder.mkdir(parents=True)
        for i, image in enumerate(GREY[some]):
            (folder / f"{i}.png").write_bytes(png(image))
    write_parquet(tmp_path / "hub" / "data" / "all.parquet", GREY)
    assert np.array_equal(loaded(source="parquet", path=tmp_path / "hub")[:, 0], GREY[:8])
    assert np.array_equal(loaded(source="image_folder", path=tmp_path / "tree")[:, 0], GREY[:8])


def test_image_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for place, image in zip(["a.png", "c.png", "deep/b.png", "deep/er/z.png"], GREY):
        (tmp_path / place).write_bytes(png(image))
    (tmp_path / "notes.txt").write_text("x")
    assert np.array_equal(loaded(source="image_folder", path=tmp_path)[:, 0], GREY[:4])
    large = Image.fromarray(GREY[0]).resize((8, 6), Image.Resampling.BILINEAR)
    small = loaded((1, 6, 8), source="image_folder", path=tmp_path, resize="true")
    assert small.shape == (4, 1, 6, 8) and np.array_equal(small[0, 0], np.asarray(large))


def test_svhn_extra(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    pixels = np.random.default_rng(2).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    scipy_io.savemat(tmp_path / "extra_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": np.full((6, 1), 10)})
    images = loaded((3, 32, 32), source="svhn_extra", path=tmp_path, examples=4)
    assert np.array_equal(images, pixels[:4].transpose(0, 3, 1, 2))


def test_external_images_come_after_the_training_images(tmp_path):
    np.savez(tmp_path / "x.npz", GREY)
    overrides = [f"data.unlabeled={{source: npz, path: {tmp_path / 'x.npz'}}}"]
    setup, plain = prepare(load_config(None, overrides)), prepare(load_config(None))
    train, labelled = setup.splits["train"], plain.splits["train"]
    assert torch.equal(train.images, torch.cat([labelled.images, torch.from_numpy(GREY[:, None])]))
    assert torch.equal(train.labels[:-12], labelled.labels) and train.labels[-12:].tolist() == [-1] * 12
    assert train.labelled.tolist() == [True] * len(labelled) + [False] * 12 and setup.dropped_labels is None
    assert setup.plan.num_train == len(labelled) + 12
    shared = prepare(load_config(None, [*overrides, "data.unlabeled.batch_share=0.5"]))
    assert shared.plan.num_train == len(labelled) and len(shared.splits["train"]) == len(train)


# --- bad input --------------------------------------------------------------------------------------------------------

U, T = "data.unlabeled", "data.unlabeled.teacher"
FRACTION = f"{U}={{source: fraction, fraction: 0.5}}"
RST = "base_learners.linf.objective=rst"
WRONG = [
    ([RST], f"{U}: missing, base_learners.linf.objective trains on pseudo-labelled images"),
    ([RST, FRACTION, f"{U}.batch_share=0"], f"{U}: not used with batch_share: 0, base_learners.linf.objective trains"),
    ([f"{U}.source=fraction"], f"{U}.fraction: missing, expected the share"),
    ([f"{U}.fraction=0.5"], f"{U}.source: missing, expected one of fraction, svhn_extra"),
    ([f"{U}.source=tiny"], f"{U}.source: expected one of fraction"),
    ([FRACTION, f"{U}.fraction=1"], f"{U}.fraction: expected a number above 0 below 1, got 1"),
    ([FRACTION, f"{U}.fraction=0"], f"{U}.fraction: expected a number above 0 below 1, got 0"),
    ([FRACTION, f"{U}.fraction=0.999"], f"{U}.fraction: expected to keep a label of every class, came 0.999"),
    ([FRACTION, f"{U}.path=x"], f"{U}.path: has no effect with source fraction; it is for svhn_extra, parquet"),
    ([FRACTION, f"{U}.examples=3"], f"{U}.examples: has no effect with source fraction"),
    ([f"{U}={{source: npz, path: x, seed: 3}}"], f"{U}.seed: has no effect with source npz; it is for fraction"),
    ([f"{U}={{source: npz, path: x, resize: true}}"], f"{U}.resize: has no effect with source npz"),
    ([f"{U}.source=parquet"], f"{U}.path: missing, source parquet needs the file, folder or URI"),
    ([FRACTION, f"{U}.batch_share=1"], f"{U}.batch_share: expected a number at least 0 below 1, got 1"),
    ([FRACTION, f"{U}.batch_share=0.001"], f"{U}.batch_share: expected at least one pseudo-labelled and one labelled"),
    ([FRACTION, f"{U}.batch_share=0.999"], "image in a batch of 64, got 64 and 0"),
    ([FRACTION, f"{T}.epochs=0"], f"{T}.epochs: expected a whole number at least 1, got 0"),
    ([FRACTION, f"{T}.path=x", f"{T}.lr=0.1"], f"{T}.lr: has no effect with teacher.path"),
    ([FRACTION, f"{T}.path=x", f"{T}.optimizer=adam"], f"{T}.optimizer: has no effect with teacher.path"),
    ([FRACTION, f"{T}.epochs=3", f"{U}.batch_share=0"], f"{T}: has no effect with batch_share: 0"),
    ([FRACTION, f"{T}.path=/no/such"], f"{T}.path: /no/such: no such file"),
    ([f"{U}={{source: parquet, path: /no/such}}"], f"{U}.path: expected a readable folder, came /no/such: no such"),
    ([f"{U}={{source: npz, path: /no/such}}"], f"{U}.path: expected a readable .npz file, came /no/such"),
    (
        [f"{U}={{source: svhn_extra, path: /no/such}}", "data.download=false"],
        f"{U}.path: expected svhn as torchvision stores it in /no/such",
    ),
]


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[" ".join(o) for o, _ in WRONG])
def test_bad_input(capsys, tmp_path, overrides, says):
    check(capsys, tmp_path, says, *overrides)


def grey_pngs(folder, *sides):
    folder.mkdir()
    for i, side in enumerate(sides):
        (folder / f"{i}.png").write_bytes(png(np.zeros((side, side), np.uint8)))


def npz(**arrays):
    return "npz", lambda path: np.savez(path, **arrays)


FILES = {
    "wrong size": (
        "image_folder",
        lambda path: grey_pngs(path, 9, 9),
        "images' shape (1, 8, 8) (C, H, W), came (1, 9, 9)",
    ),
    "mixed sizes": ("image_folder", lambda path: grey_pngs(path, 8, 9), f"set {U}.resize: true to resize all images"),
    "no images": ("image_folder", lambda path: grey_pngs(path), f"{U}: expected at least 1 image, came 0"),
    "colour": (*npz(a=RGB), "images' shape (1, 8, 8) (C, H, W), came (3, 8, 8)"),
    "float": (*npz(a=GREY / 255), "expected one array of uint8 images, came 0 among a"),
    "two arrays": (*npz(a=GREY, b=GREY), "expected one array of uint8 images, came 2 among a, b"),
    "objects": (*npz(a=np.array([{}, {}])), "expected one array of uint8 images, came 0 among a"),
    "no array": (*npz(a=GREY[:0]), f"{U}: expected at least 1 image, came 0 from source npz"),
    "junk": ("npz", lambda path: path.write_bytes(b"PK\x03\x04junk"), f"{U}.path: expected a readable .npz file"),
    "pickle": ("npz", lambda path: path.write_bytes(b"\x80\x04N."), f"{U}.path: expected a readable .npz file"),
    "parquet without images": (
        "parquet",
        lambda path: (path.mkdir(), pq.write_table(pa.table({"a": [1, 2]}), path / "x.parquet")),
        f"{U}.image_column: expected one column to be a struct",
    ),
    "no parquet": ("parquet", lambda path: path.mkdir(), f"{U}.path: expected files *.parquet in "),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_images(capsys, tmp_path, case):
    source, write, says = FILES[case]
    path = tmp_path / "images.npz"
    write(path)
    check(capsys, tmp_path, says, f"{U}={{source: {source}, path: {path}}}")


def test_too_few_external_images(capsys, tmp_path):
    np.savez(tmp_path / "x.npz", GREY)
    says = f"{U}.examples: expected 1 to 12 (the images available), came 13"
    check(capsys, tmp_path, says, f"{U}={{source: npz, path: {tmp_path / 'x.npz'}, examples: 13}}")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_teacher_that_does_not_fit(capsys, tmp_path, dry):
    shape = {"in_channels": 1, "image_size": (8, 8), "batch_norm": True}
    other = build_model("small_cnn", num_classes=10, width=5, **shape)
    torch.save(other.state_dict(), tmp_path / "plain.pt")
    ours = build_model("small_cnn", num_classes=7, **shape)
    architecture = {"name": "small_cnn", "num_classes": 7, **shape, "image_size": [8, 8]}
    content = {"format": "genray-model/1", "state_dict": ours.state_dict(), "metadata": {"architecture": architecture}}
    torch.save(content, tmp_path / "seven.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name, says in (
        ("plain.pt", f"{T}.path: {tmp_path}/plain.pt: does not fit the model: "),
        ("seven.pt", f"{T}.path: expected a model of 10 classes and 1x8x8 images, came one of 7 classes and 1x8x8"),
        ("junk.pt", f"{T}.path: {tmp_path}/junk.pt: "),
    ):
        check(capsys, tmp_path, says, FRACTION, f"{T}.path={tmp_path / name}", *dry)
