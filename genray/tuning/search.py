"""Trials that Optuna suggests from what the trials before them reported."""

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

MOST_TRIES = 100  # for a point at which there is a run


def check_searcher(grid: Grid):
    """Whether what suggests the trials is installed.

    Raises:
        ConfigError: it is not.
    """
    if grid.space and find_spec("optuna") is None:
        raise ConfigError("search: optuna is not installed; pip install 'genray[optuna]', or search: random")


def suggestions(grid: Grid, folder: str) -> "Suggestions":
    """The searcher of a grid, which begins with the trials that are in its folder already."""
    return Suggestions(grid, Storage(folder))


class Suggestions(Searcher):
    """Makes runs of what Optuna's TPE (Bergstra et al., NeurIPS 2011) suggests, through Ray's OptunaSearch.

    Each suggestion is recorded before its trial starts. A search that is gone on with begins with those recorded, in
    their order: finished ones only report, so that Optuna knows what it knew, and the next point is a new one. What
    Optuna itself remembers is not kept.

    Args:
        grid: with a `Space`.
        storage: of the grid's folder.
    """

    def __init__(self, grid: Grid, storage: Storage):
        super().__init__(metric=grid.metric, mode=grid.mode)
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.storage = grid.space, storage
        self.number, self.tries, self.asked = 0, 0, {}
        before = [self._encoded(trial["point"]) for trial in stated_trials(storage).values()]
        seed = random.Random(f"{self.space.search_seed} {len(before)}").getrandbits(32)  # not the same points again
        axes = {key: _domain(axis) for key, axis in self.space.axes.items()}
        self.optuna = OptunaSearch(
            OptunaSearch.convert_search_space(axes),
            metric=grid.metric,
            mode=grid.mode,
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
        """The next point at which there is a run; Optuna is told of those where there is none."""
        for _ in range(MOST_TRIES):
            self.tries += 1
            self.asked[trial_id] = str(self.tries)
            point = self._decoded(self.optuna.suggest(self.asked[trial_id]))
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
        """Nothing: the recorded suggestions are what a search goes on from."""

    def restore(self, checkpoint_path):
        """Nothing, as `save`."""

    def _encoded(self, point):
        """As Optuna has it."""
        axes = self.space.axes.items()
        return {key: json.dumps(point[key]) if axis[0] == "choices" else point[key] for key, axis in axes}

    def _decoded(self, point):
        return {key: _value(axis, point[key]) for key, axis in self.space.axes.items()}


def _value(axis, suggested):
    """A choice, or a number of the range with six digits, so that a table has all of it."""
    if axis[0] == "choices":
        return json.loads(suggested)
    return min(max(rounded(suggested), axis[1]), axis[2])


def _domain(axis):
    kind, *span = axis
    if kind == "choices":
        return tune.choice([json.dumps(value) for value in span[0]])  # Optuna knows no lists and sections
    return {"uniform": tune.uniform, "loguniform": tune.loguniform}[kind](*span)
