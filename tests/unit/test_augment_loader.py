"""Augmentation against a slow loop over images, and the loader's order, coverage and replay."""

import numpy as np
import pytest
import torch

from genray.core import rng
from genray.data.augment import Augmentation, cutout, random_crop, random_flip
from genray.data.loader import BatchLoader
from genray.data.splits import Split
from genray.errors import DataError


def pictures(count, height=6, width=5, channels=3, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    )


def crops(image, padding, mode):
    """{(row, column): crop} of one (C, H, W) image, by NumPy's own padding."""
    _, height, width = image.shape
    padded = np.pad(
        image.numpy(), ((0, 0), (padding, padding), (padding, padding)), "constant" if mode == "zeros" else mode
    )
    side = range(2 * padding + 1)
    return {(r, c): padded[:, r : r + height, c : c + width] for r in side for c in side}


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_equals_a_loop_over_images(padding, mode):
    images = pictures(40)
    cropped = random_crop(images, padding, rng.generator("cpu", 1, "crop"), mode)
    rows, columns = torch.randint(0, 2 * padding + 1, (2, 40), generator=rng.generator("cpu", 1, "crop")).tolist()
    for image, result, r, c in zip(images, cropped, rows, columns, strict=True):
        assert np.array_equal(result.numpy(), crops(image, padding, mode)[r, c])
    assert cropped.dtype == torch.uint8 and torch.equal(images, pictures(40))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_every_offset_occurs_equally_often_and_independently(mode):
    count, padding = 5000, 2
    image = pictures(1)
    found = random_crop(image.repeat(count, 1, 1, 1), padding, rng.generator("cpu", 2), mode).numpy()
    choices = crops(image[0], padding, mode)
    accumulator = {place: int((found == crop).all((1, 2, 3)).sum()) for place, crop in choices.items()}
    assert sum(accumulator.values()) == count  # each result is exactly one of the 25 crops
    assert all(140 <= n <= 260 for n in accumulator.values())  # 200 expected, standard deviation 14


def test_crop_without_padding_and_of_floats():
    images = pictures(3)
    assert torch.equal(random_crop(images, 0, rng.generator("cpu", 0)), images)
    whole = random_crop(images, 2, rng.generator("cpu", 0))
    assert torch.equal(random_crop(images.float(), 2, rng.generator("cpu", 0)), whole.float())


def test_crop_refuses():
    images, generator = pictures(2), rng.generator("cpu", 0)
    with pytest.raises(ValueError, match="expected one of zeros, reflect, got 'wrap'"):
        random_crop(images, 1, generator, "wrap")
    with pytest.raises(ValueError, match="expected 0 or more pixels, got -1"):
        random_crop(images, -1, generator)
    with pytest.raises(ValueError, match="expected less than the image size 6x5 for reflect, got 5"):
        random_crop(images, 5, generator, "reflect")
    assert random_crop(images, 5, generator).shape == images.shape
    with pytest.raises(ValueError, match="expected one of zeros"):
        Augmentation(crop_padding=1, pad_mode="edge")
    with pytest.raises(ValueError, match="got -2"):
        Augmentation(crop_padding=-2)


def test_flip_mirrors_half_of_the_images_whole():
    images = pictures(2000)
    flipped = random_flip(images, rng.generator("cpu", 5))
    same = (flipped == images).all(3).all(2).all(1)
    mirrored = (flipped == torch.from_numpy(images.numpy()[..., ::-1].copy())).all(3).all(2).all(1)
    assert bool((same ^ mirrored).all())
    assert 900 < int(same.sum()) < 1100  # standard deviation 22
    assert torch.equal(images, pictures(2000)) and flipped.dtype == torch.uint8
    neighbours = int((same[1:] == same[:-1]).sum())
    assert 900 < neighbours < 1100  # one coin an image, not one a batch


def hole(side, row, column, height, width):
    """A square around (row, column), pixel by pixel; an even side reaches one pixel further up and left."""
    before, after = side // 2, (side - 1) // 2
    mask = np.zeros((height, width), bool)
    for r in range(row - before, row + after + 1):
        for c in range(column - before, column + after + 1):
            if 0 <= r < height and 0 <= c < width:
                mask[r, c] = True
    return mask


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 12])
def test_cutout_equals_a_loop_over_images(side):
    """The same hole in all channels, cut off at the border; nothing else changes."""
    images = pictures(60).clamp_min(1)
    cut = cutout(images, side, rng.generator("cpu", 1, "cutout"))
    stream = rng.generator("cpu", 1, "cutout")
    rows, columns = (torch.randint(0, size, (60,), generator=stream).tolist() for size in (6, 5))
    for image, result, row, column in zip(images, cut, rows, columns, strict=True):
        expected = image.numpy() * ~hole(side, row, column, 6, 5)
        assert np.array_equal(result.numpy(), expected)
    assert cut.dtype == torch.uint8 and torch.equal(images, pictures(60).clamp_min(1))
    assert (cut == 0).any() and (side == 12 or (cut != 0).any())


def test_centres_of_holes_are_uniform_and_independent():
    images = torch.ones(6000, 1, 6, 5)
    cut = cutout(images, 1, rng.generator("cpu", 3, "cutout"))
    assert ((cut == 0).sum((1, 2, 3)) == 1).all()
    counts = (cut == 0).sum((0, 1)).flatten()  # 200 expected at each of the 30 pixels
    assert float(((counts - 200.0) ** 2 / 200).sum()) < 58  # chi square, 29 degrees of freedom: p = 0.001
    assert ((cut == 0).flatten(1).int().argmax(1).diff() == 0).float().mean() < 0.06  # not one place for all


