"""Extra training images: which of them are in which batch, where they come from, and labels that a model gives."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_bad_input import check

import genray
from genray.cli.label import main, parse_args
from genray.cli.parser import run_command
from genray.config import load_config
from genray.config.load import to_dict
from genray.core import rng
from genray.data.loader import BatchLoader
from genray.data.splits import Split
from genray.errors import ConfigError
from genray.run.setup import prepare

# --- batches ----------------------------------------------------------------------------------------------------------


def loader(own, extra, share, batch, order_key="shared"):
    """Of images that carry their number; pseudo-labels are those of the odd extra ones."""
    numbers = torch.arange(own + extra)
    images = torch.stack([numbers % 256, numbers // 256], 1).to(torch.uint8)[:, :, None, None]
    split = Split(images, numbers, (numbers < own) | (numbers % 2 == 0))
    keys = {"seed": 3, "order_key": order_key, "augmentation_key": order_key, "augmentation": None, "device": "cpu"}
    return BatchLoader(split, batch_size=batch, extra_share=share, own_examples=own, **keys)


def read(batches, step):
    images, labels = batches.batch(step)
    x = (images[:, :, 0, 0] * 255).round().long()
    numbers = (x[:, 0] + 256 * x[:, 1]).tolist()
    assert numbers == labels.tolist()
    return numbers, batches.labelled(step)


def test_batches_are_those_computed_by_hand():
    """7 own and 4 extra images, batches of 4 with half of them extra: 2 + 2 and, of the last 3, 2 + 1 an epoch."""

    def passes(name, size, count):
        orders = [torch.randperm(size, generator=rng.generator("cpu", 3, "shared", "order", name, i)) for i in range(5)]
        return iter(torch.cat(orders)[:count].tolist())

    own, extra, batches = passes("own", 7, 9), passes("extra", 4, 12), loader(7, 4, 0.5, 4)
    assert batches.num_examples == 7 and batches.steps_per_epoch == 2
    for step in range(6):
        expected = [7 + next(extra), 7 + next(extra), *(next(own) for _ in range(2 - step % 2))]
        numbers, labelled = read(batches, step)
        assert numbers == expected
        assert labelled.tolist() == [number < 7 or number % 2 == 0 for number in expected]


@pytest.mark.parametrize(("share", "own", "extra", "batch"), [(0.3, 61, 100, 10), (0.9, 500, 20, 32), (0.7, 120, 9, 4)])
def test_each_group_is_one_shuffled_pass_after_another(share, own, extra, batch):
    batches, seen = loader(own, extra, share, batch), {True: [], False: []}
    for step in range(12 * batches.steps_per_epoch):
        numbers, _ = read(batches, step)
        length = min(batch, own - step % batches.steps_per_epoch * batch)
        assert len(numbers) == length and sum(number >= own for number in numbers) == int(share * length + 0.5)
        for number in numbers:
            seen[number < own].append(number)
    for is_own, first, count in ((True, 0, own), (False, own, extra)):
        found = [seen[is_own][i : i + count] for i in range(0, len(seen[is_own]) - count + 1, count)]
        assert found and all(sorted(one) == list(range(first, first + count)) for one in found)
        assert len({tuple(one) for one in found}) == len(found)


def test_batches_are_a_function_of_the_step():
    one, other, own = loader(70, 20, 0.5, 16), loader(70, 20, 0.5, 16), loader(70, 20, 0.5, 16, "linf")
    forward = [read(one, step)[0] for step in range(20)]
    assert [read(other, step)[0] for step in reversed(range(20))] == forward[::-1]
    assert [read(own, step)[0] for step in range(20)] != forward


def test_without_a_share_all_are_shuffled_together():
    batches = loader(30, 60, None, 30)
    parts = [read(batches, step)[0] for step in range(3)]
    assert sorted(number for numbers in parts for number in numbers) == list(range(90))
    assert all(5 <= sum(number < 30 for number in numbers) <= 15 for numbers in parts)


# --- where they come from ---------------------------------------------------------------------------------------------

GREY = np.random.default_rng(1).integers(0, 256, (12, 8, 8), dtype=np.uint8)
RGB = np.random.default_rng(2).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
LABELS, MARKS = np.arange(12) % 10, np.arange(12) % 3 == 0


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def with_extra(**options):
    """(the images, labels and marks that came after the training images, the setup)."""
    given = {key: str(value) if key == "path" else value for key, value in options.items()}
    setup = prepare(load_config(None, {"data.train_examples": 300, "data.extra": given}))
    train, plain = setup.splits["train"], prepare(load_config(None, {"data.train_examples": 300})).splits["train"]
    assert torch.equal(train.images[: len(plain)], plain.images) and torch.equal(
        train.labels[: len(plain)], plain.labels
    )
    marks = None if train.labelled is None else (~train.labelled[len(plain) :]).numpy()
    assert train.labelled is None or train.labelled[: len(plain)].all()
    return train.images[len(plain) :, 0].numpy(), train.labels[len(plain) :].numpy(), marks, setup


@pytest.mark.parametrize("layout", ["grey", "one channel", "channels first", "in columns", "compressed"])
def test_npz(tmp_path, layout):
    arrays = {"one channel": GREY[..., None], "channels first": GREY[:, None], "in columns": np.asfortranarray(GREY)}
    save = np.savez_compressed if layout == "compressed" else np.savez
    save(tmp_path / "x.npz", image=arrays.get(layout, GREY), label=LABELS.astype(np.int32))
    images, labels, marks, setup = with_extra(source="npz", path=tmp_path / "x.npz")
    assert np.array_equal(images, GREY) and np.array_equal(labels, LABELS) and marks is None
    assert setup.plan.num_train == len(setup.splits["train"])
    some = with_extra(source="npz", path=f"file://{tmp_path}/x.npz", examples=5, batch_share=0.5)
    assert np.array_equal(some[0], GREY[:5]) and some[3].plan.num_train == len(some[3].splits["train"]) - 5


def test_colours_of_npz(tmp_path):
    np.savez(tmp_path / "x.npz", image=RGB, label=np.zeros(9, int), pseudo=True)
    (tmp_path / "main/train/0").mkdir(parents=True)
    for part, name in [("train", "0"), ("train", "1"), ("test", "0")]:
        (tmp_path / "main" / part / name).mkdir(parents=True, exist_ok=True)
        for i in range(20):
            (tmp_path / "main" / part / name / f"{i}.png").write_bytes(png(RGB[i % 9]))
    data = {"source": "image_folder", "path": str(tmp_path / "main"), "validation_examples": 2}
    setup = prepare(load_config(None, {"data": data, "data.extra": {"source": "npz", "path": str(tmp_path / "x.npz")}}))
    assert np.array_equal(setup.splits["train"].images[-9:], RGB.transpose(0, 3, 1, 2))
    assert setup.splits["train"].labelled.tolist() == [True] * 38 + [False] * 9


def write_parquet(file, some=slice(None), names=None, **columns):
    table = {"image": [{"bytes": png(image), "path": ""} for image in GREY[some]], "label": LABELS[some], **columns}
    meta = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})} if names else None
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table).replace_schema_metadata(meta), file)


def test_parquet(tmp_path):
    write_parquet(tmp_path / "b.parquet", slice(5, 12), pseudo=MARKS[5:].astype(int))  # 0 and 1 are truth values too
    write_parquet(tmp_path / "a.parquet", slice(0, 5))
    images, labels, marks, _ = with_extra(source="parquet", path=tmp_path)
    assert np.array_equal(images, GREY) and np.array_equal(labels, LABELS)
    assert np.array_equal(marks, [*[False] * 5, *MARKS[5:]])
    assert np.array_equal(with_extra(source="parquet", path=tmp_path, examples=7)[0], GREY[:7])
    assert np.array_equal(with_extra(source="parquet", path=tmp_path / "b.parquet")[0], GREY[5:])


def test_names_of_classes_are_matched(tmp_path):
    write_parquet(tmp_path / "x.parquet", names=[str(9 - k) for k in range(10)])
    assert np.array_equal(with_extra(source="parquet", path=tmp_path / "x.parquet")[1], 9 - LABELS)


def test_of_a_data_set_with_splits_only_train_is_read(tmp_path):
    for part, some in (("train", slice(0, 8)), ("test", slice(8, 10)), ("validation", slice(10, 12))):
        write_parquet(tmp_path / "hub" / "data" / f"{part}-00000-of-00001.parquet", some)
        for label, image in zip(LABELS[some], GREY[some]):
            file = tmp_path / "tree" / part / str(label) / "deeper" / "x.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(image))
    for source, path in (("parquet", tmp_path / "hub"), ("image_folder", tmp_path / "tree")):
        images, labels, marks, _ = with_extra(source=source, path=path)
        assert np.array_equal(images, GREY[:8]) and np.array_equal(labels, LABELS[:8]) and marks is None


def test_resized(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "a.png").write_bytes(png(np.repeat(np.repeat(GREY[0], 2, 0), 2, 1)))
    images, labels, *_ = with_extra(source="image_folder", path=tmp_path, resize=True)
    assert images.shape == (1, 8, 8) and labels.tolist() == [3]


def test_svhn_extra(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    from genray.data.extra import open_images
    from genray.data.request import DataRequest

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    pixels = np.random.default_rng(2).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = np.array([[10], [1], [2], [10], [9], [3]])  # 10 stands for 0
    scipy_io.savemat(tmp_path / "extra_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
    part, _ = open_images(DataRequest("svhn_extra", str(tmp_path), train_examples=4), tuple("0123456789"))
    assert np.array_equal(part.read(None)[0], pixels[:4].transpose(0, 3, 1, 2)) and part.labels.tolist() == [0, 1, 2, 0]


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = [
    *("training.epochs=3", "training.batch_size=48", "model.width=8", "evaluation.attack.num_steps=1"),
    *("data.train_examples=260", "data.test_examples=40", "data.validation_examples=50"),
    *("base_learners.linf.attack.num_steps=1", "checkpoint.every_steps=2"),
]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(storage of a run `teacher`, the file with what it says of the training images that it left out)."""
    storage = tmp_path_factory.mktemp("labelled")
    genray.train(None, [*RUN, "training.epochs=5"], runtime="local", storage=str(storage), name="teacher")
    return storage, genray.label(storage / "teacher", storage / "rest.npz")


