"""Pseudo-labels on a cluster: workers take blocks of images from one queue."""

import os
from collections.abc import Iterator

import ray
import torch

from genray.core.flat import from_array
from genray.evaluation import chunks
from genray.evaluation.robust import predicted
from genray.run.allocation import equal_workers
from genray.runtime.ray.cluster import connected, node_resources
from genray.runtime.ray.worker_pool import WORKER_OPTIONS, Limits, ModelWorker, Pool

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


def predicted_on_workers(
    model, images, batch_size, *, workers: int, address: str | None, device: str, limits: Limits
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index of the first image, labels) of blocks as workers finish them, in any order.

    Args:
        model, images, batch_size: as in `predicted`, the model on the CPU.
        workers, address, device, limits: as in `run_on_workers`.

    Raises:
        PlacementError: no cluster answers, or it has room for no worker.
        LearnerError: a block failed, or lost its workers more often than `limits` allow.
    """
    blocks = chunks(len(images), BATCHES_A_BLOCK * batch_size)
    with connected(address, num_cpus=workers or os.cpu_count() or 1) as may_grow:
        number, held = equal_workers(node_resources(), workers, len(blocks), device)
        remote = ray.remote(**WORKER_OPTIONS, **held)(LabellingWorker)
        shared = ray.put(model), ray.put(images.numpy())
        pool = Pool(
            "labelling",
            number,
            held,
            start=lambda: remote.remote(*shared, batch_size, device),
            arguments=lambda block: block,
            name=lambda block: f"images {block[0]} to {block[1]}",
            limits=limits,
            may_grow=may_grow,
        )
        for (start, _), labels in pool.results(blocks):
            yield start, from_array(labels)
