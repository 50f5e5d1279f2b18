"""Images that a program passes to `genray.train`: arrays, tensors, or torch's Dataset (the source `arrays`)."""

from typing import Any

import numpy as np
import torch

from genray.data.catalogue import Catalogue
from genray.data.request import PARTS, DataRequest
from genray.data.sources import from_arrays
from genray.errors import DataError, one_line

ROUNDING = 1e-6


def load_arrays(request: DataRequest) -> Catalogue:
    """The images in `request.path`, {"train": ..., "test": ...}, each as in `genray.train`."""
    request.refuse("image_column", "label_column")
    if not isinstance(request.path, dict):
        raise DataError(
            'data.source: the images of source "arrays" are in no file; pass them to genray.train(train=..., '
            "test=...), or name others (for a command, --data SOURCE:PATH)"
        )
    parts = {part: _pair(part, request.path[part]) for part in PARTS}
    if (shapes := [parts[part][0].shape[1] for part in PARTS])[0] != shapes[1]:
        raise DataError(f"test: expected images of {shapes[0]} channels as in train, got {shapes[1]}")
    return from_arrays(request, parts, None)


def _pair(part: str, given: Any) -> tuple[np.ndarray, np.ndarray]:
    """((N, C, H, W) uint8, (N,) int64), which share no memory with what was given."""
    if given is None:
        raise DataError(f"{part}: missing, expected (x, y) or a Dataset, as train and test go together")
    if not isinstance(given, tuple):
        given = _read_dataset(part, given)
    if len(given) != 2:
        raise DataError(f"{part}: expected (x, y), got {len(given)} values")
    images, labels = _images(part, _array(part, "images", given[0])), _array(part, "labels", given[1])
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(f"{part}: expected {len(images)} integer labels, got {labels.dtype} of shape {labels.shape}")
    return images, labels.astype(np.int64)


def _read_dataset(part, dataset):
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(f"{part}: expected (x, y) or a Dataset with a length, got {type(dataset).__name__}")
    images, labels = [], []
    for i in range(len(dataset)):
        try:
            image, label = dataset[i]
            images.append(_array(part, "images", image))
            labels.append(int(label))
        except DataError:
            raise
        except Exception as error:  # the user's own code, which may raise anything
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise DataError(f"{part}: expected (image, label) at {i} of the Dataset, got {reason}") from error
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{part}: expected images of one shape, got {images[0].shape} and, at {i}, {images[-1].shape}"
            )
    if not images:
        raise DataError(f"{part}: expected at least 1 example, came 0")
    return np.stack(images), np.array(labels)


def _array(part, what, value) -> np.ndarray:
    try:
        found = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{part}: expected {what} as an array or tensor, got {one_line(error)}") from None
    if found.dtype.kind not in "iufb":
        raise DataError(f"{part}: expected {what} as numbers, got {type(value).__name__} of {found.dtype}")
    return found


def _images(part, images) -> np.ndarray:
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim != 4 or not images.size:
        raise DataError(f"{part}: expected images (N, C, H, W), (N, H, W, C) or (N, H, W), got shape {images.shape}")
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype == np.uint8:
        return images.copy()
    if images.dtype.kind != "f":
        raise DataError(f"{part}: expected images as uint8, or as floats in [0, 1], got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN too
        raise DataError(
            f"{part}: expected floats in [0, 1] (normalisation belongs into the model), got {low:g} to {high:g}"
        )
    return (images * 255).round().clip(0, 255).astype(np.uint8)
