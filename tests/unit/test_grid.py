"""Grid files: which trials they make, and what is wrong with them, before anything starts."""

import itertools
import math

import pytest
import yaml
from presets import CONFIGS, GRIDS, header, overrides_in

from genray.config import load_config, to_dict
from genray.errors import ConfigError
from genray.tuning.grid import load_grid, reported


@pytest.fixture
def grid_file(tmp_path):
    def write(content):
        path = tmp_path / "some_grid.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def test_a_grid_is_the_product_of_its_values_and_seeds(grid_file):
    cs, ts = [1, 2, 5], [3, 4]
    grid = load_grid(
        grid_file({"grid": {"global_learner.sync_every": cs, "global_learner.warmup_epochs": ts}, "seeds": [7, 8]})
    )
    found = [
        (t.config.seed, t.config.global_learner.sync_every, t.config.global_learner.warmup_epochs) for t in grid.trials
    ]
    assert found == list(
        itertools.product([7, 8], cs, ts)
    )  # an unfinished grid has whole comparisons of its first seeds
    assert len({t.name for t in grid.trials}) == 12 and all(t.config.name == t.name for t in grid.trials)
    assert grid.name == "some_grid" and grid.file.metric == "score" and grid.file.mode == "max"


def test_a_trial_is_the_configuration_that_train_would_load(grid_file):
    value = {"norm": "linf", "epsilon": "8/255", "step_size": "2/255", "num_steps": 3}
    grid = load_grid(grid_file({"set": {"training.epochs": 4}, "grid": {"base_learners.linf.attack": [value]}}))
    (trial,) = grid.trials
    by_hand = load_config(
        None,
        [
            "training.epochs=4",
            "base_learners.linf.attack={norm: linf, epsilon: 8/255, step_size: 2/255, num_steps: 3}",
            f"name={trial.name}",
        ],
    )
    assert to_dict(trial.config) == to_dict(by_hand)


def test_values_may_have_labels(grid_file):
    schedules = {0.4: [[0, 1], [1, 0.4]], "none": 1}
    grid = load_grid(grid_file({"grid": {"global_learner.gamma": schedules}}))
    assert [t.point for t in grid.trials] == [{"global_learner.gamma": 0.4}, {"global_learner.gamma": "none"}]
    ends = [float(t.config.global_learner.mixing_weights["linf"].values[-1]) for t in grid.trials]
    assert ends == [0.4, 1.0]
    assert [t.name for t in grid.trials] == ["0_gamma-0.4_seed-0", "1_gamma-none_seed-0"]


def test_methods_are_files_or_settings(grid_file, tmp_path):
    own = to_dict(load_config(None, ["training.epochs=9", "name=own"]))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    methods = {
        "Generalist": None,
        "Own": "own.yaml",
        "TRADES": {"config": "own.yaml", "set": {"base_learners.linf.objective": "trades"}},
    }
    grid = load_grid(grid_file({"set": {"training.batch_size": 32}, "methods": methods, "seeds": [0, 1]}))
    assert [t.method for t in grid.trials] == ["Generalist", "Own", "TRADES"] * 2
    assert [t.config.training.epochs for t in grid.trials] == [30, 9, 9] * 2
    assert {t.config.training.batch_size for t in grid.trials} == {32}
    assert type(grid.trials[2].config.base_learners["linf"].objective).__name__ == "TradesObjective"
    as_list = load_grid(grid_file({"methods": ["own.yaml"]}))
    assert [t.method for t in as_list.trials] == ["own"]


def test_samples_lie_in_their_ranges_and_are_repeatable(grid_file):
    space = {
        "loguniform": {"base_learners.linf.lr": [0.001, 0.1]},
        "uniform": {"global_learner.decay": [0.5, 0.9]},
        "choices": {"global_learner.sync_every": [1, 2]},
        "samples": 60,
    }
    rates, decays, every = [], [], []
    for trial in load_grid(grid_file(space)).trials:
        rates.append(float(trial.config.base_learners["linf"].lr.values[0]))
        decays.append(trial.config.global_learner.decay)
        every.append(trial.config.global_learner.sync_every)
    assert all(0.001 <= rate <= 0.1 for rate in rates) and all(0.5 <= decay <= 0.9 for decay in decays)
    # Uniform in the logarithm: the middle of the range is 0.01, not 0.05.
    assert abs(sum(map(math.log10, rates)) / 60 + 2) < 0.25
    assert set(every) == {1, 2} and len(set(rates)) == 60
    again = [t.point for t in load_grid(grid_file(space)).trials]
    other = [t.point for t in load_grid(grid_file(space | {"search_seed": 1})).trials]
    assert again == [t.point for t in load_grid(grid_file(space)).trials] != other


def test_every_evaluated_epoch_reports_these():
    assert reported(load_config(None, ["evaluation.attack.num_steps=7"])) == ("score", "natural", "pgd7")


@pytest.mark.parametrize("name", GRIDS)
def test_shipped_grids_are_what_their_headers_say(name):
    lines = header(name)
    assert len(lines[0]) > 20
    (command,) = [line for line in lines if line.startswith("python -m genray.tune")]
    assert f"configs/{name}" in command.split()
    grid = load_grid(CONFIGS / name, overrides_in(command))
    assert f"{len(grid.trials)} runs" in command
    seeds = 1 if "/tuning_" in name else 3  # those choose learning rates for the grids that compare
    assert grid.name == (CONFIGS / name).stem and len({t.seed for t in grid.trials}) == seeds


def test_all_mistakes_are_listed_at_once(grid_file):
    with pytest.raises(ConfigError) as caught:
        load_grid(grid_file("mode: best\nmax_failures: x\nwhat: 1\ngrid: {training.epochs: 3}"))
    assert len(caught.value.problems) == 4
