"""Evaluation on Ray: workers take blocks from one queue until there are none."""

import os
from contextlib import ExitStack

import ray
import torch

from genray.core.flat import from_array
from genray.core.user_code import give
from genray.errors import LearnerError, one_line
from genray.evaluation.engines import copies_kept
from genray.evaluation.job import run_task
from genray.run.allocation import equal_workers
from genray.runtime.ray.cluster import connected, node_resources
from genray.runtime.ray.worker_pool import WORKER_OPTIONS, Limits, ModelWorker, Pool


class EvaluationWorker(ModelWorker):
    """Holds the model and the data; runs one task at a time."""

    def __init__(self, model, images, labels, num_classes, threads, device, own):
        for name, attack in own.items():
            give(attack, name)
        ModelWorker.__init__(self, model, device)
        torch.set_num_threads(threads)
        self.data, self.num_classes = (from_array(images), from_array(labels)), num_classes
        self.kept = ExitStack()  # for the lifetime of the actor
        self.kept.enter_context(copies_kept(self.model))

    def run(self, task, request):
        return run_task(task, request, self.model, *self.data, self.num_classes, self.device)


def run_on_workers(
    first, queue, model, images, labels, num_classes, *, workers, address=None, device="auto", limits=None
):
    """Yields (task, result) as workers finish them, in any order; the connection to Ray ends with the generator.

    A worker that dies or hangs puts its task back and is replaced if the cluster has room; the others continue. A task
    gives the same result wherever and however often it is run.

    Args:
        first: tasks taken from the queue, at least one.
        queue: a `TaskQueue`, which gives more as results are finished.
        num_classes: as in `run_task`.
        model: on the CPU; copied to every worker.
        images, labels: tensors; shared by the workers of a node.
        workers: number; 0 for one a GPU, or one a CPU without GPUs; one if the cluster has no nodes yet.
        address: as in `genray.train`.
        device: "auto" takes the GPUs of the cluster, "cuda" asks for one a worker even if the cluster has none yet.
        limits: time limits and number of retries; None for the defaults of `Limits`.

    Raises:
        PlacementError: no cluster answers, or it has room for no worker.
        GenrayError: a task failed, or lost its workers more often than `limits` allow; the message says which.
    """
    with connected(address, num_cpus=workers or os.cpu_count() or 1) as may_grow:
        number, held = equal_workers(node_resources(), workers, len(first), device)
        remote = ray.remote(**WORKER_OPTIONS, **held)(EvaluationWorker)
        shared = [ray.put(item) for item in (model, images.numpy(), labels.numpy())]
        pool = Pool(
            "evaluation",
            number,
            held,
            start=lambda: remote.remote(*shared, num_classes, 1, device, queue.request.own()),
            arguments=lambda task: (task, queue.request),
            name=lambda task: f"{task.attack} ({task.norm}) on block {task.block}",
            limits=limits or Limits(),
            may_grow=may_grow,
        )
        try:
            yield from pool.results(first, queue.take)
        except LearnerError as error:
            raise LearnerError(f"{one_line(error, 1000)}; --resume keeps what is finished") from None
