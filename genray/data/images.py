"""Encoded image bytes -> one uint8 tensor."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from genray.core.memory import check_memory, too_large
from genray.data.catalogue import Allocate, Broken
from genray.data.reading import Reading
from genray.errors import DataError, one_line

# Names of the common formats by their first bytes: trying only that decoder takes a third off Pillow's time.
_SIGNATURES = {b"\x89PNG": "PNG", b"RIFF": "WEBP", b"\xff\xd8\xff": "JPEG"}
_CHANNELS = {"L": 1, "RGB": 3}
# Smaller images decode faster than threads hand over Python's lock (32x32 WebP: 1.5 times slower with two).
_THREADS_FROM_PIXELS = 128 * 128
_COPIED_AT_ONCE = 1024  # images
_TURNED = "turned as the EXIF orientation says"
_ON_WHITE = "partly transparent, drawn on white"
_FRAMES = "with several frames, of which the first is read"


class ImageStack:
    """Collects decoded images of one size into a (count, C, H, W) uint8 tensor.

    Grey images stay grey (C = 1) and colour images RGB (C = 3); where both occur, all become RGB. Palettes are
    resolved, images are turned as their EXIF orientation says, and transparent ones are drawn on white: the pixels are
    those that viewers show. Of an animation the first frame is taken.

    Args:
        count: how many images will come.
        image_size: (H, W) to resize all of them to, or None if they must agree by themselves.
        reading: is told of every image and of what was done to it.
        target: makes what the images are put into.
        skip: whether images that cannot be decoded are left out.
        threads: whether threads decode large images.

    Attributes:
        broken: index and file of each image that is left out.
    """

    def __init__(
        self,
        count: int,
        image_size: tuple[int, int] | None,
        reading: Reading,
        target: Allocate | None = None,
        *,
        skip: bool = False,
        threads: bool = True,
    ):
        self._count, self._image_size, self._reading = count, image_size, reading
        self._target, self._skip, self._threads = target or allocate, skip, threads
        self._images: Any = None
        self._filled = self._came = 0
        self.broken: Broken = []

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
        self._came += len(blobs)
        if not decoded:
            return
        if self._images is None:
            height, width, channels = next(iter(decoded.values())).shape
            self._images = self._target((self._count, channels, height, width))
        expected = tuple(self._images.shape[2:])
        for index, image in decoded.items():
            if image.shape[:2] != expected:
                raise DataError(
                    f"{locate(index)}: expected {expected[0]}x{expected[1]} pixels (H x W) like the first image, came "
                    f"{image.shape[0]}x{image.shape[1]}; set data.image_size to resize all images"
                )
        self._store(list(decoded.values()))

    def finish(self) -> Any:
        """(count, C, H, W) uint8, fewer where some are left out: a tensor, or what `target` made."""
        assert self._came == self._count, "fewer images came than announced"
        if self._images is None:
            raise DataError(f"{self.broken[0][1]}: expected an image file, as of all {self._count}, came none")
        return self._images[: self._filled] if isinstance(self._images, torch.Tensor) else self._images

    def _decode_all(self, blobs, locate) -> dict[int, np.ndarray]:
        def decode(index):
            try:
                return _decode(blobs[index], self._image_size, locate, index)
            except DataError:
                if not self._skip:
                    raise
                return None

        first = decode(0)
        rest = range(1, len(blobs))
        large = first is None or first.pixels.shape[0] * first.pixels.shape[1] >= _THREADS_FROM_PIXELS
        if large and self._threads and len(blobs) > 1:
            with ThreadPoolExecutor() as pool:
                decoded = [first, *pool.map(decode, rest)]
        else:
            decoded = [first, *map(decode, rest)]
        self.broken += [(self._came + index, locate(index)) for index, image in enumerate(decoded) if image is None]
        found = {index: image for index, image in enumerate(decoded) if image is not None}
        for image in found.values():
            self._reading.remark(image.remarks)
        return {index: image.pixels for index, image in found.items()}

    def _store(self, decoded: list[np.ndarray]) -> None:
        channels = {image.shape[2] for image in decoded}
        if max(channels) > self._images.shape[1]:
            colour = self._target((self._count, 3, *self._images.shape[2:]))
            for start in range(0, self._filled, _COPIED_AT_ONCE):
                some = slice(start, min(start + _COPIED_AT_ONCE, self._filled))
                colour[some] = self._images[some]
            self._images = colour
        if len(channels) > 1:
            decoded = [image if image.shape[2] == 3 else image.repeat(3, axis=2) for image in decoded]
        end = self._filled + len(decoded)
        # A grey batch spreads over the three channels of an RGB stack by itself.
        self._images[self._filled : end] = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        self._filled = end
        self._reading.count(len(decoded))


class Decoded(NamedTuple):
    """pixels: (H, W, C) uint8. remarks: what was done to the image, as `Reading.remark` takes it."""

    pixels: np.ndarray
    remarks: tuple[str, ...]


def shape_of(
    files: Iterable[tuple[str, bytes | None]], image_size: tuple[int, int] | None, skip: bool
) -> tuple[int, int, int]:
    """(C, H, W) of the first encoded image, or where broken ones are left out of the first sound one.

    Args:
        files: (name, bytes) of each.
    """
    for where, blob in files:
        try:
            height, width, channels = _decode(blob, None, lambda _, where=where: where, 0).pixels.shape
            return channels, *(image_size or (height, width))
        except DataError as error:
            if not skip:
                raise
            last = error
    raise last


def allocate(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised uint8 tensor.

    Raises:
        DataError: it does not fit into the memory that is free.
    """
    check_memory(math.prod(shape), f"{shape[0]} images of {'x'.join(map(str, shape[1:]))} bytes")
    try:
        return torch.empty(shape, dtype=torch.uint8)
    except RuntimeError:  # limits that `free_memory` does not know
        raise too_large(math.prod(shape), f"{shape[0]} images") from None


