"""Encoded image bytes -> one uint8 tensor."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from genray.data.request import one_line
from genray.errors import DataError

# Names of the common formats by their first bytes: trying only that decoder takes a third off Pillow's time.
_SIGNATURES = {b"\x89PNG": "PNG", b"RIFF": "WEBP", b"\xff\xd8\xff": "JPEG"}
_CHANNELS = {"L": 1, "RGB": 3}
# Smaller images decode faster than threads hand over Python's lock (32x32 WebP: 1.5 times slower with two).
_THREADS_FROM_PIXELS = 128 * 128


class ImageStack:
    """Collects decoded images of one size into a (count, C, H, W) uint8 tensor.

    Grey images stay grey (C = 1) and colour images RGB (C = 3); where both occur, all become RGB. An alpha channel is
    dropped and palettes are resolved.

    Args:
        count: how many images will come.
        image_size: (H, W) to resize all of them to, or None if they must agree by themselves.
    """

    def __init__(self, count: int, image_size: tuple[int, int] | None = None):
        self._count, self._image_size = count, image_size
        self._images, self._filled = None, 0

    def append(self, blobs: Sequence[bytes | None], locate: Callable[[int], str]) -> None:
        """Decodes the next images.

        Args:
            blobs: encoded files (PNG, WebP, JPEG, ... whatever Pillow reads).
            locate: index in `blobs` -> file and row, for messages.

        Raises:
            DataError: an image is missing, corrupt, not 8 bits a channel, or of another size; file and row are named.
        """
        if not blobs:
            return
        decoded = self._decode_all(blobs, locate)
        if self._images is None:
            height, width, _ = decoded[0].shape
            self._images = torch.empty((self._count, 1, height, width), dtype=torch.uint8)
        expected = tuple(self._images.shape[2:])
        for index, image in enumerate(decoded):
            if image.shape[:2] != expected:
                raise DataError(
                    f"{locate(index)}: expected {expected[0]}x{expected[1]} pixels (H x W) like the first image, came "
                    f"{image.shape[0]}x{image.shape[1]}; set data.image_size to resize all images"
                )
        self._store(decoded)

    def finish(self) -> torch.Tensor:
        """(count, C, H, W) uint8."""
        assert self._images is not None and self._filled == self._count, "fewer images came than announced"
        return self._images

    def _decode_all(self, blobs, locate) -> list[np.ndarray]:
        def decode(index):
            return _decode(blobs[index], self._image_size, locate, index)

        first = decode(0)
        rest = range(1, len(blobs))
        if first.shape[0] * first.shape[1] < _THREADS_FROM_PIXELS:
            return [first, *map(decode, rest)]
        with ThreadPoolExecutor() as pool:
            return [first, *pool.map(decode, rest)]

    def _store(self, decoded: list[np.ndarray]) -> None:
        channels = {image.shape[2] for image in decoded}
        if max(channels) > self._images.shape[1]:
            self._images = self._images.expand(-1, 3, -1, -1).contiguous()
        if len(channels) > 1:
            decoded = [image if image.shape[2] == 3 else image.repeat(3, axis=2) for image in decoded]
        end = self._filled + len(decoded)
        # A grey batch spreads over the three channels of an RGB stack by itself.
        self._images[self._filled : end] = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        self._filled = end


def resize_images(images: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Resizes (N, C, H, W) uint8 images, C = 1 or 3, to image_size (H, W): bilinear, antialiased, as for files."""
    resized = [np.asarray(_resized(_to_pillow(image), image_size)) for image in images]
    return np.stack(resized).reshape(len(images), *image_size, images.shape[1]).transpose(0, 3, 1, 2)


def _decode(blob, image_size, locate, index) -> np.ndarray:
    """One encoded file -> (H, W, C) uint8."""
    if blob is None:
        raise DataError(f"{locate(index)}: expected the bytes of an image file, came null")
    try:
        image = _open_8bit(blob)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to, SyntaxError included
        raise DataError(
            f"{locate(index)}: expected an image file with 8 bits a channel, came {one_line(error)}"
        ) from error
    image = _resized(image, image_size)
    pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)
    return pixels.reshape(image.height, image.width, _CHANNELS[image.mode])


def _open_8bit(blob: bytes) -> Image.Image:
    """Opens and decodes a file as mode "L" or "RGB"."""
    known = next((name for start, name in _SIGNATURES.items() if blob.startswith(start)), None)
    image = Image.open(io.BytesIO(blob), formats=None if known is None else (known,))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}")
    if image.mode not in _CHANNELS:
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    image.load()
    return image


def _to_pillow(image: np.ndarray) -> Image.Image:
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _resized(image: Image.Image, image_size: tuple[int, int] | None) -> Image.Image:
    if image_size is None or image.size == (image_size[1], image_size[0]):
        return image
    return image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
