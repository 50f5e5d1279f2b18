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
        (t.config.global_learner.sync_every, t.config.global_learner.warmup_epochs, t.config.seed) for t in grid.trials
    ]
    assert found == list(itertools.product(cs, ts, [7, 8]))
    assert len({t.name for t in grid.trials}) == 12 and all(t.config.name == t.name for t in grid.trials)
    assert grid.name == "some_grid" and grid.metric == "score" and grid.mode == "max"


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
    assert [t.method for t in grid.trials] == ["Generalist"] * 2 + ["Own"] * 2 + ["TRADES"] * 2
    assert [t.config.training.epochs for t in grid.trials][::2] == [30, 9, 9]
    assert {t.config.training.batch_size for t in grid.trials} == {32}
    assert type(grid.trials[4].config.base_learners["linf"].objective).__name__ == "TradesObjective"
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
    assert grid.name == (CONFIGS / name).stem and len({t.seed for t in grid.trials}) == 3


# The text of a grid file -> where each of its mistakes is, and a word of what is expected there.
BAD = {
    "grid: {a.b: [1]}": "trial b-1_seed-0: a: unknown key",
    "gird: {}": "gird: unknown key (did you mean grid?)",
    "grid: {}": "grid: expected one or more",
    "grid: {training.epochs: []}": "grid.training.epochs: expected a list of values or a section",
    "grid: {training.epochs: [x]}": "trial epochs-x_seed-0: training.epochs: expected",
    "grid: [1]": "grid: expected one or more name: value entries or null, got [1]",
    "seeds: []": "seeds: expected a list of one or more numbers, got []",
    "seeds: [-1]": "seeds[0]: expected a whole number at least 0, got -1",
    "metric: accuracy": "metric: expected what trial 0_seed-0 reports (score, natural, pgd20), got 'accuracy'",
    "mode: best": "mode: expected one of max, min, got 'best'",
    "methods: [no.yaml]": "methods.no: ",
    "methods: {a: {b: 1}}": "methods.a.b: unknown key",
    "methods: {a: [1]}": "methods.a: expected",
    "base: no.yaml": "base: ",
    "uniform: {base_learners.linf.lr: [2, 1]}": "uniform.base_learners.linf.lr: expected [low, high], low below high",
    "loguniform: {base_learners.linf.lr: [0, 1]}": "loguniform.base_learners.linf.lr: expected",
    "samples: 3": "samples: expected 1",
    "scheduler: pbt": "scheduler: expected none or asha, because PBT and PB2 change a run on its way",
    "scheduler: {name: pb2}": "scheduler: expected none or asha, because PBT and PB2 change a run",
    "scheduler: hyperband": "scheduler.name: expected asha, got 'hyperband'",
    "search: bayes": "search: expected one of grid, random, optuna",
    "search: random": "search: expected choices, uniform or loguniform with random",
    "search: optuna": "search: expected choices, uniform or loguniform with optuna",
    "{search: grid, choices: {seed: [1]}}": "search: expected random or optuna with choices",
    "{search: optuna, choices: {seed: [1]}, grid: {training.batch_size: [8]}}": "search: expected one",
    "{search: optuna, choices: {training.epochs: [1]}, seeds: [1, 2]}": "search: expected one method, one seed",
    "{search: optuna, choices: {training.epochs: [1, x]}}": "trial epochs-x_seed-0: training.epochs: expected",
    "{search: optuna, choices: {training.epochs: []}}": "choices.training.epochs: expected a list",
    "loggers: mlflow": "loggers: expected",
    "loggers: [comet]": "loggers.comet: unknown key",
    "loggers: {wandb: {api_key: abc}}": "loggers.wandb.api_key: unknown key",
    "loggers: {mlflow: {tracking_uri: 'https://me:pw@host/x'}}": "loggers.mlflow.tracking_uri: expected text",
    "loggers: {mlflow: {tracking_uri: 3}}": "loggers.mlflow.tracking_uri: expected text",
    "scheduler: {name: asha, grace: 1}": "scheduler.grace: unknown key",
    "scheduler: {name: asha, reduction_factor: 1}": "scheduler.reduction_factor: expected a whole number",
    "scheduler: {name: asha, max_epochs: 3}": "scheduler.max_epochs: expected at least training.epochs (",
    "scheduler: {name: asha, grace_period: 99}": "scheduler.grace_period: expected at most training.epochs (",
    "scheduler: {name: asha, grace_period: 0}": "scheduler.grace_period: expected a whole number",
    "max_failures: -1": "max_failures: expected a whole number at least 0, got -1",
    "evaluate: {attacks: [foo]}": "evaluate: evaluation attack: expected",
    "evaluate: {engine: foo}": "evaluate: engine: expected",
    "evaluate: {norms: [l7]}": "evaluate: norms[0]: expected",
    "evaluate: {attacks: aa}": "evaluate.attacks: expected a list of one or more values",
    "evaluate: {examples: 0}": "evaluate.examples: expected a whole number",
    "evaluate: {epsilon: {linf: -1}}": "evaluate: epsilon.linf: expected",
    "evaluate: {epsilon: {linf: x}}": "evaluate.epsilon.linf: expected a number",
    "name: a/b": "name: expected text of letters, digits",
    "- 1": "expected key: value lines, got list",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_names_the_file_and_the_field(grid_file, text):
    path = grid_file(text)
    with pytest.raises(ConfigError) as caught:
        load_grid(path)
    problems = [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]
    assert any(problem.startswith(BAD[text]) for problem in problems), problems
    assert all(str(path.parent) in problem and "\n" not in problem for problem in caught.value.problems)
    assert "abc" not in str(caught.value)  # no secret


def test_all_mistakes_are_listed_at_once(grid_file):
    with pytest.raises(ConfigError) as caught:
        load_grid(grid_file("mode: best\nmax_failures: x\nwhat: 1\ngrid: {training.epochs: 3}"))
    assert len(caught.value.problems) == 4