def rst(file):
    return [*RUN, "base_learners.linf.objective=rst", f"data.extra={{source: npz, path: {file}, batch_share: 0.5}}"]


def test_pseudo_labels_are_the_models_classes(labelled, digits):
    storage, file = labelled
    rest = prepare(load_config(None, ["data.validation_examples=0", "evaluation.select_on=test"])).splits["train"]
    expected = rest.images[260:]
    found = np.load(file, allow_pickle=False)
    assert np.array_equal(found["image"], expected.permute(0, 2, 3, 1)) and found["pseudo"].all()
    model = genray.load_model(storage / "teacher")
    with torch.no_grad():
        classes = torch.cat([model(image[None] / 255) for image in expected]).argmax(1)
    assert np.array_equal(found["label"], classes) and len(classes) == 1437 - 260
    assert (classes == rest.labels[260:]).double().mean() > 0.2  # it has learned something
    again = genray.label(model, storage / "again.npz", expected, batch_size=100)
    assert open(again, "rb").read() == open(file, "rb").read()


def test_labels_of_files_give_the_same_run_data(labelled):
    storage, file = labelled
    table = storage / "rest.parquet"
    main(parse_args([str(storage / "teacher"), f"--output={table}", f"--data=npz:{file}", "--examples=30"]))
    splits = [
        prepare(load_config(None, [*RUN, f"data.extra={{source: {s}, path: {p}, examples: 30}}"])).splits["train"]
        for s, p in (("npz", file), ("parquet", table))
    ]
    for name in ("images", "labels", "labelled"):
        assert torch.equal(getattr(splits[0], name), getattr(splits[1], name))
    assert (~splits[0].labelled).sum() == 30


