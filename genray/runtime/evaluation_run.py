"""Evaluation on Ray: workers take blocks from one queue until there are none."""

import os
from collections import deque

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from genray.core.allocator import keep_freed_memory
from genray.core.flat import from_array
from genray.errors import GenrayError, PlacementError
from genray.evaluation.job import run_task
from genray.runtime.actors import actor_device
from genray.runtime.cluster import connected

START_TIMEOUT_S = 120


class EvaluationWorker:
    """Holds the model and the data; runs one task at a time."""

    def __init__(self, model, images, labels, num_classes, threads):
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.device = actor_device("auto")
        self.model = model.to(self.device)
        self.data, self.num_classes = (from_array(images), from_array(labels)), num_classes

    def ready(self):
        """Answers once the worker is there."""

    def run(self, task, request):
        return run_task(task, request, self.model, *self.data, self.num_classes, self.device)


def run_on_workers(first, todo, model, images, labels, num_classes, *, workers, address=None):
    """Yields (task, result) as workers finish them, in any order; Ray is left when the generator is closed.

    Args:
        first: the tasks that were taken of `todo`, at least one.
        todo: a `Todo`, which gives more as results are put there.
        num_classes: as in `run_task`.
        model: on the CPU; copied to every worker.
        images, labels: tensors; shared by the workers of a node.
        workers: how many; 0 for one a GPU, or one a CPU where there is no GPU.
        address: as in `genray.train`.

    Raises:
        PlacementError: no cluster answers, or it has room for no worker.
        GenrayError: a worker died or failed; the message says which and on what.
    """
    with connected(address, num_cpus=workers or os.cpu_count() or 1):
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), max(1, int(there.get("CPU", 1)))
        workers = min(workers or gpus or cpus, len(first))
        share = {"num_cpus": _share(workers, cpus), "num_gpus": _share(workers, gpus) if gpus else 0}
        remote = ray.remote(max_restarts=0, max_task_retries=0, **share)(EvaluationWorker)
        shared = [ray.put(item) for item in (model, images.numpy(), labels.numpy())]
        yield from _feed([remote.remote(*shared, num_classes, 1) for _ in range(workers)], deque(first), todo)


def _share(workers, devices):
    """Of a device for each worker, such that whole workers fit on every device (2 GPUs, 3 workers: a half each)."""
    return 1.0 if workers <= devices else int(10_000 / -(-workers // devices)) / 10_000


def _feed(actors, queue, todo):
    """Gives each worker a task as soon as it is there or done with the last; those that never start get none."""
    running = {actor.ready.remote(): (number, None) for number, actor in enumerate(actors)}
    idle, seen = deque(), False

    def hand_out():
        while queue and idle:
            number, task = idle.popleft(), queue.popleft()
            running[actors[number].run.remote(task, todo.request)] = (number, task)

    while queue or any(task for _, task in running.values()):
        done, _ = ray.wait(list(running), timeout=None if seen else START_TIMEOUT_S)
        if not done:
            raise PlacementError(f"evaluation: none of {len(actors)} workers started within {START_TIMEOUT_S} seconds")
        seen = True
        for reference in done:
            number, task = running.pop(reference)
            result = _result(reference, task, f"evaluation worker {number + 1} of {len(actors)}")
            idle.append(number)
            hand_out()  # before the result is looked at, so that nobody waits for that
            if task is not None:
                yield task, result
                queue.extend(todo.take())
                hand_out()


def _result(reference, task, who):
    what = f"while it ran {task.attack} ({task.norm}) on block {task.block}" if task else "while it started"
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, GenrayError):
            raise error.cause from None
        reason = f"{type(error.cause).__name__}: {_line(error.cause)}"
        raise GenrayError(f"{who} failed {what}: {reason}; --resume keeps what is finished") from None
    except RayActorError as error:
        raise GenrayError(f"{who} died {what}: {_line(error)}; --resume keeps what is finished") from None
    except RayError as error:
        raise GenrayError(f"{who} failed {what}: {_line(error)}; --resume keeps what is finished") from None


def _line(error):
    return " ".join(str(error).split())[:200]
