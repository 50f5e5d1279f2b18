"""Device allocation: fractions of GPUs, free resources of nodes, and the number of workers of each learner.

Ray takes a fraction of a GPU from one device, and a bundle from one node. Two thirds of a GPU three times are 2 GPUs in
sum, and do not fit on two. So `placed` alone decides whether bundles fit, a device and a node at a time.
"""

import math

from genray.run.cost import Passes, attack_passes, step_passes
from genray.run.plan import RunPlan

UNIT = 10_000  # Ray counts resources in this many parts
SMALL = 1e-9  # relative difference of costs that are equal except for rounding


class Room:
    """Free resources of one node.

    Args:
        resources: "CPU", "GPU", ... -> amount.
    """

    def __init__(self, resources: dict):
        self.free = dict(resources)
        whole, rest = divmod(self.free.pop("GPU", 0) * UNIT + 0.5, UNIT)
        self.gpus = [UNIT] * int(whole) + [int(rest)] * bool(int(rest))

    def take(self, bundle: dict) -> bool:
        """Takes a bundle's resources if they are free, and returns whether they were."""
        gpus, others = bundle.get("GPU", 0), {kind: amount for kind, amount in bundle.items() if kind != "GPU"}
        if any(self.free.get(kind, 0) < amount - 1e-9 for kind, amount in others.items()):
            return False
        parts = [UNIT] * int(gpus) if gpus >= 1 else [round(gpus * UNIT)] * bool(gpus)
        left = list(self.gpus)
        for part in parts:
            fitting = [i for i, free in enumerate(left) if free >= part]
            if not fitting:
                return False
            left[min(fitting, key=left.__getitem__)] -= part  # as Ray: the fullest device that suffices
        self.gpus = left
        for kind, amount in others.items():
            self.free[kind] = self.free.get(kind, 0) - amount
        return True


def placed(bundles: list[dict], nodes: list[dict]) -> int:
    """Number of bundles, from the first on, that fit at the same time, each on the first node with room for it.

    Args:
        bundles: resources of each.
        nodes: resources of each node.
    """
    rooms = [Room(node) for node in nodes]
    for number, bundle in enumerate(bundles):
        if not any(room.take(bundle) for room in rooms):
            return number
    return len(bundles)


def fit(bundles: list[dict], nodes: list[dict]) -> bool:
    """Whether all bundles fit at the same time; arguments as in `placed`."""
    return placed(bundles, nodes) == len(bundles)


def labelled(bundles: list[dict], selectors: list[dict], nodes: list[dict], labels: list[dict]) -> tuple[list, list]:
    """Bundles and nodes with each label selector as one more resource, which the nodes that match it have.

    Args:
        bundles: resources of each.
        selectors: label selector of each bundle.
        nodes: resources of each node.
        labels: of each node.
    """
    kinds = {f"labels {selector}": selector for selector in selectors if selector}
    wanted = [bundle | ({f"labels {chosen}": 1} if chosen else {}) for bundle, chosen in zip(bundles, selectors)]
    there = [
        node | {kind: math.inf for kind, selector in kinds.items() if matches(selector, of_node)}
        for node, of_node in zip(nodes, labels)
    ]
    return wanted, there


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a node's labels are what a selector asks for, by Ray's rules: value, !value, in(a, b), !in(a, b)."""
    for key, condition in selector.items():
        text = condition.removeprefix("!")
        values = [value.strip() for value in text[3:-1].split(",")] if text.startswith("in(") else [text]
        if (labels.get(key) in values) == condition.startswith("!"):
            return False
    return True


def total(bundles) -> dict:
    """Sum of the bundles' resources."""
    bundles = list(bundles)
    return {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in {k for bundle in bundles for k in bundle}}


