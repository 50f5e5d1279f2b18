"""What Optuna suggests becomes runs, is recorded before it begins, and is not asked for again."""

import json
import math
import statistics

import pytest
import yaml

from genray.config import to_dict
from genray.errors import ConfigError
from genray.storage import Storage
from genray.tuning.grid import RECORD, load_grid, stated_trials

pytest.importorskip("optuna", reason="an optional extra")
pytest.importorskip("ray", reason="Optuna is asked through Ray")

LR, EVERY = "base_learners.linf.lr", "global_learner.sync_every"
SPACE = {"search": "optuna", "loguniform": {LR: [0.001, 0.1]}, "choices": {EVERY: [1, [2], 5]}}


@pytest.fixture
def begin(tmp_path):
    """Makes the searcher of a grid in one folder, anew each time, as a resumed command does."""
    from genray.tuning.search import suggestions

    def make(**content):
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump(SPACE | {"choices": {EVERY: [1, 2, 5]}, "samples": 30} | content))
        grid = load_grid(path)
        folder = Storage(str(tmp_path / "some"))
        if not folder.exists(RECORD):
            folder.write(RECORD, json.dumps({"trials": {}, "space": grid.space.record()}).encode())
        return suggestions(grid, folder.uri), folder

    return make


def ask(searcher, number, score):
    """Takes suggestions and reports score(point) for each; returns the points."""
    points = []
    for _ in range(number):
        name = f"t{searcher.number}"
        points.append(searcher.suggest(name)["point"])
        searcher.on_trial_complete(name, {"score": score(points[-1]), "training_iteration": 1})
    return points


def best_at_a_hundredth(point):
    return -abs(math.log10(point[LR]) + 2)


def test_suggestions_are_recorded_runs_within_the_space(begin):
    searcher, folder = begin()
    points = ask(searcher, 12, best_at_a_hundredth)
    stated = stated_trials(folder)
    assert list(stated) == [point["trial"] for point in points]
    for point, trial in zip(points, stated.values()):
        config = trial["config"]
        assert 0.001 <= point[LR] <= 0.1 and point[EVERY] in (1, 2, 5)
        assert float(config["base_learners"]["linf"]["lr"]) == point[LR]
        assert config["global_learner"]["sync_every"] == point[EVERY]
        assert config["name"] == point["trial"] and trial["seed"] == 0
    assert len({point[LR] for point in points}) == 12


def test_it_learns_from_what_it_is_told(begin):
    off = [abs(math.log10(point[LR]) + 2) for point in ask(begin(samples=60)[0], 60, best_at_a_hundredth)]
    assert statistics.median(off[:10]) > 0.35  # Optuna's first ten are random: half a decade off on average
    assert statistics.median(off[30:]) < 0.25


def test_a_search_that_is_gone_on_with_repeats_its_trials_and_then_makes_new_ones(begin):
    first = ask(begin(samples=5)[0], 5, best_at_a_hundredth)
    again, folder = begin(samples=50)
    before = stated_trials(folder)
    assert ask(again, 5, best_at_a_hundredth) == first
    assert stated_trials(folder) == before
    new = ask(again, 3, best_at_a_hundredth)
    assert len({point[LR] for point in first + new}) == 8
    assert list(stated_trials(folder)) == [point["trial"] for point in first + new]


def test_points_without_a_run_are_passed_over(begin):
    """A late t' needs many epochs: each value is fine with the first one of the other key, but not all together."""
    late, epochs = "global_learner.warmup_epochs", "training.epochs"
    searcher, folder = begin(choices={late: [5, 25], epochs: [30, 10]}, samples=12)
    points = ask(searcher, 12, lambda point: 0.0)
    assert {(point[late], point[epochs]) for point in points} == {(5, 30), (5, 10), (25, 30)}
    assert searcher.tries > 12 and len(stated_trials(folder)) == 12


def test_all_ends_are_checked_before_anything_starts(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"search": "optuna", "uniform": {EVERY: [1, 5]}}))
    with pytest.raises(ConfigError, match="sync_every: expected a whole number"):
        load_grid(path)
    path.write_text(yaml.safe_dump({"search": "optuna", "choices": {EVERY: [1, 2, 0]}}))
    with pytest.raises(ConfigError, match="sync_every: expected a whole number at least 1"):
        load_grid(path)


def test_a_grid_says_how_many_trials_there_will_be(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump(SPACE | {"choices": {EVERY: [1, 2]}, "samples": 7}))
    grid = load_grid(path)
    assert grid.size == 7
    assert all(to_dict(trial.config)["seed"] == 0 for trial in grid.trials)
    assert {t.config.global_learner.sync_every for t in grid.trials} == {1, 2}
    assert {0.001, 0.1} <= {float(t.config.base_learners["linf"].lr.values[0]) for t in grid.trials}
