"""Pseudo-labels on a cluster: workers take blocks of images from one queue."""

from collections.abc import Iterator

import torch

from genray.core.flat import from_array
from genray.evaluation import chunks
from genray.evaluation.robust import predicted
from genray.runtime.ray.worker_pool import ModelWorker, Pool, PoolOptions

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
        PlacementError, LearnerError: as of `Pool.results`.
    """
    blocks = chunks(len(images), BATCHES_A_BLOCK * batch_size)
    workers = Pool("labelling", arguments=lambda block: block, name="images {0[0]} to {0[1]}".format, options=pool)
    for (start, _), labels in workers.results(LabellingWorker, (model, images.numpy()), (batch_size,), blocks):
        yield start, from_array(labels)
