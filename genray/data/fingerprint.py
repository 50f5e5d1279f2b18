"""Which images a data set has: what tells two of them apart, whatever their folders are called."""

import hashlib

import torch

_AT_ONCE = 4096  # images
_DIGITS = 16


def digests(images: torch.Tensor) -> list[bytes]:
    """SHA-256 of each image's pixels.

    Args:
        images: (N, C, H, W), uint8, or floats in [0, 1]; floats that are k / 255 have the digests of the uint8 images.
    """
    found = []
    for start in range(0, len(images), _AT_ONCE):
        some = images[start : start + _AT_ONCE].detach().cpu()
        if some.is_floating_point():
            whole = some.mul(255).round().clamp(0, 255).to(torch.uint8)
            some = whole if torch.equal(whole.to(some.dtype).div(255), some) else some
        rows = some.contiguous().flatten(1).view(torch.uint8).numpy()
        found += [hashlib.sha256(row).digest() for row in rows]
    return found


def fingerprint(images: torch.Tensor, labels: torch.Tensor, *, ordered=False) -> str:
    """16 hexadecimal digits that stand for images of one shape with their labels.

    Args:
        images: as of `digests`.
        labels: (N,) integers.
        ordered: whether the same images in another order are others.
    """
    return _mark(tuple(images.shape[1:]), labels, digests(images), ordered)


def _mark(shape, labels, found, ordered):
    whole = hashlib.sha256(repr((len(labels), shape)).encode())
    numbers = (int(label).to_bytes(8, "big", signed=True) for label in labels.cpu().numpy())
    entries = (image + number for image, number in zip(found, numbers, strict=True))
    for entry in entries if ordered else sorted(entries):
        whole.update(entry)
    return whole.hexdigest()[:_DIGITS]


def identify(splits: dict) -> tuple[dict, list[str]]:
    """What the images of a run are.

    Args:
        splits: "train", "validation" and "test" -> `Split`, decoded.

    Returns:
        {split: {"examples", "fingerprint"}}, and what there is to say about it: test images that are among the training
        images.
    """
    test, record = list(splits["test"].home.digests()), {}
    among, again = set(test), set()

    def seen(found):
        for digest in found:
            if digest in among:
                again.add(digest)
            yield digest

    for name, split in splits.items():
        found = test if name == "test" else seen(split.home.digests())
        mark = _mark(split.shape, split.labels, found, name != "test")
        record[name] = {"examples": len(split), "fingerprint": mark}
    repeated = sum(digest in again for digest in test)
    return record, [f"{repeated} of {len(test)} test images are training images too"] if repeated else []
