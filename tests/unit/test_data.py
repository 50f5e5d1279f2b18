"""Data sources against data whose pixels the test itself made."""

import hashlib
import io
import json
import os
import pickle
import struct
import urllib.error
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn import datasets as sklearn_datasets

from genray.core import rng
from genray.data.datasets import Split, load_image_data, validation_split
from genray.errors import DataError, InputError

RGB = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(23) % 3


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def rows(pixels, labels, names=None):
    """A table in the Hugging Face layout."""
    images = [{"bytes": image if isinstance(image, bytes) else encoded(image), "path": None} for image in pixels]
    table = pa.table({"img": images, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return table


def write(folder, name, table, **options):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name, **options)


@pytest.fixture
def hub(tmp_path):
    """17 training images in three files with several row groups, 6 test images."""
    for shard, (start, stop) in enumerate([(0, 9), (9, 10), (10, 17)]):
        write(
            tmp_path, f"train-0000{shard}-of-00003.parquet", rows(RGB[start:stop], LABELS[start:stop]), row_group_size=4
        )
    write(tmp_path, "test-00000-of-00001.parquet", rows(RGB[17:], LABELS[17:]))
    return tmp_path


def fails(match, path=None, source="parquet", **options):
    """Loading raises a DataError on one line that matches."""
    with pytest.raises(DataError, match=match) as caught:
        load_image_data(source, path=path, **options)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


def assert_is(split, pixels, labels):
    assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert split.labels.tolist() == list(labels)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_key_seed_is_stable_and_63_bits():
    # The encoding by hand: a change of it would break every replay.
    parts = [(b"i", b"0"), (b"s", b"linf"), (b"s", b"order"), (b"i", b"7")]
    text = b"".join(kind + bytes(7) + bytes([len(body)]) + body for kind, body in parts)
    expected = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") // 2
    assert rng.key_seed(0, "linf", "order", 7) == expected == 1176622892846136864
    assert all(0 <= rng.key_seed(s, "x") < 2**63 for s in range(200))
    assert rng.key_seed(np.int64(3), "a", np.int32(1)) == rng.key_seed(3, "a", 1)


def test_keys_that_look_alike_differ():
    keys = [(0, "ab", "c"), (0, "a", "bc"), (0, "abc"), (0, "abc", ""), (0, 1), (0, "1"), (1, 0), (0, -1), (0, 1, 1)]
    assert len({rng.key_seed(*key) for key in keys}) == len(keys)
    assert len({rng.key_seed(0, "step", step) for step in range(5000)}) == 5000


@pytest.mark.parametrize("key", [(0, 1.0), (0, None), (0, True), (0.5, "a"), (True, "a")])
def test_key_seed_refuses_other_types(key):
    with pytest.raises(TypeError, match="expected"):
        rng.key_seed(*key)


def test_generator_repeats_and_separates():
    def draw(*key):
        return torch.rand(4, generator=rng.generator("cpu", *key)).tolist()

    assert draw(1, "a", 0) == draw(1, "a", 0)
    assert (
        len({tuple(draw(1, "a", step)) for step in range(50)} | {tuple(draw(1, "b", 0)), tuple(draw(2, "a", 0))}) == 52
    )


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_shards_pixel_exact_in_stored_order(hub):
    data = load_image_data("parquet", path=hub)
    assert_is(data.train, RGB[:17], LABELS[:17])
    assert_is(data.test, RGB[17:], LABELS[17:])
    assert (data.num_classes, data.in_channels, data.image_size, data.source) == (3, 3, (6, 5), "parquet")
    assert data.class_names == ("0", "1", "2")
    assert data.train.images.is_contiguous()


def test_parquet_from_uri_data_folder_and_file_system_object(hub):
    for path in (
        f"file://{hub}",
        str(hub),
        (pafs.SubTreeFileSystem(str(hub.parent), pafs.LocalFileSystem()), hub.name),
    ):
        assert_is(load_image_data("parquet", path=path).train, RGB[:17], LABELS[:17])
    below = hub / "data"
    below.mkdir()
    for file in hub.glob("*.parquet"):
        file.rename(below / file.name)
    assert_is(load_image_data("parquet", path=hub).train, RGB[:17], LABELS[:17])


class ClientError(Exception):
    """What the client of some service raises: no OSError, and several lines."""


@pytest.mark.parametrize("when", ["info", "find", "open"])
def test_a_file_system_may_raise_anything(when):
    from fsspec.implementations.memory import MemoryFileSystem

    class Strange(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]

    def fail(*args, **kwargs):
        raise ClientError("no route\nto the host")

    strange = pafs.PyFileSystem(pafs.FSSpecHandler(Strange(skip_instance_cache=True)))
    strange.create_dir("/bucket/set")
    for part in ("train", "test"):
        pq.write_table(rows(RGB[:6], LABELS[:6]), f"/bucket/set/{part}-0.parquet", filesystem=strange)
    assert len(load_image_data("parquet", path=(strange, "/bucket/set")).train) == 6
    setattr(strange.handler.fs, when, fail)
    place = "train-0.parquet" if when == "open" else "data.path: "
    fails(f"{place}.*no route to the host", (strange, "/bucket/set"))


def test_parquet_takes_the_first_examples_only(hub):
    data = load_image_data("parquet", path=hub, train_examples=11, test_examples=1)
    assert_is(data.train, RGB[:11], LABELS[:11])
    assert_is(data.test, RGB[17:18], LABELS[17:18])
    assert data.num_classes == 3  # counted on everything, not on the one test example
    fails(r"data\.train_examples: expected 1 to 17 .*came 18", hub, train_examples=18)
    fails(r"data\.test_examples: expected a whole number at least 1 or null, got 0", hub, test_examples=0)


def test_parquet_reads_more_rows_than_one_batch(tmp_path):
    count = 2500
    pixels = np.arange(count * 4).reshape(count, 2, 2).astype(np.uint32).view(np.uint8).reshape(count, 4, 4)
    for part in ("train", "test"):
        write(tmp_path, f"{part}.parquet", rows(pixels, np.arange(count) % 7), row_group_size=700)
    data = load_image_data("parquet", path=tmp_path, train_examples=2100)
    assert np.array_equal(data.train.images[:, 0].numpy(), pixels[:2100])
    assert np.array_equal(data.test.images[:, 0].numpy(), pixels)


def test_parquet_validation_serves_as_test_unless_there_is_one(hub):
    write(hub, "validation-00000-of-00001.parquet", rows(RGB[:2], LABELS[:2]))
    assert len(load_image_data("parquet", path=hub).test) == 6
    (hub / "test-00000-of-00001.parquet").unlink()
    assert_is(load_image_data("parquet", path=hub).test, RGB[:2], LABELS[:2])


def test_parquet_class_names_from_metadata(tmp_path):
    names = ["cat", "dog", "eel", "fox"]
    for part in ("train", "test"):
        write(tmp_path, f"{part}-0.parquet", rows(RGB[:9], LABELS[:9], names))
    data = load_image_data("parquet", path=tmp_path)
    assert data.class_names == tuple(names)  # the fourth class occurs nowhere, but the metadata knows it


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "BMP"])
def test_grey_stays_grey(tmp_path, kind):
    grey = RGB[..., 0]
    for part in ("train", "test"):
        write(tmp_path, f"{part}-0.parquet", rows([encoded(g, kind) for g in grey], LABELS))
    data = load_image_data("parquet", path=tmp_path)
    if kind == "WEBP":  # has no grey images
        assert_is(data.train, np.repeat(grey[..., None], 3, axis=3), LABELS)
    else:
        assert_is(data.train, grey[..., None], LABELS)


