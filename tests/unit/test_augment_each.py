"""Augmentation image by image and CutMix: against torchvision with the image's seed, loops, and soft labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_learners import small_network
from torchvision.transforms import v2

from genray.attacks import AdaptiveAttack, GradientAttack, StreamDraw
from genray.core.mixed_labels import MixedLabels
from genray.core.rng import host_generator, key_seed
from genray.data.augment import Augmentation, cutmix
from genray.data.loader import BatchLoader
from genray.data.splits import Split

POLICIES = {
    "randaugment": v2.RandAugment(3, 20),
    "trivialaugment": v2.TrivialAugmentWide(),
    "autoaugment_cifar10": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "autoaugment_imagenet": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    "autoaugment_svhn": v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
}
SEED, BATCH = 4, 12


def images(channels=3, count=30):
    return torch.randint(256, (count, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loader(pictures, **augmentation):
    split = Split(pictures, torch.arange(len(pictures)) % 10)
    keys = {"seed": SEED, "order_key": "shared", "augmentation_key": "linf"}
    return BatchLoader(split, batch_size=BATCH, **keys, augmentation=Augmentation(**augmentation), device="cpu")


def by_hand(pictures, transform, step):
    """The loader's batch of a step, with torch's global generator seeded for each image."""
    plain = (loader(pictures).batch(step)[0] * 255).round().to(torch.uint8)
    made = []
    for i, image in enumerate(plain):
        torch.manual_seed(key_seed(SEED, "linf", "augmentation", step, i) & 0xFFFFFFFF)
        made.append(transform(image))
    return torch.stack(made).float() / 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_torchvisions_with_a_seed_for_each_image(policy, channels):
    options = {"policy": policy} | ({"num_ops": 3, "magnitude": 20} if policy == "randaugment" else {})
    expected = by_hand(images(channels), POLICIES[policy], 4)  # of the next epoch, an own order
    ours = loader(images(channels), **options).batch(4)[0]
    assert torch.equal(ours, expected) and not torch.equal(ours, loader(images(channels)).batch(4)[0])


def test_crop_policy_and_erasing_in_their_order():
    parts = [v2.RandomResizedCrop(16, (0.2, 0.8)), POLICIES["trivialaugment"], v2.RandomErasing(0.5)]
    options = {"resized_crop": (0.2, 0.8), "policy": "trivialaugment", "erasing": 0.5}
    assert torch.equal(loader(images(), **options).batch(1)[0], by_hand(images(), v2.Compose(parts), 1))


def test_draws_of_an_image_do_not_depend_on_the_others_and_leave_torchs_generator():
    augmentation, pictures = Augmentation(policy="randaugment", resized_crop=(0.1, 1.0)), images()
    state, stream = torch.get_rng_state(), torch.Generator()
    whole = augmentation(pictures, stream, lambda i: 100 + i)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augmentation(pictures[7:9], stream, lambda i: 107 + i), whole[7:9])
    assert not torch.equal(augmentation(pictures[7:9], stream, lambda i: 108 + i), whole[7:9])


# --- CutMix ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (7, 11)])
def test_cutmix_by_its_pixels(size):
    """Each image has one value, so that its pixels tell where they come from."""
    count = 200
    pictures = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 3, *size).contiguous()
    mixed, labels = cutmix(pictures, torch.arange(count), 1.0, np.random.default_rng(0))
    assert torch.equal(labels.own, torch.arange(count)) and sorted(labels.other.tolist()) == list(range(count))
    for i in range(count):
        own = mixed[i, 0] == i
        assert torch.equal(mixed[i], torch.where(own, i, labels.other[i]).float().expand(3, -1, -1))
        assert labels.weight[i] == pytest.approx(own.float().mean().item(), abs=1e-6) or labels.other[i] == i
        box = (~own).nonzero()
        if len(box):  # it is full
            assert len(box) == (box.amax(0) - box.amin(0) + 1).prod()
    # E[box] is below E[1 - lambda] = 1/2, since boxes are cut off.
    assert 0.5 < labels.weight.mean() < 0.8 and labels.weight.std() > 0.1


def soft(labels, smoothing=0.0):
    both = labels.weight[:, None] * F.one_hot(labels.own, 10) + (1 - labels.weight[:, None]) * F.one_hot(
        labels.other, 10
    )
    return (1 - smoothing) * both + smoothing / 10


def some_labels(count):
    draws = torch.Generator().manual_seed(3)
    own, other = (torch.randint(10, (count,), generator=draws) for _ in range(2))
    return MixedLabels(own, other, torch.rand(count, generator=draws))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_mixed_cross_entropy_is_that_of_soft_labels(smoothing):
    logits, labels = torch.randn(9, 10, generator=torch.Generator().manual_seed(1)), some_labels(9)
    expected = -(soft(labels, smoothing) * logits.log_softmax(1)).sum(1)
    assert torch.allclose(labels.cross_entropy(logits, smoothing), expected, atol=1e-6)
    assert torch.equal(labels[2:5].cross_entropy(logits[2:5]), labels.cross_entropy(logits)[2:5])


@pytest.mark.parametrize("kind", [GradientAttack, AdaptiveAttack])
def test_the_attack_maximises_the_mixed_loss(kind):
    x, labels = images(1, 9)[..., :8, :8] / 255, some_labels(9)
    options = {"step_size": 0.05} if kind is GradientAttack else {}
    attack = kind("linf", 0.1, num_steps=5, start="zero", **options)
    found = [
        attack(small_network(), x, labels.own, StreamDraw(torch.Generator()), target=target)
        for target in (labels, soft(labels), None)
    ]
    assert torch.allclose(found[0], found[1], atol=1e-6) and not torch.allclose(found[0], found[2], atol=1e-3)


def test_draws_are_keyed_by_the_step():
    pictures, labels = images().float(), torch.arange(30)
    made = [cutmix(pictures, labels, 1.0, host_generator(1, "shared", "cutmix", step))[0] for step in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
