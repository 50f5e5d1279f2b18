"""Images that a program passes to `genray.train`, and those that it takes out of a run."""

import numpy as np
import pytest
import torch
from PIL import Image

import genray
from genray.data.datasets import load_image_data
from genray.errors import ConfigError, DataError, RunFolderError

TINY = [
    "name=own", "training.epochs=2", "training.batch_size=30", "data.train_examples=80", "data.test_examples=24",
    "data.validation_examples=20", "model.width=4", "base_learners.linf.attack.num_steps=1",
    "global_learner.warmup_epochs=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    data = load_image_data("digits")
    return {"train": data.train.take(), "test": data.test.take()}


def trained(storage, overrides=(), **how):
    genray.train(None, [*TINY, *overrides], runtime="local", storage=str(storage), **how)
    return torch.load(storage / "own/model.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("usual"))


class OfPictures(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.fromarray(self.images[i, 0].numpy()), int(self.labels[i])


FORMS = {
    "uint8 tensors": lambda x, y: (x, y),
    "float arrays, channels last": lambda x, y: (x.numpy().transpose(0, 2, 3, 1) / 255, y.numpy().astype(np.int32)),
    "float32 tensors": lambda x, y: (x.float() / 255, y),
    "grey arrays": lambda x, y: (x.numpy()[:, 0], y.tolist()),
    "pictures": OfPictures,
    "torch's dataset": lambda x, y: torch.utils.data.TensorDataset(x, y),
}


@pytest.mark.parametrize("form", FORMS)
def test_passed_images_train_as_the_same_images_of_a_source(form, digits, usual, tmp_path):
    given = {part: FORMS[form](*digits[part]) for part in digits}
    before = digits["train"][0].clone()
    found = trained(tmp_path, **given)
    assert all(torch.equal(found[key], usual[key]) for key in usual)
    assert torch.equal(digits["train"][0], before), "the caller's images are as before"


def test_channels_last_colours_are_told_by_their_axis(tmp_path):
    numbers = np.random.default_rng(0)
    x, y = numbers.integers(0, 256, (30, 9, 10, 3), dtype=np.uint8), np.arange(30) % 3
    last = load_image_data("arrays", path={"train": (x, y), "test": (x[:6], y[:6])})
    first = load_image_data("arrays", path={"train": (x.transpose(0, 3, 1, 2), y), "test": (x[:6], y[:6])})
    assert last.train.shape == (3, 9, 10) and torch.equal(last.train.images, first.train.images)


def test_a_resumed_run_wants_the_same_images(digits, tmp_path):
    class Stopped(Exception):
        pass

    def stop(record):
        raise Stopped

    whole = trained(tmp_path / "whole", **digits)
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", **digits, on_epoch=stop)
    x, y = digits["train"]
    with pytest.raises(RunFolderError, match="the data are not those the run began with: train"):
        trained(tmp_path / "parts", resume=True, train=(255 - x, y), test=digits["test"])
    with pytest.raises(DataError, match='the images of source "arrays" are in no file'):
        trained(tmp_path / "parts", ["data.source=arrays"], resume=True)
    found = trained(tmp_path / "parts", **digits, resume=True)
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    with pytest.raises(DataError, match='the images of source "arrays" are in no file; pass them'):
        genray.test_images(tmp_path / "parts/own")


def test_the_test_images_of_a_run(trained_run, digits):
    x, y = genray.test_images(trained_run)
    assert x.dtype == np.uint8 and (x == digits["test"][0][: len(x)].numpy()).all()
    assert y.dtype == np.int64 and (y == digits["test"][1][: len(y)].numpy()).all()
    with pytest.raises(genray.errors.CheckpointError, match="expected a run folder, got a file"):
        genray.test_images(trained_run / "model.pt")


X, Y = np.zeros((30, 1, 8, 8), dtype=np.uint8), np.arange(30) % 3
WRONG = {
    "no test": ({"train": (X, Y)}, "test: missing, expected (x, y) or a Dataset"),
    "three": ({"train": (X, Y, Y), "test": (X, Y)}, "train: expected (x, y), got 3 values"),
    "text": ({"train": "images", "test": (X, Y)}, "train: expected (image, label) at 0 of the Dataset, got ValueError"),
    "number": ({"train": 3, "test": (X, Y)}, "train: expected (x, y) or a Dataset with a length, got int"),
    "labels": ({"train": (X, Y[:5]), "test": (X, Y)}, "train: expected 30 integer labels, got int64 of shape (5,)"),
    "float labels": ({"train": (X, Y), "test": (X, Y / 2)}, "test: expected 30 integer labels, got float64"),
    "negative": ({"train": (X, Y - 1), "test": (X, Y)}, "expected a class label from 0 to 2"),
    "shape": ({"train": (X[0, 0], Y), "test": (X, Y)}, "train: expected images (N, C, H, W)"),
    "bytes": ({"train": (X.astype(np.int64), Y), "test": (X, Y)}, "train: expected images as uint8, or as floats"),
    "range": ({"train": (X + 2.0, Y), "test": (X, Y)}, "train: expected floats in [0, 1]"),
    "nan": ({"train": (X * np.nan, Y), "test": (X, Y)}, "train: expected floats in [0, 1]"),
    "objects": ({"train": (np.array([None] * 30), Y), "test": (X, Y)}, "train: expected images as numbers"),
    "ragged": ({"train": ([[1], [2, 3]], Y), "test": (X, Y)}, "train: expected images as an array or tensor"),
    "sizes": ({"train": [(X[0], 0), (X[0, :, 1:], 1)], "test": (X, Y)}, "expected images of one shape, got (1, 8, 8)"),
    "other size": ({"train": (X, Y), "test": (X[:, :, 1:], Y)}, "expected test images of the training images' 8x8"),
    "channels": ({"train": (X, Y), "test": (X.repeat(3, 1), Y)}, "test: expected images of 1 channels as in train"),
    "empty": ({"train": [], "test": (X, Y)}, "train: expected at least 1 example, came 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_for_wrong_images(case, tmp_path):
    given, says = WRONG[case]
    with pytest.raises((DataError, ConfigError)) as found:
        trained(tmp_path, ["data.train_examples=null", "data.test_examples=null"], **given)
    assert says in str(found.value) and "\n" not in str(found.value) and not (tmp_path / "own/config.yaml").exists()