def test_grey_and_colour_together_become_colour(tmp_path):
    pixels = [RGB[0, ..., 0], RGB[1], RGB[2, ..., 0]] * 600  # more than one batch, so that both orders occur
    grey = [RGB[0, ..., 0]] * 1024 + [RGB[1]] + [RGB[2, ..., 0]] * 1100
    write(tmp_path, "train-0.parquet", rows([encoded(p) for p in grey], np.arange(len(grey)) % 2))
    write(tmp_path, "test-0.parquet", rows([encoded(p) for p in pixels], np.arange(len(pixels)) % 2))
    data = load_image_data("parquet", path=tmp_path)
    for split, source in ((data.train, grey), (data.test, pixels)):
        expected = np.stack([p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=2) for p in source])
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), expected)


def read_as(tmp_path, *blobs):
    """The pixels of these encoded images, (H, W, C) each, and what is noted of them."""
    for part in ("train", "test"):
        write(tmp_path, f"{part}-0.parquet", rows(blobs, np.arange(len(blobs)) % 2))
    data = load_image_data("parquet", path=tmp_path, decode=("train",))
    return data.train.images.permute(0, 2, 3, 1).numpy(), data.notes


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(pixels, alpha):
    """The closed form: colour over white, each channel rounded."""
    share = alpha[..., None].astype(float) / 255
    return pixels * share + 255 * (1 - share)


