"""What a grid says it needs before it starts: room, passes, time."""

import time

import pytest
import yaml

from genray.errors import ConfigError, PlacementError

pytest.importorskip("ray", reason="grids run on Ray")

import ray

from genray.run.probe import PassSeconds
from genray.runtime.ray.cluster import check_cores
from genray.tuning import plan
from genray.tuning import resources as module
from genray.tuning.grid import load_grid
from genray.tuning.plan import plan_text
from genray.tuning.resources import Needs, fits_at_once, plan_grid

TINY = {
    "training.epochs": 2,
    "training.batch_size": 50,
    "data.train_examples": 200,
    "data.test_examples": 30,
    "data.validation_examples": 40,
    "model.width": 4,
}


def needs_of(tmp_path, **content):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({**content, "set": TINY | content.get("set", {})}))
    return Needs(load_grid(path))


def test_trials_that_fit_at_once_by_hand():
    learner, memory = {"CPU": 1.0, "GPU": 0.5}, {"memory": 10.0}
    trial = [memory, learner, learner]
    node = {"CPU": 4, "GPU": 2, "memory": 100}
    assert fits_at_once([trial] * 8, [node, node]) == 4
    assert fits_at_once([trial] * 3, [node, node]) == 3
    assert fits_at_once([trial] * 8, [node | {"memory": 15}, node | {"memory": 5}]) == 1
    assert fits_at_once([[{"GPU": 3}]], [node, node]) == 0  # a bundle lies on one node
    assert fits_at_once([[learner] * 3] * 8, [{"CPU": 2, "GPU": 1}] * 3) == 2  # a trial may lie on two
    assert fits_at_once([trial], []) == 0


def test_judging_is_counted_by_the_attacks_it_asks_for(tmp_path):
    judged = {"attacks": ["pgd20", "pgd100"], "examples": 20, "engine": "genray", "block_size": 10}
    found = needs_of(tmp_path, evaluate=judged)
    passes = found.judging(found.grid.trials[0])
    assert 20 * 120 <= passes.attack <= 20 * 125  # and a few forward passes
    assert needs_of(tmp_path).judging(found.grid.trials[0]).units == 0


def test_the_data_is_read_once_a_kind(tmp_path, monkeypatch):
    calls = []
    real = module.prepare
    monkeypatch.setattr(module, "prepare", lambda config, **options: calls.append(config) or real(config, **options))
    grid = {"global_learner.warmup_epochs": [0, 1, 2], "base_learners.linf.lr": [0.1, 0.2]}
    found = needs_of(tmp_path, grid=grid, seeds=[0, 1])
    found.bundles(0), found.bundles(2), found.work(), found.bundles(0)
    assert len(found.grid.trials) == 12 and len(calls) == 2  # learners differ in two


def test_time_is_that_of_the_longest_learner_or_of_all_cores(tmp_path, monkeypatch):
    """160 of 200 images are trained on, for 2 epochs; theta_g is judged on 40 after each, 4 models on 30 at the end."""
    monkeypatch.setattr(module, "pass_seconds", lambda setup: PassSeconds(3.0, 1.0))
    set_ = {"base_learners.linf.attack.num_steps": 3}
    nodes, many = [{"CPU": 4, "memory": 1e12}], [{"CPU": 100, "memory": 1e12}]
    alone = needs_of(tmp_path, set=set_, runtime="local", seeds=[0, 1, 2, 3])
    natural, linf, evaluations = 320 * 3, 320 * (3 + 3), (2 * 40 + 4 * 30) * (20 + 2)
    assert plan_grid(alone, nodes, 4, None).at_once == 4
    assert plan_grid(alone, nodes, 4, None).seconds == pytest.approx(natural + linf + evaluations)
    assert plan_grid(alone, nodes, 4, 1).seconds == pytest.approx(4 * (natural + linf + evaluations))
    apart = needs_of(tmp_path, set=set_, seeds=[0, 1, 2, 3])  # two learners of one CPU each
    assert plan_grid(apart, nodes, 4, None).at_once == 2
    assert plan_grid(apart, nodes, 4, None).seconds == pytest.approx(2 * (linf + evaluations))
    crowded = plan_grid(apart, many, 4, None)  # logical CPUs are no cores
    assert (crowded.at_once, crowded.seconds) == (4, pytest.approx(natural + linf + evaluations))
    on_gpus = [{"CPU": 4, "GPU": 4, "memory": 1e12}]
    assert plan_grid(apart, on_gpus, 4, None).seconds is None
    assert plan_grid(apart, nodes, None, None).seconds is None


