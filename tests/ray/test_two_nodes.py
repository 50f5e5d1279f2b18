"""Learners on different nodes of one cluster; that they give the same bits is in test_kills.py."""

import pytest
import ray
from ray.cluster_utils import Cluster

import genray
from genray.config import load_config
from genray.errors import PlacementError
from genray.run.setup import prepare
from genray.runtime.ray.actor_group import ActorGroup
from genray.runtime.ray.placement import make_placement

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def two_nodes():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield
    ray.shutdown()
    cluster.shutdown()


def test_learners_spread_over_nodes(two_nodes, small_run):
    setup = prepare(load_config(None, [*small_run, "runtime.placement=spread"]))
    with ActorGroup(setup, make_placement(setup.plan, 1000, ray.available_resources()), {}) as group:
        nodes = {name: where["node"] for name, where in group.whereabouts.items()}
    assert nodes["natural"] != nodes["linf"]


def test_a_bundle_that_no_node_holds(two_nodes, tmp_path, small_run):
    """Two CPUs are free, but on two nodes: a learner that wants both of them cannot be placed."""
    overrides = [*small_run, "base_learners.linf.resources.num_cpus=2", "base_learners.natural.resources.num_cpus=0.01"]
    with pytest.raises(PlacementError, match="the cluster cannot hold this run"):
        genray.train(None, [*overrides, "runtime.startup_timeout_s=6"], storage=str(tmp_path))
    assert not list(tmp_path.iterdir())