def resize_images(images: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Resizes (N, C, H, W) uint8 images, C = 1 or 3, to image_size (H, W): bilinear, antialiased, as for files."""
    resized = [np.asarray(_resized(_to_pillow(image), image_size)) for image in images]
    return np.stack(resized).reshape(len(images), *image_size, images.shape[1]).transpose(0, 3, 1, 2)


def _decode(blob, image_size, locate, index) -> Decoded:
    """One encoded file."""
    if blob is None:
        raise DataError(f"{locate(index)}: expected the bytes of an image file, came null")
    try:
        image, remarks = _open_8bit(blob)
    except MemoryError as error:
        raise DataError(f"{locate(index)}: the decoded image does not fit into memory") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to, SyntaxError included
        raise DataError(
            f"{locate(index)}: expected an image file with 8 bits a channel, came {one_line(error)}"
        ) from error
    image = _resized(image, image_size)
    pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)
    return Decoded(pixels.reshape(image.height, image.width, _CHANNELS[image.mode]), tuple(remarks))


def _open_8bit(blob: bytes) -> tuple[Image.Image, list[str]]:
    """Opens and decodes a file as mode "L" or "RGB"; with it, what was done to it."""
    known = next((name for start, name in _SIGNATURES.items() if blob.startswith(start)), None)
    image = Image.open(io.BytesIO(blob), formats=None if known is None else (known,))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}")
    # A telephone's JPEG with a preview behind it (MPO) is no animation.
    remarks = [_FRAMES] if image.format != "MPO" and getattr(image, "is_animated", False) else []
    image.load()  # turns a TIFF; other formats are turned here
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
        remarks.append(_TURNED)
    if image.mode not in _CHANNELS or "transparency" in image.info:
        grey = image.mode in ("1", "L", "LA", "La")
        if image.has_transparency_data:
            image, drawn = _on_white(image)
            remarks += [_ON_WHITE] * drawn
        image = image.convert("L" if grey else "RGB")
    return image, remarks


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image in RGB on a white ground, and whether any of that ground is seen."""
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB"), False
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image.convert("RGB"), mask=alpha)
    return ground, True


def _to_pillow(image: np.ndarray) -> Image.Image:
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _resized(image: Image.Image, image_size: tuple[int, int] | None) -> Image.Image:
    if image_size is None or image.size == (image_size[1], image_size[0]):
        return image
    return image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