def largest_fraction(fits) -> float:
    """The largest of 1, 1/2, 1/3, ... 1/100 for which `fits(fraction)` is true; 1 if none."""
    each = ((UNIT // n) / UNIT for n in range(1, 101))
    return next((fraction for fraction in each if fits(fraction)), 1.0)


def gpus_each(wanted: list, device: str, there: float) -> list[float]:
    """GPUs of each of several actors.

    Args:
        wanted: of each actor: a number, or "auto" for a whole GPU, or with too few GPUs the largest equal fraction
            with which all actors fit.
        device: "cpu" makes "auto" 0; "cuda" asks for a whole GPU even if the cluster has none yet.
        there: GPUs of the cluster, or the free ones.
    """

    def held(auto):
        return [auto if amount == "auto" else float(amount) for amount in wanted]

    if device == "cpu" or (there < 1 and device != "cuda"):
        return held(0.0)
    return held(largest_fraction(lambda fraction: fit([{"GPU": gpus} for gpus in held(fraction)], [{"GPU": there}])))


def equal_workers(nodes: list[dict], wanted: int, most: int, device: str) -> tuple[int, dict]:
    """Number of equal workers, and the resources of each, such that all fit.

    Args:
        nodes: resources of each node.
        wanted: their number; 0 for one a GPU, or one a CPU without GPUs; one if the cluster has no nodes yet.
        most: number of tasks.
        device: as in `gpus_each`.

    Returns:
        (number, {"num_cpus", "num_gpus"}); a whole one of resources that the cluster does not have yet.
    """
    cpus, gpus = (int(total(nodes).get(kind, 0)) for kind in ("CPU", "GPU"))
    gpus = 0 if device == "cpu" else gpus
    number = min(wanted or gpus or (1 if device == "cuda" else cpus) or 1, most)
    gpu = gpus_each(["auto"] * number, device, gpus)[0]
    cpu = largest_fraction(lambda fraction: fit([{"CPU": fraction, "GPU": gpu}] * number, nodes))
    return number, {"num_cpus": cpu, "num_gpus": gpu}


# --- workers of each learner ------------------------------------------------------------------------------------------


def allocate(costs: dict, devices: int, *, most: int | None = None) -> dict:
    """Devices of each learner, at least one each, such that the slowest learner is as fast as possible.

    n devices make a learner's step n times as fast. Of all fastest allocations, the one with the fewest
    devices is returned.

    Args:
        costs: learner name -> time of a step on one device.
        devices: their number; with fewer than learners, each learner gets one and they share.
        most: devices that one learner can use.

    Returns:
        Learner name -> number of devices.
    """
    most, given = most or devices, dict.fromkeys(costs, 1)
    for _ in range(devices - len(costs)):
        slowest = max(costs, key=lambda name: costs[name] / given[name])
        if given[slowest] >= most:
            break
        given[slowest] += 1
    slowest = max((costs[name] / n for name, n in given.items()), default=0.0)
    if not slowest:
        return dict.fromkeys(costs, 1)
    return {name: min(n, max(1, math.ceil(costs[name] / slowest * (1 - SMALL)))) for name, n in given.items()}


def allocation_lines(costs: dict, devices: dict, unit: str = "s") -> list[str]:
    """An allocation as text, a line a learner, with the fraction of the time that its devices are idle.

    Args:
        costs: as in `allocate`.
        devices: learner name -> number.
    """
    times = {name: costs[name] / n for name, n in devices.items()}
    slowest = max(times.values()) or 1.0
    idle = {name: 100 - 100 * time / slowest for name, time in times.items()}
    return [
        f"{name}: {n} worker{'s' * (n > 1)}, a step {times[name]:.3g} {unit}, idle {idle[name]:.0f} %"
        for name, n in devices.items()
    ]


def plan_lines(plan: RunPlan) -> list[str]:
    """Division of a step among the workers, by the cost model; empty if each learner has one worker of its own."""
    learners, unit = plan.config.base_learners, "passes an image, estimated"
    costs = {name: step_passes(learner).units for name, learner in learners.items()}
    if plan.config.runtime.share_attack:
        actors = sum(plan.workers.values())
        attacks = sum((attack_passes(learner) for learner in learners.values()), Passes()).units
        alone = (costs[name] - attack_passes(learner).units for name, learner in learners.items())
        together = attacks / actors + max(cost / n for cost, n in zip(alone, plan.workers.values()))
        return [
            f"attacks shared by {actors} actors: a step {together:.3g} {unit}, {sum(costs.values()) / together:.2f} "
            "times faster than one device"
        ]
    auto = {name: costs[name] for name, learner in learners.items() if learner.workers == "auto"}
    if auto:
        lines = ["workers: auto is measured at the start; by estimate, with 2, 4 or 8 devices for them:"]
        return lines + ["; ".join(allocation_lines(auto, allocate(auto, n), "passes")) for n in (2, 4, 8)]
    return allocation_lines(costs, plan.workers, unit) if set(plan.workers.values()) != {1} else []
