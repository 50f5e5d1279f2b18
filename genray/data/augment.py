"""Training augmentation: batched tensor code, and torchvision's transforms image by image; every draw is keyed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from genray.core.mixed_labels import MixedLabels

PAD_MODES = ("zeros", "reflect")


def random_crop(images: torch.Tensor, padding: int, generator: torch.Generator, mode: str = "zeros") -> torch.Tensor:
    """Pads every image on all four sides and cuts a window of the original size at a random place of its own.

    Args:
        images: (N, C, H, W), any dtype (uint8 stays uint8).
        padding: pixels a side, >= 0; 0 returns the images as they are and draws nothing.
        generator: source of the offsets; row and column offset of each image are uniform on 0..2*padding.
        mode: "zeros" (the usual CIFAR augmentation) or "reflect" (edge pixel not repeated; Rice et al., AWP).

    Returns:
        (N, C, H, W), same dtype and device; the input is unchanged.

    Raises:
        ValueError: unknown mode, negative padding, or a reflection as wide as the image.
    """
    _check_padding(padding, mode)
    if padding == 0:
        return images
    count, _, height, width = images.shape
    padded = _pad(images, padding, mode)
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator, device=generator.device)
    rows, columns = offsets.to(images.device, non_blocking=True)
    # A view holding all (2*padding+1)**2 windows of each image; indexing copies only the chosen one.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=images.device), :, rows, columns]


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrors each image left to right with probability one half, independently.

    Args:
        images: (N, C, H, W), any dtype.
        generator: source of one coin an image.

    Returns:
        (N, C, H, W), same dtype and device; the input is unchanged.
    """
    coins = torch.randint(0, 2, (images.shape[0],), generator=generator, device=generator.device)
    heads = coins.to(images.device, non_blocking=True).bool().view(-1, 1, 1, 1)
    return torch.where(heads, images.flip(-1), images)


def cutout(images: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """Sets a square of each image to zero (DeVries & Taylor, arXiv 1708.04552).

    Args:
        images: (N, C, H, W), any dtype.
        side: of the square, pixels >= 1. Its centre is uniform on the image's pixels; what lies outside is cut off.
        generator: source of the centres.

    Returns:
        (N, C, H, W), same dtype and device; the input is unchanged.
    """
    count, _, height, width = images.shape
    inside = []
    for size in (height, width):
        first = torch.randint(0, size, (count, 1), generator=generator, device=generator.device) - side // 2
        distance = torch.arange(size, device=generator.device) - first
        inside.append(((distance >= 0) & (distance < side)).to(images.device, non_blocking=True))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0)


def cutmix(images: torch.Tensor, labels: torch.Tensor, alpha: float, numbers: np.random.Generator):
    """Puts a box of another image of the batch into each image (Yun et al., 1905.04899), as torchvision's `CutMix`.

    Here each image has a box and a weight of its own: lambda ~ Beta(alpha, alpha), a box of sqrt(1 - lambda) of height
    and width at a uniform centre, cut off at the image's border; partners are a random permutation of the batch.

    Args:
        images: (N, C, H, W), any dtype; unchanged.
        labels: (N,) int64.
        alpha: above 0.
        numbers: source of the draws, on the host, so that they are the same on every device.

    Returns:
        (N, C, H, W), and their `MixedLabels`, by area.
    """
    count, _, *sizes = images.shape
    partner = torch.from_numpy(numbers.permutation(count)).to(images.device, non_blocking=True)
    half = 0.5 * np.sqrt(1 - numbers.beta(alpha, alpha, count))
    inside, area = [], np.ones(count)
    for size in sizes:
        centre, reach = numbers.integers(0, size, count), (half * size).astype(np.int64)
        first, stop = np.maximum(centre - reach, 0), np.minimum(centre + reach, size)
        within = (np.arange(size) >= first[:, None]) & (np.arange(size) < stop[:, None])
        inside.append(torch.from_numpy(within).to(images.device, non_blocking=True))
        area *= (stop - first) / size
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    weight = torch.from_numpy(1 - area).to(images.device, torch.float32, non_blocking=True)
    return torch.where(box, images[partner], images), MixedLabels(labels, labels[partner], weight)