def test_augmentation_cuts_out_last():
    """Padding is cropped in before, and the hole is in the finished image."""
    images = pictures(30).clamp_min(1)
    made = Augmentation(flip=True, cutout=3)(images, rng.generator("cpu", 5, "all"))
    stream = rng.generator("cpu", 5, "all")
    expected = cutout(random_flip(images, stream), 3, stream)
    assert torch.equal(made, expected) and (made == 0).any()


def test_augmentation_crops_then_flips():
    images = pictures(30)
    both = Augmentation(crop_padding=2, flip=True, pad_mode="reflect")(images, rng.generator("cpu", 3))
    generator = rng.generator("cpu", 3)
    assert torch.equal(both, random_flip(random_crop(images, 2, generator, "reflect"), generator))
    assert torch.equal(Augmentation()(images, rng.generator("cpu", 3)), images)
    assert torch.equal(
        Augmentation(flip=True)(images, rng.generator("cpu", 3)), random_flip(images, rng.generator("cpu", 3))
    )
    assert torch.equal(
        Augmentation(crop_padding=1)(images, rng.generator("cpu", 3)), random_crop(images, 1, rng.generator("cpu", 3))
    )


# --- loader ----------------------------------------------------------------------------------------------------------


def make(count=23, batch_size=5, **options):
    """A loader over `count` pictures whose label is their number."""
    settings = {"seed": 0, "order_key": "shared", "augmentation_key": "linf", "augmentation": None, "device": "cpu"}
    split = Split(pictures(count), torch.arange(count))
    return BatchLoader(split, batch_size=batch_size, **{**settings, **options})


def order(loader, epoch):
    steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
    return [y for step in steps for y in loader.batch(step)[1].tolist()]


def test_each_example_once_an_epoch_with_a_short_last_batch():
    loader = make()
    assert loader.steps_per_epoch == 5 and make(count=20).steps_per_epoch == 4
    assert [len(loader.batch(step)[1]) for step in range(10)] == [5, 5, 5, 5, 3] * 2
    orders = [order(loader, epoch) for epoch in range(4)]
    assert all(sorted(o) == list(range(23)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4 and list(range(23)) not in orders


def test_drop_last_leaves_out_other_examples_each_epoch():
    loader = make(drop_last=True)
    assert loader.steps_per_epoch == 4
    orders = [order(loader, epoch) for epoch in range(3)]
    assert all(len(set(o)) == 20 for o in orders) and len({frozenset(o) for o in orders}) == 3


def test_images_are_the_right_ones_in_unit_range():
    x, y = make().batch(7)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert np.array_equal(x.numpy(), pictures(23).numpy()[y.numpy()].astype(np.float32) / np.float32(255))


def test_global_random_state_is_neither_used_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    x, _ = make(augmentation=Augmentation(2, True)).batch(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(make(augmentation=Augmentation(2, True)).batch(3)[0], x)


def test_order_and_augmentation_have_separate_keys():
    augmentation = Augmentation(crop_padding=2, flip=True)
    a, b = make(augmentation=augmentation), make(augmentation=augmentation, augmentation_key="natural")
    assert order(a, 1) == order(b, 1) and not torch.equal(a.batch(0)[0], b.batch(0)[0])
    assert order(make(order_key="own"), 0) != order(make(), 0)
    assert order(make(seed=1), 0) != order(make(), 0)
    c = make(augmentation=augmentation, seed=1)
    assert not torch.equal(c.batch(0)[0], a.batch(0)[0])


def test_augmentation_is_fresh_at_every_step():
    same = Split(pictures(1).repeat(8, 1, 1, 1), torch.arange(8))
    loader = BatchLoader(same, batch_size=8, seed=0, order_key="o", augmentation_key="a", device="cpu",
                         augmentation=Augmentation(crop_padding=2))  # fmt: skip
    seen = {loader.batch(step)[0].numpy().tobytes() for step in range(20)}
    assert len(seen) == 20


def test_augmentation_matches_its_documented_key():
    augmentation = Augmentation(crop_padding=1, flip=True)
    x, y = make(augmentation=augmentation, seed=4).batch(6)
    expected = augmentation(pictures(23)[y], rng.generator("cpu", 4, "linf", "augmentation", 6))
    assert torch.equal(x, expected.float() / 255)


def test_batch_larger_than_the_data():
    assert len(make(count=3, batch_size=8).batch(2)[1]) == 3
    with pytest.raises(DataError, match="batch_size: expected at most the 3 training examples.*came 8"):
        make(count=3, batch_size=8, drop_last=True)


def test_loader_refuses():
    with pytest.raises(DataError, match="batch_size: expected 1 or more, came 0"):
        make(batch_size=0)
    with pytest.raises(DataError, match="expected at least 1 example, came 0"):
        make(count=0)
    with pytest.raises(ValueError, match="step: expected 0 or more, got -1"):
        make().batch(-1)


def test_batches_do_not_share_memory_with_the_data():
    loader = make(augmentation=None)
    x, y = loader.batch(0)
    before = x.clone()
    x.zero_(), y.zero_()
    assert torch.equal(loader.batch(0)[0], before)
