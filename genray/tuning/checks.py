"""What a cluster has to have before the first trial of a grid starts."""

import os

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from genray.errors import PlacementError
from genray.runtime.cluster import node_resources
from genray.runtime.placement import GRACE_S
from genray.runtime.shares import fit
from genray.tuning.grid import RECORD
from genray.tuning.needs import Needs, total

VISIBLE_TIMEOUT_S = 120


def check_private(needs: Needs, cores: int):
    """Refuses what a Ray that is yet to be started on this machine will never hold: it takes several learners a core,
    but no learner that wants more cores than there are.

    Raises:
        PlacementError: names the first trial with such a learner.
    """
    if ray.is_initialized():
        return
    for name, bundles in needs.bundles(0).items():
        widest = max(bundle.get("CPU", 0) for bundle in bundles)
        if widest > cores:
            raise PlacementError(
                f"trial {name}: a learner wants {widest:g} CPU, this machine has {cores}; lower "
                "base_learners.<name>.resources, or join a cluster with --address"
            )


def check_fits(wanted: dict, patience_s: float = 0):
    """Whether each trial fits the cluster when it has all of it.

    Args:
        wanted: trial name -> bundles.
        patience_s: how long to wait for an autoscaler where one does not fit.

    Raises:
        PlacementError: names the first trial that does not, what it wants and what is there.
    """
    nodes = node_resources()
    for name, trial in wanted.items():
        if not fit(trial, nodes) and not _holds(trial, max(patience_s, GRACE_S)):
            text = ", ".join(f"{total(trial).get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
            there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
            raise PlacementError(
                f"trial {name}: wants {text} in bundles of one learner each, the cluster has {len(nodes)} nodes "
                f"({there}); lower base_learners.<name>.resources, or add nodes"
            )


def _holds(trial, patience_s):
    """Whether the cluster has or makes room for a trial when it is asked to."""
    group = placement_group(trial)
    try:
        return bool(ray.wait([group.ready()], timeout=patience_s)[0])
    finally:
        remove_placement_group(group)


def check_visible(folder: str):
    """Whether every node can write where the runs go.

    Raises:
        PlacementError: names the nodes that cannot.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or "://" in folder:
        return
    folder = os.path.abspath(folder)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[node["NodeManagerAddress"]] = _sees.options(num_cpus=0, scheduling_strategy=strategy).remote(folder)
    blind = [address for address, ref in asked.items() if not ray.get(ref, timeout=VISIBLE_TIMEOUT_S)]
    if blind:
        raise PlacementError(
            f"--storage {folder}: expected a folder that every node sees, {', '.join(blind)} do not; use a shared file "
            "system or a URI such as s3://bucket/prefix"
        )


@ray.remote
def _sees(folder):
    return os.path.exists(os.path.join(folder, RECORD)) and os.access(folder, os.W_OK)
