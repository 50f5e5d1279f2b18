"""`workers: auto` on a cluster: measures a step of each learner on one of its devices and divides what is free."""

import math

import ray

from genray.run.allocation import divide, division_lines, fixed_workers, plan_lines
from genray.run.devices import learner_threads
from genray.run.probe import step_seconds
from genray.runtime.ray.actors import actor_device, pack, unpack
from genray.runtime.ray.cluster import node_resources
from genray.runtime.ray.fetch import fetch
from genray.runtime.ray.gpu_shares import gpus_each, placed


class DeviceAllocator:
    """How many workers each learner gets; what was measured is kept, so that a recovery divides as before.

    Args:
        progress: a `Progress`, which is told the division.
    """

    def __init__(self, progress):
        self.progress, self.seconds, self.said = progress, None, None

    def workers(self, setup, free: dict) -> dict:
        """Learner name -> how many.

        Args:
            setup: the prepared run.
            free: the cluster's free resources ("CPU", "GPU").
        """
        found = fixed_workers(setup.config)
        auto = [name for name, learner in setup.config.base_learners.items() if learner.workers == "auto"]
        slots = _slots(setup.config, auto, free) if auto else 0
        if slots > len(auto):
            if self.seconds is None:
                self.seconds = _measure(setup, auto, free)
            costs = {name: self.seconds[name] for name in auto}
            found |= divide(costs, slots, most=setup.plan.smallest_batch)
        self._say(setup.config, found)
        return found

    def _say(self, config, found):
        if found == self.said:
            return
        self.said = found
        lines = plan_lines(config) if self.seconds is None else division_lines(self.seconds, found)
        for line in lines:
            self.progress.say(line)


def _slots(config, auto, free) -> int:
    """How many workers the learners `auto` may have together, beside those of the others, on nodes and devices of
    whole workers."""
    fixed, gpus = fixed_workers(config), _gpus_each(config, free)
    held = {name: {"CPU": lr.resources.num_cpus, "GPU": gpus[name]} for name, lr in config.base_learners.items()}
    others = [held[name] for name, number in fixed.items() if name not in auto for _ in range(number)]
    largest = {kind: max(held[name][kind] for name in auto) for kind in ("CPU", "GPU")}
    most = math.ceil(free.get("CPU", 0) / largest["CPU"])  # every worker holds some
    return min(placed(others + [largest] * most, nodes) for nodes in ([free], node_resources())) - len(others)


def _gpus_each(config, free) -> dict:
    """Learner name -> GPUs of one worker, a whole one each where that is auto and there are any."""
    wanted = {name: learner.resources.num_gpus for name, learner in config.base_learners.items()}
    return {name: gpus_each([much], config.device, free.get("GPU", 0))[0] for name, much in wanted.items()}


def _measure(setup, auto, free) -> dict:
    """Learner name -> seconds of a step, on a device such as those to be divided."""
    config = setup.config
    learners = [config.base_learners[name] for name in auto]
    resources = {
        "num_cpus": max(learner.resources.num_cpus for learner in learners),
        "num_gpus": max(_gpus_each(config, free)[name] for name in auto),
    }
    threads = {name: learner_threads(config, setup.architecture, name) for name in config.base_learners}
    task = ray.remote(max_retries=0, **resources)(_probe)
    small, arrays = pack(setup)
    ref = task.remote(ray.put(small), ray.put(arrays), threads)
    return fetch(ref, "the measurement for workers: auto", timeout_s=config.runtime.stall_timeout_s)


def _probe(small, arrays, threads):
    setup = unpack(small, arrays)
    return step_seconds(setup, actor_device(setup.config.device), threads)