def each_keyed(transform: Callable, images: torch.Tensor, seed_of: Callable[[int], int]) -> torch.Tensor:
    """Applies a transform that draws from torch's global CPU generator to each image, and restores the generator.

    Args:
        images: (N, C, H, W).
        seed_of: position in the batch -> seed of that image's draws.
    """
    state, made = torch.get_rng_state(), []
    try:
        for i, image in enumerate(images):
            torch.default_generator.manual_seed(seed_of(i))
            made.append(transform(image))
    finally:
        torch.set_rng_state(state)
    return torch.stack(made)


@dataclass(frozen=True)
class Augmentation:
    """Random crop, random flip, then image by image resized crop, policy and erasing, then cutout.

    `Augmentation()` does nothing.

    Attributes:
        crop_padding: pixels of padding a side before the crop; 0 turns the crop off.
        flip: whether to mirror half of the images.
        pad_mode: "zeros" or "reflect".
        cutout: side of a square of zeros in each image; 0 turns it off.
        resized_crop: smallest and largest share of the area of a crop, then resized to the image's size; None: none.
        policy: of torchvision: "randaugment" with `num_ops` operations of `magnitude`, "trivialaugment", or
            "autoaugment_cifar10", "autoaugment_imagenet", "autoaugment_svhn".
        erasing: probability of a rectangle of zeros of 2 to 33 % of the area.

    Raises:
        ValueError: unknown pad_mode or negative crop_padding.
    """

    crop_padding: int = 0
    flip: bool = False
    pad_mode: str = "zeros"
    cutout: int = 0
    resized_crop: tuple[float, float] | None = None
    policy: str | None = None
    num_ops: int = 2
    magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self):
        _check_padding(self.crop_padding, self.pad_mode)

    def __call__(
        self, images: torch.Tensor, generator: torch.Generator, seed_of: Callable[[int], int] = lambda i: i
    ) -> torch.Tensor:
        """Augments (N, C, H, W) images of any dtype (policies: uint8).

        Args:
            generator: source of the draws for the whole batch.
            seed_of: position in the batch -> seed of the draws for this image alone.
        """
        images = random_crop(images, self.crop_padding, generator, self.pad_mode)
        images = random_flip(images, generator) if self.flip else images
        if self.resized_crop or self.policy or self.erasing:
            images = each_keyed(self._of_one(tuple(images.shape[-2:])), images, seed_of)
        return cutout(images, self.cutout, generator) if self.cutout else images

    def _of_one(self, size):
        """The transform of one image."""
        from torchvision.transforms import v2  # not above: most runs do not need it

        policies = {
            "randaugment": lambda: v2.RandAugment(self.num_ops, self.magnitude),
            "trivialaugment": v2.TrivialAugmentWide,
            **{f"autoaugment_{p.value}": lambda p=p: v2.AutoAugment(p) for p in v2.AutoAugmentPolicy},
        }
        parts = [v2.RandomResizedCrop(size, self.resized_crop, antialias=True)] if self.resized_crop else []
        parts += [policies[self.policy]()] if self.policy else []
        return v2.Compose(parts + ([v2.RandomErasing(self.erasing)] if self.erasing else []))


def _check_padding(padding: int, mode: str) -> None:
    if mode not in PAD_MODES:
        raise ValueError(f"padding mode: expected one of {', '.join(PAD_MODES)}, got {mode!r}")
    if padding < 0:
        raise ValueError(f"padding: expected 0 or more pixels, got {padding}")


def _pad(images: torch.Tensor, padding: int, mode: str) -> torch.Tensor:
    if mode == "zeros":
        return F.pad(images, (padding,) * 4)
    height, width = images.shape[-2:]
    if padding >= min(height, width):
        raise ValueError(f"padding: expected less than the image size {height}x{width} for reflect, got {padding}")
    # torch's own reflection padding does not take uint8, hence by index.
    rows, columns = (_reflected(size, padding, images.device) for size in (height, width))
    return images.index_select(2, rows).index_select(3, columns)


def _reflected(size: int, padding: int, device: torch.device) -> torch.Tensor:
    """Source index of each padded position: p..1, 0..size-1, size-2..size-1-p."""
    position = torch.arange(-padding, size + padding, device=device).abs()
    return (size - 1) - ((size - 1) - position).abs()
