"""Shows the progress of a grid, the time left, and how each trial ended."""

import re
from pathlib import Path

from ray import tune

from genray.recording import Progress, RunFolder
from genray.storage import Storage
from genray.tuning.grid import stated_trials
from genray.tuning.resources import Needs


def trial_name(trial) -> str:
    """Returns the name of a Tune trial: that of its run folder."""
    return trial.config["point"]["trial"]


def cause(error) -> str:
    """Returns the last line of a trial's traceback: the error without a class name of genray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^genray\.errors\.\w+: ", "", lines[-1])[:300] if lines else type(error).__name__


def _reason(trial):
    """The error of a Tune trial's last failure."""
    try:
        return cause(Path(trial.error_file).read_text())
    except (OSError, TypeError, ValueError):  # Tune has written none
        return "no reason was kept"


class TrialCallback(tune.Callback):
    """The progress of a grid in per cent of its work, which is counted in passes through the models.

    Args:
        needs: of the grid.
        folder: of its runs; work of earlier attempts takes no time.
    """

    def __init__(self, needs: Needs, folder: str):
        grid = needs.grid
        self.work, self.alike = needs.work(), grid.trials[0].name
        self.epochs = {trial.name: trial.config.training.epochs for trial in grid.trials}
        self.whole = sum(map(sum, self.work.values())) / len(grid.trials) * grid.size
        self.number, self.ended = grid.size, 0
        self.done = {}
        for name in stated_trials(Storage(folder)):
            run = RunFolder(folder, name)
            self._reached(name, max((r["epoch"] for r in run.read_metrics()), default=0))
            if run.storage.exists("results.json"):
                self._reached(name, None)
        self.progress = Progress()
        self.progress.phase(f"{self.number} trials,", 100, self._percent(), unit="%")

    def __getstate__(self):  # Tune pickles the callback; a terminal cannot be pickled
        return {name: value for name, value in vars(self).items() if name != "progress"}

    def _reached(self, name, epoch):
        """A trial has finished so many epochs, or (None) ended."""
        alike = name if name in self.work else self.alike
        training, judging = self.work[alike]
        now = training + judging if epoch is None else training * epoch / self.epochs[alike]
        self.done[name] = max(self.done.get(name, 0), now)

    def _percent(self):
        return min(100.0, 100 * sum(self.done.values()) / self.whole)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self._reached(trial_name(trial), result.get("epoch", 0))
        self.progress.steps(self._percent())

    def on_trial_complete(self, iteration, trials, trial, **info):
        result = trial.last_result or {}
        self._reached(trial_name(trial), None)
        self._end(trial, "finished" if result.get("finished") else f"stopped at epoch {result.get('epoch', 0)}", result)

    def on_trial_recover(self, iteration, trials, trial, **info):
        self.progress.say(f"{trial_name(trial)} failed, and goes on from its newest checkpoint: {_reason(trial)}")

    def on_trial_error(self, iteration, trials, trial, **info):
        self._end(trial, f"failed: {_reason(trial)}", {})

    def _end(self, trial, how, result):
        self.ended += 1
        rates = [f"{k.replace('_', ' ')} {100 * v:.2f} %" for k, v in result.items() if k.startswith("test_")]
        self.progress.say(f"[{self.ended}/{self.number}] {trial_name(trial)} {how}  {', '.join(rates)}".rstrip())
        self.progress.steps(self._percent())
