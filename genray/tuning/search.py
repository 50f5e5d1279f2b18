"""Trials that Optuna suggests from the reports of earlier trials."""

import json
import random
from importlib.util import find_spec

from ray import tune
from ray.tune.search import Searcher

from genray.console import say
from genray.errors import ConfigError
from genray.recording.writer import Writer
from genray.storage import Storage
from genray.tuning.grid import Grid, rounded, stated_trials, suggested_file

MOST_TRIES = 100  # for a point with a valid configuration


def check_searcher(grid: Grid):
    """Checks that Optuna is installed, if the grid has a `Space`.

    Raises:
        ConfigError: it is missing.
    """
    if grid.space and find_spec("optuna") is None:
        raise ConfigError("search: optuna is not installed; pip install 'genray[optuna]', or search: random")


def suggestions(grid: Grid, folder: str) -> "Suggestions":
    """Returns the searcher of a grid; it begins with the trials in the grid's folder."""
    return Suggestions(grid, Storage(folder))


class Suggestions(Searcher):
    """Makes trials of the suggestions of Optuna's TPE (Bergstra et al., NeurIPS 2011), through Ray's OptunaSearch.

    Each suggestion is recorded before its trial starts. A resumed search begins with the recorded ones, in their
    order: finished trials only report, so that Optuna sees the same results again, and the next point is a new one.
    Optuna's own state is not saved.

    Args:
        grid: with a `Space`.
        storage: of the grid's folder.
    """

    def __init__(self, grid: Grid, storage: Storage):
        super().__init__(metric=grid.file.metric, mode=grid.file.mode)
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.storage = grid.space, storage
        self.number, self.tries, self.asked = 0, 0, {}
        choices = [key for key, axis in self.space.axes.items() if axis[0] == "choices"]
        points = [trial["point"] for trial in stated_trials(storage).values()]
        before = [point | {key: json.dumps(point[key]) for key in choices} for point in points]
        seed = random.Random(f"{self.space.search_seed} {len(before)}").getrandbits(32)  # a resumed one draws others
        axes = {key: _domain(axis) for key, axis in self.space.axes.items()}
        self.optuna = OptunaSearch(
            OptunaSearch.convert_search_space(axes),
            metric=grid.file.metric,
            mode=grid.file.mode,
            seed=seed,
            points_to_evaluate=before,
        )

    def suggest(self, trial_id):
        trial = self._next(trial_id)
        name, record = suggested_file(self.number), json.dumps({trial.name: trial.record()}, indent=1).encode()
        writer = Writer(say)
        writer.put(name, lambda: self.storage.write(name, record))
        writer.flush(trial.config.runtime.storage_timeout_s)  # the trial reads it
        self.number += 1
        return {"point": {"trial": trial.name, "method": trial.method, "seed": trial.seed, **trial.point}}

    def _next(self, trial_id):
        """The trial at the next suggested point with a valid configuration; reports the others to Optuna as failed."""
        for _ in range(MOST_TRIES):
            self.tries += 1
            self.asked[trial_id] = str(self.tries)
            suggested = self.optuna.suggest(self.asked[trial_id])
            point = {key: _value(axis, suggested[key]) for key, axis in self.space.axes.items()}
            try:
                return self.space.trial(self.number, point)
            except ConfigError as error:
                reason = error
                self.optuna.on_trial_complete(self.asked[trial_id], error=True)
        raise reason

    def on_trial_result(self, trial_id, result):
        self.optuna.on_trial_result(self.asked[trial_id], result)

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.optuna.on_trial_complete(self.asked[trial_id], result, error)

    def save(self, checkpoint_path):
        """Does nothing: a search resumes from the recorded suggestions."""

    def restore(self, checkpoint_path):
        """Does nothing, as `save`."""


def _value(axis, suggested):
    """A choice, or a number of the range rounded to six digits, as tables print it."""
    if axis[0] == "choices":
        return json.loads(suggested)
    return min(max(rounded(suggested), axis[1]), axis[2])


def _domain(axis):
    kind, *span = axis
    if kind == "choices":
        return tune.choice([json.dumps(value) for value in span[0]])  # Optuna has no lists and sections
    return {"uniform": tune.uniform, "loguniform": tune.loguniform}[kind](*span)
