"""Placement of the actors: a bundle for each learner's worker and for the global learner, a share for the evaluator."""

import time
from dataclasses import dataclass, replace

import ray
from ray.util import get_current_placement_group
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from genray.config.schema import ResourcesConfig
from genray.errors import PlacementError
from genray.run.allocation import fit, gpus_each, labelled, matches
from genray.run.plan import RunPlan
from genray.runtime.ray.cluster import node_labels, node_resources

# The global learner only sums arrays: it reserves memory and no CPU, so that two learners use all of two cores.
COPIES_IN_GLOBAL_LEARNER = 4
DRIVER_BUNDLE = {"memory": float(64 << 20)}
GRACE_S = 5.0  # Ray counts freed resources with this delay
RELEASE_TIMEOUT_S = 10.0
ACCELERATOR = "accelerator_type:"  # before the name of a node's kind of GPU, of which it has one as a resource,
OF_ACCELERATOR = 0.001  # and each bundle takes a little
EVALUATOR_GPU = 0.1  # share of a learner's GPU that the evaluator takes if no GPU is free


@dataclass(frozen=True)
class ActorPlacement:
    """A bundle of the placement group, and the resources that one actor takes of it."""

    bundle: int
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Placement:
    """Attributes:
    bundles: resources of each bundle: of the base learners' workers in order, the global learner, and the
        evaluator if it has its own.
    selectors: label selector of each bundle, by which Ray chooses its node.
    learners: name -> an `ActorPlacement` for each of its workers.
    global_learner, evaluator: their `ActorPlacement`.
    strategy: Ray's placement strategy.
    group: the existing placement group of a Tune trial that has the bundles, or None.
    """

    bundles: list[dict]
    selectors: list[dict]
    learners: dict[str, tuple[ActorPlacement, ...]]
    global_learner: ActorPlacement
    evaluator: ActorPlacement
    strategy: str
    group: object = None

    @property
    def held(self) -> dict[str, float]:
        """CPUs and GPUs of all bundles."""
        return {kind: sum(bundle.get(kind, 0) for bundle in self.bundles) for kind in ("CPU", "GPU")}


def make_placement(
    plan: RunPlan, weight_bytes: int, available: dict, workers: dict | None = None, group=None
) -> Placement:
    """Bundles for a run.

    Args:
        plan: the run's plan.
        weight_bytes: size of one learner's flat weights.
        available: the cluster's resources ("CPU", "GPU").
        workers: learner name -> number; None: as configured, one for `auto`.
        group: of the Tune trial that trains this run, whose bundles after the first are the run's.
    """
    workers, base_learners = workers or plan.workers, plan.config.base_learners
    wanted = [base_learners[name].resources.num_gpus for name, n in workers.items() for _ in range(n)]
    if group is None:
        first, gpus = 0, gpus_each(wanted, plan.config.device, available.get("GPU", 0))
    else:
        first = 1
        held = [bundle.get("GPU", 0.0) for bundle in group.bundle_specs[1:]]
        gpus = [there if much == "auto" else float(much) for much, there in zip(wanted, held)]
    learners, bundles, selectors = {}, [], []
    for name, number in workers.items():
        resources, before = base_learners[name].resources, len(bundles)
        cpus = resources.num_cpus
        learners[name] = tuple(ActorPlacement(first + at, cpus, gpus[at]) for at in range(before, before + number))
        bundles += [_bundle(cpus, place.num_gpus) | accelerator_of(resources) for place in learners[name]]
        selectors += [resources.label_selector] * number
    global_place = ActorPlacement(first + len(bundles), 0, 0)
    bundles.append({"memory": float(max(64 << 20, COPIES_IN_GLOBAL_LEARNER * len(learners) * weight_bytes))})
    evaluator = _place_evaluator(plan, learners, bundles, available)
    selectors += [{}] * (len(bundles) - len(selectors))
    strategy = plan.config.runtime.placement.upper()
    return Placement(bundles, selectors, learners, global_place, evaluator, strategy, group)


