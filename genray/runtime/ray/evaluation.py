"""Evaluation on Ray: workers take blocks from one queue until there are none."""

from contextlib import ExitStack

import torch

from genray.core.flat import from_array
from genray.core.user_code import give
from genray.errors import LearnerError, one_line
from genray.evaluation.engines import copies_kept
from genray.evaluation.job import run_task
from genray.runtime.ray.worker_pool import ModelWorker, Pool, PoolOptions


class EvaluationWorker(ModelWorker):
    """Holds the model and the data; runs one task at a time."""

    def __init__(self, model, images, labels, num_classes, own, device):
        for name, attack in own.items():
            give(attack, name)
        ModelWorker.__init__(self, model, device)
        torch.set_num_threads(1)
        self.data, self.num_classes = (from_array(images), from_array(labels)), num_classes
        self.kept = ExitStack()  # for the lifetime of the actor
        self.kept.enter_context(copies_kept(self.model))

    def run(self, task, request):
        return run_task(task, request, self.model, *self.data, self.num_classes, self.device)


def run_on_workers(first, queue, model, images, labels, num_classes, *, pool: PoolOptions):
    """Yields (task, result) as workers finish them, as `Pool.results`.

    Args:
        first: tasks taken from the queue, at least one.
        queue: a `TaskQueue`, which gives more as results are finished.
        model: on the CPU; copied to every worker.
        images, labels: tensors; shared by the workers of a node.
        num_classes: as in `run_task`.
        pool: the workers.

    Raises:
        PlacementError, LearnerError: as of `Pool.results`.
    """
    workers = Pool(
        "evaluation",
        arguments=lambda task: (task, queue.request),
        name=lambda task: f"{task.attack} ({task.ball}) on block {task.block}",
        options=pool,
    )
    shared, settings = (model, images.numpy(), labels.numpy()), (num_classes, queue.request.own())
    try:
        yield from workers.results(EvaluationWorker, shared, settings, first, queue.take)
    except LearnerError as error:
        raise LearnerError(f"{one_line(error, 1000)}; --resume keeps what is finished") from None