def test_transparent_images_are_drawn_on_white(tmp_path):
    alpha = np.random.default_rng(3).integers(0, 256, (6, 5), dtype=np.uint8)
    black_icon = np.dstack([np.zeros((6, 5, 3), np.uint8), alpha])
    see_through = np.dstack([RGB[1], alpha])
    opaque = np.dstack([RGB[2], np.full((6, 5), 255, np.uint8)])
    palette = Image.fromarray(RGB[3]).quantize(16)
    images, notes = read_as(tmp_path, *map(encoded, (black_icon, see_through, opaque)), saved(palette))
    assert np.abs(images[0] - on_white(np.zeros((6, 5, 3)), alpha)).max() <= 1
    assert np.abs(images[1] - on_white(RGB[1], alpha)).max() <= 1
    assert np.array_equal(images[2], RGB[2]) and np.array_equal(images[3], np.asarray(palette.convert("RGB")))
    assert notes == ("2 images partly transparent, drawn on white",)


def test_a_transparent_colour_of_a_palette_or_of_grey(tmp_path):
    palette = Image.fromarray(RGB[3]).quantize(16)
    images, notes = read_as(tmp_path / "palette", saved(palette, transparency=0), encoded(RGB[0]))
    expected = np.where(np.asarray(palette)[..., None] == 0, 255, np.asarray(palette.convert("RGB")))
    assert np.array_equal(images[0], expected) and notes == ("1 image partly transparent, drawn on white",)
    grey = Image.fromarray(RGB[0, ..., 0])
    images, notes = read_as(tmp_path / "grey", saved(grey, transparency=int(RGB[0, 0, 0, 0])), saved(grey))
    expected = np.where(RGB[0, ..., 0] == RGB[0, 0, 0, 0], 255, RGB[0, ..., 0])
    assert np.array_equal(images[0, ..., 0], expected) and images.shape[-1] == 1 and len(notes) == 1


# Where the rows of a stored image are, by EXIF 2.32 (tag 274), as a turn of the stored array.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_as_exif_says(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    images, notes = read_as(tmp_path, *2 * [saved(Image.fromarray(RGB[0]), kind, exif=exif, lossless=True)])
    assert np.array_equal(images[1], UPRIGHT[orientation](RGB[0]))
    turned = orientation > 1 and kind != "TIFF"  # Pillow itself turns TIFF
    assert notes == (("2 images turned as the EXIF orientation says",) if turned else ())


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.fromarray(image) for image in RGB[:3]]
    images, notes = read_as(tmp_path, saved(frames[0], save_all=True, append_images=frames[1:]), encoded(RGB[4]))
    assert np.array_equal(images, RGB[[0, 4]])
    assert notes == ("1 image with several frames, of which the first is read",)


def test_large_images_decode_on_threads_in_order(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 130, 130, 3), dtype=np.uint8)
    for part in ("train", "test"):
        write(tmp_path, f"{part}-0.parquet", rows(pixels, np.arange(9) % 2))
    assert_is(load_image_data("parquet", path=tmp_path).train, pixels, np.arange(9) % 2)


def columns(tmp_path, **extra):
    """A data set with these columns, an image struct and a label by default."""
    base = rows(RGB[:6], LABELS[:6])
    table = {"img": base["img"], "label": base["label"], **extra}
    for part in ("train", "test"):
        write(
            tmp_path,
            f"{part}-0.parquet",
            pa.table({name: column for name, column in table.items() if column is not None}),
        )
    return tmp_path


