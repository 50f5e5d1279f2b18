"""Pseudo-labels on a cluster: workers take blocks of images from one queue."""

from collections.abc import Iterator

import torch

from genray.core.flat import from_array
from genray.evaluation import chunks
from genray.evaluation.robust import predicted
from genray.runtime.ray.worker_pool import ModelWorker, PoolOptions, run_on_pool

BATCHES_A_BLOCK = 16


class LabellingWorker(ModelWorker):
    """Holds the model and the images; labels one block at a time."""

    def __init__(self, model, images, batch_size, device):
        ModelWorker.__init__(self, model, device)
        torch.set_num_threads(1)
        self.images, self.batch_size = from_array(images), batch_size

    def run(self, start, stop):
        found = predicted(self.model, self.images[start:stop], self.batch_size, self.device)
        return torch.cat([labels for _, labels in found]).numpy()


def predicted_on_workers(model, images, batch_size, *, pool: PoolOptions) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index of the first image, labels) of blocks as workers finish them, in any order.

    Args:
        model, images, batch_size: as in `predicted`, the model on the CPU.
        pool: the workers.

    Raises:
        PlacementError, LearnerError: as of `run_on_pool`.
    """
    found = run_on_pool(
        "labelling",
        LabellingWorker,
        (model, images.numpy()),
        (batch_size,),
        first=chunks(len(images), BATCHES_A_BLOCK * batch_size),
        arguments=lambda block: block,
        name=lambda block: f"images {block[0]} to {block[1]}",
        options=pool,
    )
    for (start, _), labels in found:
        yield start, from_array(labels)
