"""Workers that take tasks from one queue. A lost worker is replaced, and its task goes back to the queue."""

import os
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from genray.console import say
from genray.core.allocator import keep_freed_memory
from genray.errors import LostError, PlacementError
from genray.run.allocation import equal_workers
from genray.runtime.ray.actors import actor_device
from genray.runtime.ray.cluster import connected, node_resources
from genray.runtime.ray.fetch import fetch
from genray.runtime.ray.placement import ClusterWait

POLL_S = 1.0
MOVES_S = 0.01  # of CPU time: a waiting thread uses less
LOST = object()


class ModelWorker:
    """Holds a model, in an actor of its own; a subclass's `run` computes a task.

    Args:
        model: on the CPU; moved to the worker's device.
        device: as in a run's configuration.
    """

    def __init__(self, model, device: str):
        keep_freed_memory()
        self.device = actor_device(device)
        self.model, self.clock = model.to(self.device), None

    def ready(self):
        """Returns once the worker has started."""

    def work(self, *task):
        self.clock = time.pthread_getcpuclockid(threading.get_ident())
        return self.run(*task)

    @ray.method(concurrency_group="control")
    def seconds(self) -> float:
        """CPU seconds of the working thread so far; answers while a task runs."""
        return time.clock_gettime(self.clock) if self.clock else 0.0


WORKER_OPTIONS: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {"control": 1}}


@dataclass(frozen=True)
class PoolOptions:
    """Number of workers, their cluster, time limits and number of retries.

    Attributes:
        workers: number; 0 for one a GPU, or one a CPU without GPUs; one if the cluster has no nodes yet.
        address: of the Ray cluster to join; None starts a private Ray on this machine.
        device: "auto" takes the GPUs of the cluster, "cuda" asks for one a worker even if the cluster has none yet.
        startup_timeout_s: limit of the wait for a first worker.
        stall_timeout_s: limit of the time that a worker computes nothing or does not answer.
        max_failures: tolerated losses: of workers by one task, and of one worker in a row.
    """

    workers: int = 0
    address: str | None = None
    device: str = "auto"
    startup_timeout_s: float = 120.0
    stall_timeout_s: float = 1800.0
    max_failures: int = 5


@dataclass
class _Slot:
    """One of the pool's workers, with all its replacements.

    Attributes:
        reference: of the running call; None while the worker is idle.
        task: of the running call; None while the worker starts.
        asked, seconds, moved: pending request for its CPU seconds, the last answer, and the time when that grew.
        losses: in a row, with no task finished in between.
    """

    who: str
    actor: object = None
    reference: object = None
    task: object = None
    there: bool = False
    asked: object = None
    seconds: float = 0.0
    moved: float = field(default_factory=time.monotonic)
    losses: int = 0


