"""Evaluation on Ray: workers take blocks from one queue until there are none."""

import os
import sys
from collections import deque

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from genray.core.allocator import keep_freed_memory
from genray.core.flat import from_array
from genray.errors import GenrayError, PlacementError
from genray.evaluation.job import run_task
from genray.runtime.actors import actor_device
from genray.runtime.cluster import connected, node_resources
from genray.runtime.shares import equal_workers

GRACE_S = 5.0  # workers that take longer to start wait for the cluster


class EvaluationWorker:
    """Holds the model and the data; runs one task at a time."""

    def __init__(self, model, images, labels, num_classes, threads, device):
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.device = actor_device(device)
        self.model = model.to(self.device)
        self.data, self.num_classes = (from_array(images), from_array(labels)), num_classes

    def ready(self):
        """Answers once the worker is there."""

    def run(self, task, request):
        return run_task(task, request, self.model, *self.data, self.num_classes, self.device)


def run_on_workers(
    first, todo, model, images, labels, num_classes, *, workers, address=None, device="auto", startup_timeout_s=120.0
):
    """Yields (task, result) as workers finish them, in any order; Ray is left when the generator is closed.

    Args:
        first: the tasks that were taken of `todo`, at least one.
        todo: a `Todo`, which gives more as results are put there.
        num_classes: as in `run_task`.
        model: on the CPU; copied to every worker.
        images, labels: tensors; shared by the workers of a node.
        workers: how many; 0 for one a GPU, or one a CPU where there is no GPU; one where there is neither yet.
        address: as in `genray.train`.
        device: "auto" takes the GPUs that are there, "cuda" asks for one a worker although none may be there yet.
        startup_timeout_s: how long the cluster may take to start a worker.

    Raises:
        PlacementError: no cluster answers, or it has room for no worker.
        GenrayError: a worker died or failed; the message says which and on what.
    """
    with connected(address, num_cpus=workers or os.cpu_count() or 1) as may_grow:
        number, share = equal_workers(node_resources(), workers, len(first), device)
        remote = ray.remote(max_restarts=0, max_task_retries=0, **share)(EvaluationWorker)
        shared = [ray.put(item) for item in (model, images.numpy(), labels.numpy())]
        actors = [remote.remote(*shared, num_classes, 1, device) for _ in range(number)]
        _await_first(actors, share, startup_timeout_s, may_grow)
        yield from _feed(actors, deque(first), todo)


def _await_first(actors, share, timeout_s, may_grow):
    """Waits for a worker, as long as a cluster that may grow takes; a Ray of our own has what it wants or never will.

    Raises:
        PlacementError: none started in time.
    """
    starting = [actor.ready.remote() for actor in actors]
    if ray.wait(starting, timeout=min(GRACE_S, timeout_s))[0]:
        return
    total = ray.cluster_resources()
    wanted = [
        f"{amount:g} {kind}" for kind, amount in (("CPU", share["num_cpus"]), ("GPU", share["num_gpus"])) if amount
    ]
    there = ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    what = f"{' and '.join(wanted)} wanted for each of {len(actors)} workers, {there} in the cluster"
    lacks = total.get("CPU", 0) < share["num_cpus"] or total.get("GPU", 0) < share["num_gpus"]
    if lacks and may_grow:
        print(f"waiting up to {timeout_s:g} s for the cluster: {what}", file=sys.stderr, flush=True)
    if (lacks and not may_grow) or not ray.wait(starting, timeout=max(0.0, timeout_s - GRACE_S))[0]:
        raise PlacementError(f"evaluation: no worker started within {timeout_s:g} s: {what}")


def _feed(actors, queue, todo):
    """Gives each worker a task as soon as it is there or done with the last; those that never start get none."""
    running = {actor.ready.remote(): (number, None) for number, actor in enumerate(actors)}
    idle = deque()

    def hand_out():
        while queue and idle:
            number, task = idle.popleft(), queue.popleft()
            running[actors[number].run.remote(task, todo.request)] = (number, task)

    while queue or any(task for _, task in running.values()):
        done, _ = ray.wait(list(running))
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