def test_configurations_of_older_versions():
    """They say `unlabeled: null`; one that had such images says what became of them."""
    stored = to_dict(load_config())
    del stored["data"]["extra"]
    stored["data"]["unlabeled"] = None
    assert load_config(stored) == load_config()
    stored["data"]["unlabeled"] = {"source": "fraction", "fraction": 0.5}
    with pytest.raises(ConfigError) as found:
        load_config(stored)
    assert [problem.partition(":")[0] for problem in found.value.problems] == ["data.unlabeled"]


# --- bad input --------------------------------------------------------------------------------------------------------

E = "data.extra"
RST = "base_learners.linf.objective=rst"
WRONG = [
    ([RST], f"{E}: missing, base_learners.linf.objective trains on pseudo-labelled images"),
    ([f"{E}.path=x"], f"{E}.source: missing, expected one of npz, parquet"),
    ([f"{E}.source=tiny"], f"{E}.source: expected one of npz"),
    ([f"{E}.source=npz"], f"{E}.path: missing, source npz needs the file, folder or URI"),
    ([f"{E}={{source: npz, path: x, resize: true}}"], f"{E}.resize: has no effect with source npz"),
    ([f"{E}={{source: npz, path: x, label_column: y}}"], f"{E}.label_column: has no effect with source npz"),
    ([f"{E}={{source: npz, path: x, batch_share: 0}}"], f"{E}.batch_share: expected a number above 0 below 1, got 0"),
    ([f"{E}={{source: npz, path: x, batch_share: 0.001}}"], f"{E}.batch_share: expected at least one of these and one"),
    ([f"{E}={{source: npz, path: x, batch_share: 0.999}}"], "images in a batch of 64, got 64 and 0"),
    ([f"{E}={{source: parquet, path: /no/such}}"], f"{E}.path: expected a readable folder, came /no/such: no such"),
    ([f"{E}={{source: parquet, path: 'no://such.parquet'}}"], f"{E}.path: expected Parquet files: storage 'no://such"),
    ([f"{E}={{source: npz, path: /no/such}}"], f"{E}.path: expected a readable .npz file, came /no/such"),
    ([f"{E}={{source: svhn_extra, path: /no}}", "data.download=false"], f"{E}.path: expected svhn as torchvision"),
]


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[" ".join(o) for o, _ in WRONG])
def test_bad_input(capsys, tmp_path, overrides, says):
    check(capsys, tmp_path, says, *overrides)