def accelerator_of(resources: ResourcesConfig) -> dict[str, float]:
    """The part of a bundle that only nodes with a learner's kind of GPU have."""
    return {f"{ACCELERATOR}{resources.accelerator_type}": OF_ACCELERATOR} if resources.accelerator_type else {}


def trial_bundles(plan: RunPlan, weight_bytes: int, num_gpus: float) -> tuple[list[dict], list[dict]]:
    """Bundles that a Tune trial of this run reserves, one for its driver, which only waits, then those of the run; and
    their label selectors.

    Its evaluator shares a learner's bundle, so that more trials fit. `workers: auto` is one: the trials use
    all devices.

    Args:
        num_gpus: GPUs of the cluster, for `num_gpus: auto`.
    """
    placement = make_placement(plan, weight_bytes, {"GPU": num_gpus})
    return [DRIVER_BUNDLE, *placement.bundles], [{}, *placement.selectors]


def placement_in_trial(plan: RunPlan, weight_bytes: int) -> Placement | None:
    """The placement in the group that this process's Tune trial reserved; None outside of a trial.

    Raises:
        PlacementError: the group lacks resources of the run; nothing is placed outside of it.
    """
    group = get_current_placement_group()
    if group is None or group.bundle_specs[0] != DRIVER_BUNDLE:
        return None
    held, wanted = group.bundle_specs[1:], sum(plan.workers.values()) + 1
    placement = make_placement(plan, weight_bytes, {}, group=group) if len(held) >= wanted else None
    if placement and all(there.get(k, 0) >= b[k] for b, there in zip(placement.bundles, held) for k in b):
        return placement
    raise PlacementError(f"the trial holds {held}, its run needs {placement.bundles if placement else wanted} bundles")


def _bundle(cpus, gpus):
    return {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}


def _place_evaluator(plan, learners, bundles, available) -> ActorPlacement:
    """A free device; else a small share of the device of the natural learner, which is idle most of the time."""
    own = _bundle(1, 1 if any(place.num_gpus for places in learners.values() for place in places) else 0)
    if fit([*(bundle for bundle in bundles if "memory" not in bundle), own], [available]):
        bundles.append(own)
        return ActorPlacement(len(bundles) - 1, own["CPU"], own.get("GPU", 0))
    host = min(learners, key=lambda name: plan.config.base_learners[name].is_robust)
    place, *others = learners[host]
    if not place.num_gpus:
        return ActorPlacement(place.bundle, 0, 0)
    gpu = min(EVALUATOR_GPU, place.num_gpus / 2)
    learners[host] = (replace(place, num_gpus=round(place.num_gpus - gpu, 4)), *others)
    return ActorPlacement(place.bundle, 0, gpu)


class ClusterWait:
    """A limited wait for resources of the cluster.

    Args:
        timeout_s: limit of the wait.
        say: prints one line while nodes may still join; None: none will, and a cluster that lacks resources ends the
            wait after `GRACE_S`.
    """

    def __init__(self, timeout_s: float, say=None):
        self.timeout_s, self.may_grow, self.say = timeout_s, say is not None, say

    def is_over(self, waited: float, lacks: bool, shortage: str) -> bool:
        """Whether the wait has ended after `waited` seconds; `lacks`: the cluster is too small."""
        if waited < min(GRACE_S, self.timeout_s):
            return False
        if self.say and lacks and waited < self.timeout_s:
            self.say(f"waiting up to {self.timeout_s:g} s for the cluster: {shortage}")
            self.say = None
        return waited >= self.timeout_s or (lacks and not self.may_grow)


def fit_cluster(bundles: list[dict], selectors: list[dict]) -> bool:
    """Whether the bundles fit the nodes that are there, each on one with the labels that it wants."""
    return fit(*labelled(bundles, selectors, node_resources(), node_labels()))


