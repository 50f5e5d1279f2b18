"""Which images a data set has: what tells two of them apart, whatever their folders are called."""

import hashlib

import torch

from genray.data.splits import Split

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


def fingerprint(images: torch.Tensor, labels: torch.Tensor, found: list[bytes] | None = None, *, ordered=False) -> str:
    """16 hexadecimal digits that stand for images of one shape with their labels.

    Args:
        images: as of `digests`.
        labels: (N,) integers.
        found: the digests, where they are known.
        ordered: whether the same images in another order are others.
    """
    pairs = zip(digests(images) if found is None else found, labels.tolist(), strict=True)
    entries = [image + label.to_bytes(8, "big", signed=True) for image, label in pairs]
    whole = hashlib.sha256(repr((len(entries), tuple(images.shape[1:]))).encode())
    whole.update(b"".join(entries if ordered else sorted(entries)))
    return whole.hexdigest()[:_DIGITS]


def identify(splits: dict[str, Split]) -> tuple[dict, list[str]]:
    """What the images of a run are.

    Args:
        splits: "train", "validation" and "test", decoded.

    Returns:
        {split: {"examples", "fingerprint"}}, and what there is to say about it: test images that are among the training
        images.
    """
    found = {name: digests(split.images) for name, split in splits.items()}
    record = {}
    for name, split in splits.items():
        mark = fingerprint(split.images, split.labels, found[name], ordered=name != "test")
        record[name] = {"examples": len(split), "fingerprint": mark}
    seen = {*found["train"], *found["validation"]}
    repeated = sum(digest in seen for digest in found["test"])
    return record, [f"{repeated} of {len(found['test'])} test images are training images too"] if repeated else []
