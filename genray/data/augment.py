"""Training augmentation as batched tensor code: no Python loop over images, and every draw from a given generator."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

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


@dataclass(frozen=True)
class Augmentation:
    """Random crop, then random horizontal flip, then cutout; `Augmentation()` does nothing.

    Attributes:
        crop_padding: pixels of padding a side before the crop; 0 turns the crop off.
        flip: whether to mirror half of the images.
        pad_mode: "zeros" or "reflect".
        cutout: side of a square of zeros in each image; 0 turns it off.

    Raises:
        ValueError: unknown pad_mode or negative crop_padding.
    """

    crop_padding: int = 0
    flip: bool = False
    pad_mode: str = "zeros"
    cutout: int = 0

    def __post_init__(self):
        _check_padding(self.crop_padding, self.pad_mode)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augments (N, C, H, W) images of any dtype with draws from `generator`, crop first."""
        images = random_crop(images, self.crop_padding, generator, self.pad_mode)
        images = random_flip(images, generator) if self.flip else images
        return cutout(images, self.cutout, generator) if self.cutout else images


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
