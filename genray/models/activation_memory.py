"""What a pass through a network keeps of its images for the backward pass."""

from collections.abc import Callable

import torch

TRIED = 2, 3  # images of the passes that are compared


def kept_bytes(run: Callable, shape, device="cpu") -> float:
    """Bytes an image that `run` keeps for its backward pass, counted on two passes.

    Args:
        run: images (N, C, H, W) -> any tensor, with gradients to something.
        shape: (C, H, W) of an image.
        device: of the images.
    """
    few, more = (_kept(run, torch.rand(number, *shape, device=device)) for number in TRIED)
    return (more - few) / (TRIED[1] - TRIED[0])  # without what does not grow with a batch, such as rounded weights


def _kept(run, x):
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other one gets its address

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x)
    return sum(storage.nbytes() for storage in kept.values())