def test_a_pass_is_measured(tmp_path):
    found = needs_of(tmp_path)
    began = time.perf_counter()
    (pace,) = found.probe().values()
    assert 0 < pace.attack and 0 < pace.training and pace.attack + pace.training < time.perf_counter() - began


def test_a_trial_of_one_process_holds_the_gpu_that_its_widest_learner_wants(tmp_path):
    def gpus(natural, linf, there=2):
        wanted = {"base_learners.natural.resources.num_gpus": natural, "base_learners.linf.resources.num_gpus": linf}
        ((bundle,),) = needs_of(tmp_path, set=wanted, runtime="local").bundles(there).values()
        return bundle.get("GPU", 0)

    assert [gpus("auto", "auto"), gpus("auto", "auto", there=0), gpus(0, 0), gpus(0.25, 0.5)] == [1, 0, 0, 0.5]


def test_a_learner_wider_than_the_machine_is_refused(tmp_path, monkeypatch):
    grid = needs_of(tmp_path, grid={"base_learners.linf.resources.num_cpus": [1, 64]}).grid
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert plan.needs_of(grid, None)[1] == 65
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(PlacementError, match=r"trial 1_num_cpus-64_seed-0: a learner wants 64 CPU, this machine has 2"):
        plan.needs_of(grid, None)
    plan.needs_of(grid, "auto")  # a cluster may have such nodes
    with pytest.raises(PlacementError, match=r"digits: a learner wants 6400 CPU, this machine has 2; lower"):
        check_cores({"digits": 6400}, None)
    assert not ray.is_initialized()


def test_trials_of_a_search_hold_what_the_largest_needs(tmp_path):
    key = "base_learners.linf.resources.num_cpus"
    found = needs_of(tmp_path, search="optuna", choices={key: [1, 2]}, samples=5)
    assert {tuple(b.get("CPU", 0) for b in bundles) for bundles in found.bundles(0).values()} == {(0, 1, 2, 0)}
    unequal = needs_of(tmp_path, search="optuna", choices={"base_learners.linf.workers": [1, 2]}, samples=5)
    with pytest.raises(ConfigError, match="search: expected trials with equal base learners"):
        unequal.bundles(0)


def test_the_plan_says_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pass_seconds", lambda setup: PassSeconds(0.1, 0.1))
    found = needs_of(tmp_path, runtime="local", seeds=[0, 1, 2], evaluate={"attacks": ["pgd20"], "engine": "genray"})
    lines = plan_text(found, [{"CPU": 2, "memory": 1e12}], 2, None).splitlines()
    assert lines[0] == "grid           some: 3 trials"
    assert lines[1] == "trial          0_seed-0: 1 CPU, 0 GPU, 2 epochs" and len(lines) == 7
    assert lines[4] == "at once        2 on 1 node"
    # 3 trials, 2 at once, (320 + 320 x 11 + 200 images x 20.7) passes of a tenth of a second
    assert lines[5].startswith("time           about 20 min of computing, at the pace of")
    assert lines[6].endswith("for `evaluate`")
    assert plan_text(found, [{"CPU": 0}], None, None).splitlines()[4] == "at once        none yet on 1 node"
    assert plan_text(found, [], None, None).splitlines()[4] == "at once        as many as the cluster holds"
