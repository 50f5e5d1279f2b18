"""Learners on nodes of their own kind: by the type of their GPU, and by labels."""

import pytest
import ray
import yaml
from conftest import wait_for

import genray
from genray.cli import train
from genray.cli.parser import run_command
from genray.config import load_config
from genray.errors import PlacementError
from genray.run.setup import prepare
from genray.runtime.ray.actor_group import ActorGroup
from genray.runtime.ray.cluster import node_labels
from genray.runtime.ray.placement import free_resources, make_placement

pytestmark = pytest.mark.ray
NATURAL, LINF = "base_learners.natural.resources", "base_learners.linf.resources"


@pytest.fixture
def two_kinds(on_ray):
    """Two more nodes with a logical GPU each: "T4" -> its node, "A100" -> its node."""
    for kind, zone in (("T4", "a"), ("A100", "b")):
        options = {"resources": {f"accelerator_type:{kind}": 1}, "labels": {"zone": zone}}
        on_ray.add_node(num_cpus=2, num_gpus=1, **options)
    wait_for(lambda: len(node_labels()) == 3, "the nodes")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return {kind: n["NodeID"] for n in nodes for kind in ("T4", "A100") if f"accelerator_type:{kind}" in n["Resources"]}


ASKED = {"accelerator_type": ["T4", "A100"], "label_selector": ["{zone: a}", "{zone: '!a', other: '!b'}"]}


def test_each_learner_gets_the_node_it_asks_for(two_kinds, small_run):
    for field, asked in ASKED.items():
        for order in (1, -1):
            first, second = asked[::order]
            overrides = [f"{NATURAL}.{field}={first}", f"{LINF}.{field}={second}", "runtime.startup_timeout_s=60"]
            setup = prepare(load_config(None, [*small_run, *overrides]))
            placement = make_placement(setup.plan, 1000, free_resources(None, 60))
            with ActorGroup(setup, placement, {}) as group:
                found = [group.whereabouts[name]["node"] for name in ("natural", "linf")]
            assert found == [two_kinds["T4"], two_kinds["A100"]][::order], overrides


REFUSED = {
    "accelerator_type=H100": "linf: no node has resources.accelerator_type H100 (A100, T4 in the cluster)",
    "label_selector={zone: c}": "linf: no node matches resources.label_selector {'zone': 'c'}",
}


def test_what_no_node_has_is_one_line(two_kinds, small_run, tmp_path, capsys):
    for override, said in REFUSED.items():
        words = ["--storage", str(tmp_path / "runs"), *small_run, f"{LINF}.{override}", "runtime.startup_timeout_s=6"]
        assert run_command(train.main, train.parse_args([*words, "--runtime", "ray"])) == 2
        shown = capsys.readouterr().err
        assert f"waiting up to 6 s for the cluster: {said}" in shown
        (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: the cluster cannot hold this run: {said}") and not (tmp_path / "runs").exists()


def test_trials_of_a_grid_ask_for_the_same(two_kinds, small_run, tmp_path):
    settings = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in small_run)}
    settings |= {"training.epochs": 1, "runtime.startup_timeout_s": 300, f"{LINF}.label_selector": {"zone": "b"}}
    grid = {"set": settings | {f"{NATURAL}.accelerator_type": "T4"}, "name": "kinds"}
    (tmp_path / "kinds.yaml").write_text(yaml.safe_dump(grid))
    trials = genray.tune(tmp_path / "kinds.yaml", storage=str(tmp_path / "runs"))
    assert [row["status"] for row in trials.rows] == ["finished"]
    grid["set"] |= {f"{LINF}.label_selector": {"zone": "c"}, "runtime.startup_timeout_s": 6}
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(grid | {"name": "none"}))
    with pytest.raises(PlacementError, match=r"trial 0_seed-0: wants .*no node matches resources.label_selector"):
        genray.tune(tmp_path / "none.yaml", storage=str(tmp_path / "runs"))
