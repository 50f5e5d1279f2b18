"""`workers: auto` on a cluster: measures a step of each learner and allocates the free devices."""

import math

import ray

from genray.run.allocation import allocate, allocation_lines, gpus_each, placed, plan_lines
from genray.run.probe import probe_steps, with_random_images
from genray.run.setup import RunSetup
from genray.runtime.protocols import Progress
from genray.runtime.ray.actors import actor_device, pack, unpack
from genray.runtime.ray.cluster import node_resources
from genray.runtime.ray.fetch import fetch
from genray.runtime.ray.placement import accelerator_of


class DeviceAllocator:
    """How many workers each learner gets; one measurement serves all attempts of a run.

    Args:
        progress: shows the allocation.
    """

    def __init__(self, progress: Progress):
        self.progress = progress
        self.seconds: dict[str, float] = {}  # learner name -> seconds of a step
        self.said: dict[str, int] = {}

    def workers(self, setup: RunSetup, free: dict) -> dict:
        """Learner name -> number of workers.

        Args:
            setup: the prepared run.
            free: the cluster's free resources ("CPU", "GPU").
        """
        plan, learners = setup.plan, setup.config.base_learners
        auto = [name for name, learner in learners.items() if learner.workers == "auto"]
        found, lines = plan.workers, plan_lines(plan)
        if auto:
            held = {name: _held(learner, setup.config, free) for name, learner in learners.items()}
            largest = {kind: max(held[name][kind] for name in auto) for kind in ("CPU", "GPU")}
            devices = _devices(plan, held, largest, auto, free)
            if devices > len(auto):
                self.seconds = self.seconds or _measured(setup, largest)
                found |= allocate({name: self.seconds[name] for name in auto}, devices, most=plan.smallest_batch)
            lines = allocation_lines(self.seconds, found) if self.seconds else lines
        if found != self.said:
            self.said = found
            for line in lines:
                self.progress.say(line)
        return found


def _held(learner, config, free) -> dict:
    """Resources of one worker: `num_gpus: auto` is a whole GPU if the cluster has GPUs."""
    gpus = gpus_each([learner.resources.num_gpus], config.device, free.get("GPU", 0))[0]
    return {"CPU": learner.resources.num_cpus, "GPU": gpus, **accelerator_of(learner.resources)}


def _devices(plan, held, largest, auto, free) -> int:
    """Number of workers of all `auto` learners together, beside the workers of the other learners."""
    others = [held[name] for name, number in plan.workers.items() if name not in auto for _ in range(number)]
    most = math.ceil(free.get("CPU", 0) / largest["CPU"])  # an upper limit: every worker holds CPUs
    return min(placed(others + [largest] * most, nodes) for nodes in ([free], node_resources())) - len(others)


def _measured(setup, largest) -> dict:
    """Learner name -> seconds of a step, with the resources `largest`."""
    task = ray.remote(num_cpus=largest["CPU"], num_gpus=largest["GPU"], max_retries=0)(_probe)
    ref = task.remote(*pack(with_random_images(setup)))
    return fetch(ref, "the measurement for workers: auto", timeout_s=setup.config.runtime.stall_timeout_s)


def _probe(small, splits):
    setup = unpack(small, splits)
    return probe_steps(setup, actor_device(setup.config.device)).seconds