def npz(**arrays):
    return "npz", lambda path: np.savez(path, **arrays)


def folder(name, side):
    def write(path):
        (path / name).mkdir(parents=True)
        (path / name / "a.png").write_bytes(png(np.zeros((side, side), np.uint8)))

    return "image_folder", write


FILES = {
    "colour": (*npz(a=RGB, label=np.zeros(9, int)), "images' shape (1, 8, 8) (C, H, W), came (3, 8, 8)"),
    "float": (*npz(a=GREY / 255), "expected one array of uint8 images, came 0 among a"),
    "two arrays": (*npz(a=GREY, b=GREY), "expected one array of uint8 images, came 2 among a, b"),
    "objects": (*npz(a=np.array([{}, {}])), "expected a readable .npz file"),
    "no images": (*npz(a=GREY[:0], label=LABELS[:0]), f"{E}.path: expected at least 1 image, came 0 from source npz"),
    "no labels": (*npz(a=GREY), "expected an array label of 12 whole numbers, came none"),
    "too few labels": (*npz(a=GREY, label=LABELS[:3]), "expected an array label of 12 whole numbers, came (3,) int64"),
    "labels in a column": (*npz(a=GREY, label=LABELS[:, None]), "whole numbers, came (12, 1) int64"),
    "too few marks": (*npz(a=GREY, label=LABELS, pseudo=LABELS[:3] > 0), "12 truth values, came (3,) bool"),
    "marks in a column": (*npz(a=GREY, label=LABELS, pseudo=LABELS[:, None] > 0), "truth values, came (12, 1) bool"),
    "marks of text": (*npz(a=GREY, label=LABELS, pseudo=np.array(["no"] * 12)), "truth values, came (12,) <U2"),
    "another class": (*npz(a=GREY, label=LABELS + 1), "expected class labels from 0 to 9, came 10 of image 9"),
    "junk": ("npz", lambda path: path.write_bytes(b"PK\x03\x04junk"), f"{E}.path: expected a readable .npz file"),
    "wrong size": (*folder("3", 9), "images' shape (1, 8, 8) (C, H, W), came (1, 9, 9)"),
    "no class": (*folder("eleven", 8), "expected to lie in a folder that is called like a class (0, 1, 2"),
    "no parquet": ("parquet", lambda path: path.mkdir(), f"{E}.path: expected files *.parquet in "),
    "other names": (
        "parquet",
        lambda path: write_parquet(path / "x.parquet", names=list("abcdefghij")),
        "expected the class names of the training images (0, 1, 2",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_images(capsys, tmp_path, case):
    source, write, says = FILES[case]
    path = tmp_path / "images.npz"
    write(path)
    check(capsys, tmp_path, says, f"{E}={{source: {source}, path: {path}}}")


def test_more_than_there_are_and_rst_without_marks(capsys, tmp_path):
    np.savez(tmp_path / "x.npz", image=GREY, label=LABELS)
    extra = f"{E}={{source: npz, path: {tmp_path / 'x.npz'}}}"
    check(capsys, tmp_path, f"{E}.examples: expected 1 to 12", extra, f"{E}.examples=13")
    check(capsys, tmp_path, f"{E}.path: expected images that are marked as pseudo-labelled", extra, RST)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.npy"], "x.npy: expected the name of a file that ends in .npz or .parquet"),
        (["there.npz"], "there.npz: exists; choose another --output, or --overwrite"),
        (["x.npz", "--data", "cifar10"], "--data: expected one of npz, parquet, image_folder"),
        (["x.npz", "--data", "npz:/no/such"], "error: --data: expected a readable .npz file, came /no/such"),
        (["x.npz", "--data", "npz:grey.npz", "--image-column", "image"], "image_column: has no effect with npz; it is"),
        (["x.npz", "--data", "npz:there.npz"], "images: expected the shape of the model's, (1, 8, 8) (C, H, W), came"),
        (["x.npz", "--examples", "9999"], "error: examples: expected 1 to "),
        (["x.npz", "--data", "npz:grey.npz", "--examples", "13"], "error: examples: expected 1 to 12 "),
        (["x.npz", "--batch-size", "0"], "batch_size: expected a whole number at least 1, got 0"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_label_bad_input(labelled, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    np.savez("there.npz", image=RGB)
    np.savez("grey.npz", image=GREY)
    line = [str(labelled[0] / "teacher"), "--output", *arguments]
    assert run_command(main, parse_args(line)) == 2
    assert says in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "x.npz").exists()


def test_a_run_that_left_nothing_out_has_to_be_told_what_to_label(trained_run, tmp_path, capsys):
    assert run_command(main, parse_args([str(trained_run), "--output", str(tmp_path / "x.npz")])) == 2
    assert "--data: missing, expected SOURCE:PATH" in capsys.readouterr().err