def test_columns_found_by_type(tmp_path):
    raw = pa.array([encoded(image) for image in RGB[:6]], pa.large_binary())
    small = pa.array(LABELS[:6], pa.uint8())
    text = pa.array(list("abcdef"))
    number = pa.array(np.arange(6.0))
    for folder, extra in {
        "struct beats binary": {"thumb": raw},
        "binary": {"img": None, "pixels": raw},
        "label beats others": {"id": pa.array(range(6)), "fine_label": pa.array(range(6))},
        "fine_label": {"label": None, "coarse_label": pa.array(range(6)), "fine_label": small},
        "any integer": {"label": None, "digit": small, "text": text, "score": number},
    }.items():
        data = load_image_data("parquet", path=columns(tmp_path / folder, **extra))
        assert_is(data.train, RGB[:6], LABELS[:6])


def test_columns_given(tmp_path):
    other = rows(RGB[6:12], LABELS[6:12])
    path = columns(tmp_path / "two", img=None, first=other["img"], second=other["img"], id=pa.array([1, 0] * 3))
    fails(r"data\.image_column: .*2 that fit \(first, second\); name it, the columns are .*id \(int64\)", path)
    path = columns(tmp_path, second=other["img"], id=pa.array([1, 0] * 3))
    data = load_image_data("parquet", path=path, image_column="second", label_column="id")
    assert_is(data.train, RGB[6:12], [1, 0] * 3)
    fails(
        r"data\.label_column: expected an integer column, came 'second'",
        path,
        image_column="img",
        label_column="second",
    )
    fails(r"data\.image_column: .*came 'label'; the columns of data are img", path, image_column="label")


def test_ambiguous_or_absent_columns(tmp_path):
    two = columns(tmp_path / "two", label=None, a=pa.array(range(6)), b=pa.array(range(6)))
    fails(r"data\.label_column: .*2 that fit \(a, b\).*img \(struct", two)
    none = columns(tmp_path / "none", label=pa.array(list("abcdef")))
    fails(r"data\.label_column: .*came 'label' of type string.*label \(string\)", none)
    blind = columns(tmp_path / "blind", img=None)
    fails(r"data\.image_column: .*came none.*label \(int64\)", blind)


def test_a_column_that_is_meant_is_not_passed_over(tmp_path):
    """The only integer column may be a fold, or pandas' index, beside labels in words."""
    number, words = pa.array(range(6)), pa.array(list("abcdef"))
    for name in ("label", "labels", "Label", "class"):
        path = columns(tmp_path / name, **{"label": None, name: words}, fold=number)
        fails(rf"data\.label_column: expected an integer column, came '{name}' of type string", path)
        assert load_image_data("parquet", path=path, label_column="fold").columns["label_column"] == "fold"
    path = columns(tmp_path / "index", label=None, kind=words, __index_level_0__=number)
    fails(r"data\.label_column: expected one column to be an integer column, came none", path)
    mask = rows(RGB[6:12], LABELS[6:12])["img"]
    path = columns(tmp_path / "mask", img=None, image=words, mask=mask)
    fails(r"data\.image_column: expected a struct .*came 'image' of type string", path)
    encoded_images = pa.array([encoded(image) for image in RGB[:6]], pa.binary())
    data = load_image_data("parquet", path=columns(tmp_path / "binary", img=None, image=encoded_images, mask=mask))
    assert data.columns == {"image_column": "image", "label_column": "label"}
    assert_is(data.train, RGB[:6], LABELS[:6])


def test_class_names_of_each_file(tmp_path):
    write(tmp_path, "train-0.parquet", rows(RGB[:3], [0, 1, 2]))
    write(tmp_path, "train-1.parquet", rows(RGB[3:6], [0, 1, 2], ["cat", "dog", "eel"]))
    write(tmp_path, "train-2.parquet", rows(RGB[6:8], [0, 1], ["eel", "cat"]))
    write(tmp_path, "test-0.parquet", rows(RGB[8:11], [0, 1, 2], ["dog", "cat", "eel"]))
    data = load_image_data("parquet", path=tmp_path)
    assert data.class_names == ("cat", "dog", "eel")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 0] and data.test.labels.tolist() == [1, 0, 2]
    write(tmp_path, "test-0.parquet", rows(RGB[8:11], [0, 1, 2], ["dog", "cat", "cow"]))
    fails(r"test-0\.parquet: expected the class names of .*train-1\.parquet \(cat, dog, eel\), came cow", tmp_path)
    write(tmp_path, "test-0.parquet", rows(RGB[8:11], [0, 1, 2], ["dog", "cat"]))
    fails(r"test-0\.parquet, row 2: expected a class label from 0 to 1, came 2", tmp_path)