def place_group(
    bundles: list[dict], selectors: list[dict], strategy: str, wait: ClusterWait, shortage: str = "", name: str = ""
):
    """The placement group once Ray has placed all bundles; None after the wait.

    Args:
        selectors: label selector of each bundle.
        name: that no other group of the cluster has; "" for none.
    """
    began = time.monotonic()
    group = placement_group(bundles, strategy=strategy, name=name, bundle_label_selector=selectors)
    ready, lacks = group.ready(), wait.may_grow or not fit_cluster(bundles, selectors)
    while not ray.wait([ready], timeout=0.1)[0]:
        if wait.is_over(time.monotonic() - began, lacks, shortage):
            remove_placement_group(group)
            return None
    return group


def reserve(placement: Placement, timeout_s: float, on_wait=None, name: str = ""):
    """Waits until Ray has placed the whole group.

    Args:
        timeout_s: runtime.startup_timeout_s.
        on_wait: `say` of `ClusterWait`.
        name: as in `place_group`.

    Raises:
        PlacementError: not placed within `timeout_s`, or earlier if the cluster is too small and will not grow.
    """
    wait = ClusterWait(timeout_s, on_wait)
    group = place_group(placement.bundles, placement.selectors, placement.strategy, wait, _shortage(placement), name)
    if group is None:
        raise PlacementError(
            f"the cluster cannot hold this run: {_shortage(placement)}; lower base_learners.<name>.resources, add "
            f"nodes, or raise runtime.startup_timeout_s ({timeout_s:g})"
        )
    return group


def free_resources(lost: Placement | None, timeout_s: float) -> dict:
    """Free resources, after a wait for those that a killed run or a lost group still holds: without its GPUs this run
    would be placed on CPUs, and would continue with other bits after a loss.

    Args:
        lost: placement of this run's last group; its node may be gone.
        timeout_s: limit of the wait for a GPU, if the lost group had GPUs.

    Raises:
        PlacementError: no GPU became free.
    """
    began = time.monotonic()
    held = lost.held if lost else {"GPU": 1}
    while True:
        there, free = ray.cluster_resources(), ray.available_resources()
        released = all(free.get(kind, 0) >= min(much, there.get(kind, 0)) for kind, much in held.items())
        has_gpu = lost is None or not held["GPU"] or there.get("GPU", 0) >= 1
        waited = time.monotonic() - began
        if has_gpu and (released or waited > RELEASE_TIMEOUT_S):
            return free
        if not has_gpu and waited > timeout_s:
            raise PlacementError(f"no GPU came back within runtime.startup_timeout_s ({timeout_s:g} s)")
        time.sleep(0.1)


def _shortage(placement):
    there, free = ray.cluster_resources(), ray.available_resources()
    short = [
        f"{amount:g} {kind} wanted, {there.get(kind, 0):g} in the cluster, {free.get(kind, 0):g} free"
        for kind, amount in placement.held.items()
        if free.get(kind, 0) < amount
    ]
    for name, places in placement.learners.items():
        short += missing(name, placement.bundles[places[0].bundle], placement.selectors[places[0].bundle])
    learners = ", ".join(
        f"{name} {f'{len(places)} x ' * (len(places) > 1)}{places[0].num_cpus:g} CPU {places[0].num_gpus:g} GPU"
        for name, places in placement.learners.items()
    )
    return f"{'; '.join(short) or f'no nodes hold all its bundles at once: {placement.bundles}'} ({learners})"


def missing(learner: str, bundle: dict, selector: dict) -> list[str]:
    """What no node has of a learner's kind of GPU and labels, in words."""
    kinds = {kind for node in node_resources() for kind in node if kind.startswith(ACCELERATOR)}
    found = [
        f"{learner}: no node has resources.accelerator_type {kind.removeprefix(ACCELERATOR)} "
        f"({', '.join(sorted(k.removeprefix(ACCELERATOR) for k in kinds)) or 'none is known'} in the cluster)"
        for kind in bundle
        if kind.startswith(ACCELERATOR) and kind not in kinds
    ]
    if not any(matches(selector, labels) for labels in node_labels()):
        found.append(f"{learner}: no node matches resources.label_selector {selector}")
    return found


def strategy_for(group, place: ActorPlacement):
    """Ray's scheduling strategy that puts an actor in its bundle."""
    return PlacementGroupSchedulingStrategy(group, place.bundle, placement_group_capture_child_tasks=False)
