"""Checks of a cluster before the first trial of a grid starts."""

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from genray.console import say
from genray.errors import GenrayError, LostError, PlacementError
from genray.run.allocation import total
from genray.runtime.ray.cluster import node_resources
from genray.runtime.ray.fetch import fetch
from genray.runtime.ray.placement import GRACE_S, ClusterWait, fit_cluster, missing, place_group
from genray.storage import Storage
from genray.tuning.grid import RECORD

VISIBLE_TIMEOUT_S = 120


def check_fits(wanted: dict, selectors: dict, patience_s: float = 0):
    """Checks that each trial alone fits the cluster.

    Args:
        wanted: trial name -> bundles, the driver's first.
        selectors: trial name -> label selector of each bundle.
        patience_s: limit of the wait for an autoscaler.

    Raises:
        PlacementError: names the first trial that does not fit, its resources and the cluster's.
    """
    nodes = node_resources()
    for name, trial in wanted.items():
        if fit_cluster(trial, selectors[name]):
            continue
        wait = ClusterWait(max(patience_s, GRACE_S), say if patience_s else None)
        group = place_group(trial, selectors[name], "PACK", wait, f"trial {name}")
        if group is None:
            text = ", ".join(f"{total(trial).get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
            lacks = dict.fromkeys(w for b, s in zip(trial, selectors[name]) for w in missing("a learner", b, s))
            text += "".join(f", {words}" for words in lacks)
            there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
            raise PlacementError(
                f"trial {name}: wants {text} in bundles of one learner each, the cluster has {len(nodes)} nodes "
                f"({there}); lower base_learners.<name>.resources, or add nodes"
            )
        remove_placement_group(group)


def check_visible(folder: str):
    """Checks that every node can read and write the folder of the runs.

    Args:
        folder: `Storage.absolute` of the grid's folder.

    Raises:
        PlacementError: names the other nodes.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    asked = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        look = _sees.options(num_cpus=0, scheduling_strategy=strategy).remote(folder)
        asked.append((node["NodeManagerAddress"], look))
    blind = {address: why for address, look in asked if (why := _answer(look, address))}
    if blind:
        place, reason = Storage(folder), next(iter(blind.values()))
        cure = "use a shared file system or a URI such as s3://bucket/prefix"
        raise PlacementError(
            f"--storage {place}: expected a folder that every node sees, {', '.join(blind)} do not ({reason}); "
            f"{cure if place.is_local else 'each node needs credentials for it'}"
        )


def _answer(look, address):
    try:
        return fetch(look, address, timeout_s=VISIBLE_TIMEOUT_S, field="the limit of such a question")
    except LostError as error:
        return error.why


@ray.remote
def _sees(folder) -> str:
    """Why this node cannot use the grid's folder; empty if it can."""
    try:
        place = Storage(folder)
        if not place.exists(RECORD):
            return "it is not there"
        place.check_writable()
        return ""
    except GenrayError as error:
        return str(error)