class Pool:
    """A pool of equal workers on a Ray cluster.

    Args:
        what: their work, for messages: "evaluation".
        arguments: task -> arguments of a worker's `run`.
        name: task -> its name in messages.
        options: number of workers, cluster, time limits and retries.
    """

    def __init__(self, what, *, arguments, name, options: PoolOptions):
        self.what, self.arguments, self.name, self.limits = what, arguments, name, options
        self.queue, self.losses, self.crashes, self.any_started = deque(), Counter(), {}, False
        self.slots = []

    def results(self, worker, shared, settings, first, more=lambda: ()):
        """Yields (task, result) as workers finish tasks, in any order; workers and connection end with the generator.

        A lost worker's task goes back to the queue, and the worker is replaced if the cluster has room; the others
        continue. A task gives the same result wherever and however often it is run.

        Args:
            worker: subclass of `ModelWorker`, called with `shared`, `settings` and the device.
            shared: objects for the object store, one copy a node.
            settings: further arguments.
            first: tasks, at least one.
            more: () -> tasks that follow from the results yielded so far.

        Raises:
            PlacementError: no cluster answers, or no worker started in time.
            LearnerError: a task failed, or was lost more often than the limits allow; the message names it.
        """
        asked = self.limits
        with connected(asked.address, num_cpus=asked.workers or os.cpu_count() or 1) as may_grow:
            number, self.held = equal_workers(node_resources(), asked.workers, len(first), asked.device)
            remote, references = ray.remote(**WORKER_OPTIONS, **self.held)(worker), [ray.put(item) for item in shared]
            self.start = partial(remote.remote, *references, *settings, asked.device)
            self.wait = ClusterWait(asked.startup_timeout_s, say if may_grow else None)
            self.slots = [_Slot(f"{self.what} worker {i + 1} of {number}") for i in range(number)]
            self.last_there = self.looked = time.monotonic()
            self.queue.extend(first)
            try:
                yield from self._results(more)
            finally:
                for slot in self.slots:
                    self._end(slot)

    def _results(self, more):
        for slot in self.slots:
            self._fill(slot)
        while self.queue or any(slot.task is not None for slot in self.slots):
            if time.monotonic() - self.looked >= POLL_S:
                self._look()
            self._hand_out()
            for slot in self._ready():
                task, result = slot.task, self._result(slot)
                self._hand_out()  # before the caller handles the result, so that no worker waits for that
                if task is not None and result is not LOST:
                    yield task, result
                    self.queue.extend(more())
                    self._hand_out()

    def _ready(self) -> list:
        """Slots whose worker started, finished a task or died."""
        at = {slot.reference: slot for slot in self.slots if slot.reference is not None}
        done, _ = ray.wait(list(at), num_returns=1, timeout=POLL_S)
        return [at[reference] for reference in done]

    def _result(self, slot):
        """Result of a slot's call; LOST if its worker was lost."""
        task, reference = slot.task, slot.reference
        try:
            result = self._fetch(reference, slot)
        except LostError as error:
            self._lose(slot, error)
            return LOST
        slot.task = slot.reference = None
        slot.there = self.any_started = True
        slot.losses = 0 if task is not None else slot.losses
        return result

    def _fetch(self, reference, slot):
        limit = self.limits.stall_timeout_s
        return fetch(reference, self._doing(slot), timeout_s=limit, field="stall_timeout_s")

    def _doing(self, slot):
        return slot.who if slot.task is None else f"{slot.who}, {self.name(slot.task)}"

    def _hand_out(self):
        for slot in self.slots:
            if self.queue and slot.there and slot.reference is None:
                slot.task = self.queue.popleft()
                slot.reference = slot.actor.work.remote(*self.arguments(slot.task))
                slot.moved = time.monotonic()

    def _fill(self, slot):
        """Starts a worker without waiting for it."""
        slot.actor, slot.there, slot.asked, slot.seconds = self.start(), False, None, 0.0
        slot.reference = slot.actor.ready.remote()

    def _end(self, slot):
        if slot.actor is not None:
            with suppress(ValueError):  # never started
                ray.kill(slot.actor)
        slot.actor = slot.reference = None

    # --- losses ------------------------------------------------------------------------------------------------------

    def _lose(self, slot, error: LostError):
        """Puts the task at the end of the queue, so that a task that kills its workers delays the fewest others."""
        task, slot.losses, limit = slot.task, slot.losses + 1, self.limits.max_failures
        self._end(slot)
        slot.task, slot.there = None, False
        if task is not None:
            self.losses[task] += 1
            self.queue.append(task)
            if error.signal and self.crashes.setdefault(task, error) is not error:  # the computation is deterministic
                raise LostError(self.what, f"{self.name(task)} crashed its worker twice; the last was {error}")
            if self.losses[task] > limit:
                raise self._too_often(f"{self.name(task)} lost its worker {limit + 1} times", error)
        if slot.losses <= limit:
            self._fill(slot)
        elif all(other.actor is None for other in self.slots):
            raise self._too_often(f"every worker was lost {limit + 1} times in a row", error)
        again = "another one is started" if slot.actor is not None else "it is not started again"
        say(f"{error}; {again} (loss {slot.losses} of {limit} in a row)")

    def _too_often(self, what, error):
        return LostError(self.what, f"{what} (max_failures: {self.limits.max_failures}); the last was {error}")

    def _look(self):
        """Replaces workers that died idle or that stall; raises if none starts in time."""
        now = time.monotonic()
        unseen = max(0.0, now - self.looked - 2 * POLL_S)  # the caller of `results` was busy
        self.looked, self.last_there = now, self.last_there + unseen
        there = [slot for slot in self.slots if slot.there]
        for slot in there:
            slot.moved += unseen
            slot.asked = slot.asked or slot.actor.seconds.remote()
        asked = [slot.asked for slot in there]
        answered = set(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) if asked else ()
        for slot in there:
            try:
                if slot.asked in answered:
                    seconds = self._fetch(slot.asked, slot)
                    slot.asked = None
                    if seconds > slot.seconds + MOVES_S:
                        slot.seconds, slot.moved = seconds, now
                if slot.task is not None and now - slot.moved > self.limits.stall_timeout_s:
                    limit = self.limits.stall_timeout_s
                    raise LostError(self._doing(slot), f"has computed nothing within stall_timeout_s ({limit:g} s)")
            except LostError as error:
                self._lose(slot, error)
        if any(slot.there for slot in self.slots):
            self.last_there = now
        else:
            self._await_one(now - self.last_there)

    def _await_one(self, waited):
        """Raises once the wait for a worker is over.

        Raises:
            PlacementError, or LostError if there were workers before.
        """
        total, holds = ray.cluster_resources(), {"CPU": self.held["num_cpus"], "GPU": self.held["num_gpus"]}
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in holds.items() if amount)
        there = ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in holds)
        what = f"{wanted} wanted for each of {len(self.slots)} workers, {there} in the cluster"
        if self.wait.is_over(waited, any(total.get(kind, 0) < amount for kind, amount in holds.items()), what):
            within = f"within startup_timeout_s ({self.limits.startup_timeout_s:g} s): {what}"
            if self.any_started:
                raise LostError(self.what, f"no worker came back {within}")
            raise PlacementError(f"{self.what}: no worker started {within}")
