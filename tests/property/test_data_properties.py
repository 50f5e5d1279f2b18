"""Laws of the data layer that hold for every shape, size and seed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genray.core import rng
from genray.data.augment import Augmentation
from genray.data.loader import BatchLoader
from genray.data.splits import Split, validation_split
from genray.errors import DataError

SEEDS = st.integers(0, 2**40)
quick = settings(max_examples=60, deadline=None)


def numbered(labels):
    """A split whose image i holds the number i (two bytes)."""
    count = len(labels)
    images = torch.arange(count, dtype=torch.int16).view(torch.uint8).view(count, 1, 1, 2)
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def numbers(split):
    return split.images.contiguous().view(torch.int16).flatten().tolist()


@quick
@given(
    st.integers(-(2**70), 2**70),
    st.lists(st.text() | st.integers(), max_size=4),
    st.lists(st.text() | st.integers(), max_size=4),
)
def test_key_seed_separates_keys(seed, one, other):
    assert 0 <= rng.key_seed(seed, *one) < 2**63
    assert (rng.key_seed(seed, *one) == rng.key_seed(seed, *other)) == (one == other)


@quick
@given(st.lists(st.integers(0, 4), max_size=60), st.integers(0, 70), SEEDS)
def test_validation_split_is_a_balanced_partition(labels, wanted, seed):
    split = numbered(labels)
    try:
        rest, held_out = validation_split(split, wanted, seed)
    except DataError as error:
        smallest = min((labels.count(k) for k in set(labels)), default=1)
        assert wanted > (smallest - 1) * len(set(labels)) and "data.validation_examples" in str(error)
        return
    assert len(held_out) == wanted
    assert sorted(numbers(rest) + numbers(held_out)) == list(range(len(labels)))
    for part in (rest, held_out):
        assert numbers(part) == sorted(numbers(part))
        assert part.labels.tolist() == [labels[i] for i in numbers(part)]
    shares = [held_out.labels.tolist().count(k) for k in set(labels)]
    assert max(shares, default=0) - min(shares, default=0) <= 1
    assert set(rest.labels.tolist()) == set(labels)
    assert numbers(validation_split(split, wanted, seed)[1]) == numbers(held_out)


@quick
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 5), SEEDS, st.booleans())
def test_an_epoch_is_a_permutation(count, batch_size, epoch, seed, drop_last):
    if drop_last and batch_size > count:
        return
    split = numbered(list(range(count)))
    loader = BatchLoader(
        split,
        batch_size=batch_size,
        seed=seed,
        order_key="o",
        augmentation_key="a",
        augmentation=None,
        device="cpu",
        drop_last=drop_last,
    )
    per_epoch = count // batch_size if drop_last else -(-count // batch_size)
    assert loader.steps_per_epoch == per_epoch
    batches = [loader.batch(epoch * per_epoch + i)[1].tolist() for i in range(per_epoch)]
    assert all(len(b) == batch_size for b in batches[:-1])
    seen = [y for b in batches for y in b]
    assert len(set(seen)) == len(seen) == (per_epoch * batch_size if drop_last else count)


@quick
@given(st.integers(0, 200), SEEDS, st.integers(0, 3), st.booleans())
def test_a_step_replays_alone(step, seed, padding, flip):
    split = Split(torch.arange(7 * 48, dtype=torch.int32).to(torch.uint8).view(7, 3, 4, 4), torch.arange(7))
    loaders = [
        BatchLoader(
            split,
            batch_size=3,
            seed=seed,
            order_key="o",
            augmentation_key="a",
            augmentation=Augmentation(padding, flip),
            device="cpu",
        )
        for _ in range(2)
    ]
    loaders[0].batch(0), loaders[0].batch(step + 1)  # the first loader arrives with a history, the second without
    for one, other in zip(loaders[0].batch(step), loaders[1].batch(step), strict=True):
        assert torch.equal(one, other)
