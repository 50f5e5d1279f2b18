"""Sends the trials of a grid to MLflow and Weights & Biases, from the grid's command."""

from ray import tune

from genray.config import load_config
from genray.recording.trackers import Trackers
from genray.storage import Storage
from genray.tuning.grid import Grid, stated_trials
from genray.tuning.watch import trial_name


class TrackerCallback(tune.Callback):
    """Tune's callback with a run of each tracker for each trial.

    Args:
        grid: the grid.
        folder: of its runs.
        say: prints a line.
    """

    def __init__(self, grid: Grid, folder: str, say):
        self.grid, self.folder, self.say = grid, folder, say
        self.trials: dict[str, Trackers] = {}

    def __getstate__(self):  # Tune pickles the callback; connections cannot be pickled
        return {"folder": self.folder}

    def on_trial_start(self, iteration, trials, trial, **info):
        name = trial_name(trial)
        if name not in self.trials:
            plain = stated_trials(Storage(self.folder))[name]["config"]
            trackers = self.grid.trackers(load_config(plain))
            self.trials[name] = Trackers(trackers, name, plain, self.say, group=self.grid.name)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if "scalars" in result:
            self.trials[trial_name(trial)].log(result["scalars"] | {"score": result["score"]}, result["epoch"])

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._end(trial, {key: value for key, value in trial.last_result.items() if key.startswith("test_")})

    def on_trial_error(self, iteration, trials, trial, **info):
        self._end(trial, None)

    def _end(self, trial, test):
        trackers = self.trials.pop(trial_name(trial), None)
        if trackers is not None:
            trackers.end(test)