def test_other_parquet_files_are_named(hub):
    for name in ("training.parquet", "validation-00000-of-00001.parquet"):
        write(hub, name, rows(RGB[:2], LABELS[:2]))
    assert load_image_data("parquet", path=hub).notes == (
        "left out: 1 file training.parquet, 1 file validation-00000-of-00001.parquet",
    )


def test_columns_that_later_files_lack(hub):
    table = rows(RGB[9:10], LABELS[9:10])
    write(hub, "train-00001-of-00003.parquet", table.rename_columns(["img", "class"]))
    fails(r"data\.label_column: .*'label'.*train-00001-of-00003", hub)
    write(hub, "train-00001-of-00003.parquet", table.rename_columns(["picture", "label"]))
    fails(r"data\.image_column: .*'img'.*train-00001-of-00003", hub)
    for column, value in (("label", [0.5]), ("label", ["1"]), ("img", [{"path": "x"}])):
        other = table.set_column(table.schema.get_field_index(column), column, pa.array(value))
        write(hub, "train-00001-of-00003.parquet", other)
        role = "label" if column == "label" else "image"
        fails(rf"data\.{role}_column: .*'{column}'.*train-00001-of-00003", hub)


def test_mixed_sizes_need_image_size(hub):
    odd = [RGB[0], RGB[1][:, :4]]
    write(hub, "train-00002-of-00003.parquet", rows(odd, [0, 1]))
    fails(r"train-00002-of-00003\.parquet, row 1: expected 6x5 .*came 6x4; set data\.image_size", hub)
    data = load_image_data("parquet", path=hub, image_size=(8, 7))
    expected = Image.fromarray(odd[1]).resize((7, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train.images[-1].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert data.image_size == (8, 7) and data.test.images.shape == (6, 3, 8, 7)


def test_train_and_test_of_different_shape(hub):
    write(hub, "test-00000-of-00001.parquet", rows(RGB[17:, :5], LABELS[17:]))
    fails(r"test images of the training images' 6x5 pixels \(H x W\), came 5x5; set data.image_size", hub)


@pytest.mark.parametrize(
    "blob",
    [b"", b"not an image", encoded(RGB[0])[:40], encoded(RGB[0])[:-30], encoded(RGB[0], "WEBP")[:50], b"RIFF1234WEBP"],
)
def test_corrupt_image_names_file_and_row(hub, blob):
    write(hub, "train-00002-of-00003.parquet", rows([RGB[0], RGB[1], blob], [0, 1, 2]))
    fails(r"train-00002-of-00003\.parquet, row 2: expected an image file", hub)


def test_image_of_16_bits_or_null(hub):
    write(hub, "train-00002-of-00003.parquet", rows([encoded(np.arange(30, dtype=np.uint16).reshape(6, 5))], [0]))
    fails(r"train-00002.*row 0: expected an image file with 8 bits a channel, came mode I;16", hub)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for value in ({"bytes": None, "path": "x"}, None):
        null = pa.table({"img": pa.array([{"bytes": encoded(RGB[0])}, value], kind), "label": [0, 1]})
        write(hub, "train-00002-of-00003.parquet", null)
        fails(r"train-00002.*row 1: expected the bytes of an image file, came null", hub)


def test_bad_labels_name_file_and_row(hub):
    last = "train-00002-of-00003.parquet"
    write(hub, last, rows(RGB[:2], [0, 4]))
    fails(last + r", row 1: expected a class label from 0 to 3 .*came 4", hub)
    write(hub, last, rows(RGB[:2], [0, -1]))
    fails(last + r", row 1: .*came -1", hub)
    write(hub, last, rows(RGB[:2], [0, None]))
    fails(last + r", row 1: expected an integer class label in 'label', came null", hub)
    write(hub, last, rows(RGB[:2], [0, 1]))
    write(hub, "test-00000-of-00001.parquet", rows(RGB[:2], [0, 3]))
    fails(r"test-00000-of-00001.parquet, row 1: .*from 0 to 2 .*came 3", hub)


def test_one_class_or_no_rows(tmp_path):
    for part in ("train", "test"):
        write(tmp_path, f"{part}-0.parquet", rows(RGB[:2], [0, 0]))
    fails("at least 2 classes, came 1", tmp_path)
    write(tmp_path, "train-0.parquet", rows(RGB[:2], [0, 1]).slice(0, 0))
    fails("train data: expected at least 1 example, came 0", tmp_path)


def test_missing_files_and_folders(hub, tmp_path):
    fails(r"data\.path: .*no such folder", tmp_path / "absent")
    fails(r"data\.path: .*not a folder", hub / "test-00000-of-00001.parquet")
    fails(r"data\.path: .*nosuch://x", "nosuch://x")
    fails(r'data\.path: the source "parquet" needs a folder')
    (hub / "train-00001-of-00003.parquet").rename(hub / "spare")
    fails(r"data\.path: expected all 3 files .*came 2 files", hub)
    (hub / "spare").rename(hub / "train-00001-of-00003.parquet")
    (hub / "test-00000-of-00001.parquet").unlink()
    fails(r"data\.path: expected files test-\*\.parquet or validation-\*\.parquet", hub)


def test_file_that_is_not_parquet(hub):
    (hub / "train-00001-of-00003.parquet").write_bytes(b"PAR1 nonsense")
    fails(r"train-00001-of-00003\.parquet: expected a readable Parquet file", hub)


# --- image folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Classes ant (3 training images), bee (2); one test image each; image i holds RGB[i]."""
    for index, name in enumerate(["train/ant/0.png", "train/bee/x.png", "train/ant/1.PNG", "train/bee/deep/y.webp",
                                  "train/ant/2.bmp", "test/ant/t.png", "test/bee/t.png"]):  # fmt: skip
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(RGB[index], {".webp": "WEBP", ".bmp": "BMP"}.get(file.suffix, "PNG")))
    (tmp_path / "train/bee/boxes.txt").write_text("no image")
    (tmp_path / "train/readme.png").write_text("no class")
    return tmp_path


def test_image_folder_takes_classes_in_turn(tree):
    data = load_image_data("image_folder", path=tree)
    assert data.class_names == ("ant", "bee")
    pairs = list(zip(data.train.labels.tolist(), data.train.images.permute(0, 2, 3, 1).numpy(), strict=True))
    assert [label for label, _ in pairs] == [0, 1, 0, 1, 0]
    expected = [0, 3, 2, 1, 4]  # within bee, deep/y.webp stands before x.png
    assert all(np.array_equal(image, RGB[i]) for (_, image), i in zip(pairs, expected, strict=True))
    assert_is(data.test, RGB[5:7], [0, 1])
    assert len(load_image_data("image_folder", path=f"file://{tree}", train_examples=2).train) == 2


def test_image_folder_val_serves_as_test(tree):
    (tree / "test").rename(tree / "val")
    assert_is(load_image_data("image_folder", path=tree).test, RGB[5:7], [0, 1])
    (tree / "val").rename(tree / "other")
    fails(r"data\.path: expected folders test/<class> or val/<class>", tree, source="image_folder")


def test_image_folder_sizes(tree):
    (tree / "train/ant/3.png").write_bytes(encoded(RGB[0][:4]))
    fails(r"train/ant/3\.png: expected 6x5 .*came 4x5; set data\.image_size", tree, source="image_folder")
    data = load_image_data("image_folder", path=tree, image_size=[4, 4])
    assert data.image_size == (4, 4) and len(data.train) == 6


def test_image_folder_errors(tree):
    (tree / "train/ant/3.png").write_bytes(b"\x89PNG broken")
    fails(r"train/ant/3\.png: expected an image file", tree, source="image_folder")
    (tree / "train/ant/3.png").unlink()
    (tree / "train/cow").mkdir()
    fails(r"train class folder 'cow'.*no image files", tree, source="image_folder")
    (tree / "train/cow").rmdir()
    (tree / "test/cow").mkdir()
    (tree / "test/cow/a.png").write_bytes(encoded(RGB[0]))
    fails(r"test class folder 'cow'.*does not have", tree, source="image_folder")
    fails("no such folder", tree / "absent", source="image_folder")


def test_hidden_folders_and_links(tree):
    for hidden in ("train/.cache", "train/ant/.ipynb_checkpoints", "train/bee/deep/.x"):
        (tree / hidden).mkdir()
        (tree / hidden / "copy.png").write_bytes(encoded(RGB[9]))
    whole = load_image_data("image_folder", path=tree)
    assert len(whole.train) == 5 and whole.notes == ("left out: 1 .txt file, 1 file outside the class folders",)
    (tree / "train/ant/loop").symlink_to(tree / "train/ant")
    (tree / "train/ant/also").symlink_to(tree / "train/bee/deep")  # before bee/deep in order of names
    (tree / "elsewhere").mkdir()
    (tree / "elsewhere/9.png").write_bytes(encoded(RGB[9]))
    (tree / "train/bee/far").symlink_to(tree / "elsewhere")
    data = load_image_data("image_folder", path=tree)
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.notes == (
        "left out: 1 .txt file, 1 file outside the class folders, 1 folder elsewhere, "
        "2 links to a folder that is read already",
    )


def test_files_that_are_left_out_are_counted(tree):
    for name in ("ant/1.heic", "ant/2.heic", "bee/notes.txt", "bee/README", "labels.csv"):
        (tree / "train" / name).write_text("x")
    (tree / "train/ant/gone.png").symlink_to("/nowhere/at/all.png")
    (tree / "train/ant/4.gif").write_bytes(encoded(RGB[0, ..., 0], "GIF"))
    (tree / "val").mkdir()
    data = load_image_data("image_folder", path=tree)
    assert len(data.train) == 6 and data.train.images[5, 0].numpy().tolist() == RGB[0, ..., 0].tolist()
    assert data.notes == (
        "left out: 2 .heic files, 2 .txt files, 1 dead link, 2 files outside the class folders, "
        "1 file without an ending, 1 folder val",
    )


def test_file_names_that_are_not_utf8(tree):
    os.rename(tree / "train/ant/0.png", os.fsencode(tree / "train/ant") + b"/caf\xe9.png")
    fails(rf"{tree}/train/ant: expected file names in UTF-8, came b'caf.xe9\.png'", tree, source="image_folder")


# --- digits and torchvision ------------------------------------------------------------------------------------------


def test_digits():
    data = load_image_data("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, (8, 8))
    assert data.test.labels.bincount().tolist() == [36] * 10
    # Together the two splits are scikit-learn's data, each in its order; 16ths are spread over 0..255.
    truth = sklearn_datasets.load_digits()
    values = [int(v * 255 / 16 + 0.5) for v in range(17)]
    wanted = [
        (tuple(values[int(v)] for v in image.ravel()), int(t))
        for image, t in zip(truth.images, truth.target, strict=True)
    ]
    parts = [
        [(tuple(i.flatten().tolist()), int(y)) for i, y in zip(s.images, s.labels, strict=True)]
        for s in (data.train, data.test)
    ]
    assert sorted(wanted) == sorted(parts[0] + parts[1])
    for part in parts:
        following = iter(wanted)
        assert all(example in following for example in part)
    again = load_image_data("digits")
    assert torch.equal(again.test.images, data.test.images)


def test_digits_limits_and_resizing():
    whole, some = (
        load_image_data("digits"),
        load_image_data("digits", train_examples=50, test_examples=7, image_size=(16, 12)),
    )
    assert torch.equal(some.train.labels, whole.train.labels[:50]) and len(some.test) == 7
    assert some.train.images.shape == (50, 1, 16, 12)
    expected = Image.fromarray(whole.test.images[3, 0].numpy()).resize((12, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(some.test.images[3, 0].numpy(), np.asarray(expected))
    fails(r"data\.train_examples: expected 1 to 1437 .*came 1438", source="digits", train_examples=1438)


def test_options_without_effect_are_refused():
    fails(r'data\.path: .*"digits" does not use it', "/tmp", source="digits")
    fails(r'data\.label_column: .*"digits" does not use it', source="digits", label_column="x")
    fails(r'data\.image_column: .*"mnist" does not use it', source="mnist", image_column="x")
    fails(r"data\.source: expected one of digits, cifar10.*got 'imagenet'", source="imagenet")
    for size in (32, (0, 3), (3,), (3.0, 3), "ab", (True, 3)):
        fails(r"data\.image_size", source="digits", image_size=size)


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "mnist", "svhn"])
def test_torchvision_absent_and_offline(source, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    where = str(tmp_path / "pics")
    fails(rf"data\.path: .*{source}.*{where}.*data\.source \"parquet\".*data\.download", where, source, download=False)
    fails(rf"data\.path: {source} is not in {where} and its download failed .*not known", where, source, download=True)


def test_torchvision_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fails(f"{tmp_path}/.cache/genray", source="mnist", download=False)


def test_mnist_from_idx_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = RGB[..., 0].repeat(5, 1)[:, :28].repeat(6, 2)[:, :, :28]
    for prefix, part in (("train", slice(0, 17)), ("t10k", slice(17, 23))):
        images, labels = pixels[part], LABELS[part].astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + labels.tobytes())
    data = load_image_data("mnist", path=tmp_path, download=False, test_examples=4)
    assert_is(data.train, pixels[:17, ..., None], LABELS[:17])
    assert_is(data.test, pixels[17:21, ..., None], LABELS[17:21])
    assert data.class_names == ("0", "1", "2")


def test_svhn_ten_means_zero(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    for part, some in (("train", slice(0, 17)), ("test", slice(17, 23))):
        stored = {"X": RGB[some].transpose(1, 2, 3, 0), "y": np.where(LABELS == 0, 10, LABELS)[some, None]}
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", stored)
    data = load_image_data("svhn", path=tmp_path, download=False)
    assert_is(data.train, RGB[:17], LABELS[:17])
    assert_is(data.test, RGB[17:], LABELS[17:])


def test_cifar_from_its_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.random.default_rng(2).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for index, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        two = slice(2 * index, 2 * index + 2)
        entry = {"data": pixels[two].transpose(0, 3, 1, 2).reshape(2, -1), "labels": [0, 1]}
        (base / name).write_bytes(pickle.dumps(entry))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car"]}))
    data = load_image_data("cifar10", path=tmp_path, download=False)
    assert_is(data.train, pixels[:10], [0, 1] * 5)
    assert_is(data.test, pixels[10:], [0, 1])
    assert data.class_names == ("plane", "car")


# --- splits ----------------------------------------------------------------------------------------------------------


def numbered(labels):
    """A split whose image i holds the number i, so that examples can be told apart."""
    count = len(labels)
    images = torch.arange(count).view(count, 1, 1, 1).to(torch.int16).view(torch.uint8).view(count, 1, 1, 2)
    return Split(images, torch.as_tensor(labels))


def numbers(split):
    return split.images.contiguous().view(torch.int16).flatten().tolist()


def test_split_checks_and_first():
    split = numbered([0, 1, 2, 1])
    assert len(split) == 4 and numbers(split.first(3)) == [0, 1, 2]
    for n in (0, -1, 5):
        with pytest.raises(DataError, match=f"evaluation.examples: expected 1 to 4 .*came {n}"):
            split.first(n, "evaluation.examples")
    with pytest.raises(ValueError, match="images: expected torch.uint8"):
        Split(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: expected one an image"):
        Split(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_validation_split_of_digits():
    train = load_image_data("digits").train
    rest, held_out = validation_split(train, 105, seed=3)
    assert (len(rest), len(held_out)) == (1332, 105)
    assert sorted(held_out.labels.bincount().tolist()) == [10] * 5 + [11] * 5
    again = validation_split(train, 105, seed=3)[1]
    assert torch.equal(again.images, held_out.images)
    assert not torch.equal(validation_split(train, 105, seed=4)[1].images, held_out.images)
