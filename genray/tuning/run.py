"""Runs a grid: what fits the cluster runs at the same time, the rest waits; Tune does the scheduling."""

import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from genray.config import to_dict
from genray.errors import RunFolderError
from genray.storage import Storage
from genray.tuning.checks import check_fits, check_visible
from genray.tuning.grid import RECORD, Grid
from genray.tuning.loggers import logger_callbacks
from genray.tuning.needs import Needs
from genray.tuning.search import suggestions
from genray.tuning.trial import run_trial
from genray.tuning.watch import Watch, trial_name


@dataclass
class Outcome:
    """Attributes:
    finished, stopped: names of the trials that ran to their end, and that the scheduler stopped.
    failed: name -> error in one line.
    """

    finished: list = field(default_factory=list)
    stopped: list = field(default_factory=list)
    failed: dict = field(default_factory=dict)


def open_folder(grid: Grid, storage: Any, resume: bool) -> str:
    """The folder of a grid's runs, with its record in place.

    Raises:
        RunFolderError: a grid of this name is there and `resume` is off, or it is another grid.
    """
    place = Storage(storage) / grid.name
    place.check_writable()
    trials = {} if grid.space else {trial.name: trial.record() for trial in grid.trials}
    record = {"source": grid.source, "trials": trials, **({"space": grid.space.record()} if grid.space else {})}
    record = json.loads(json.dumps(record, default=str))
    if place.exists(RECORD):
        if not resume:
            raise RunFolderError(f"{place}: a grid of this name exists; give it another name, or --resume")
        before = json.loads(place.read(RECORD))
        if any(before.get(key) != record.get(key) for key in ("trials", "space")):
            raise RunFolderError(f"{place}: cannot resume another grid: its trials differ from those in {RECORD}")
    else:
        place.write(RECORD, json.dumps(record, indent=1).encode())
    return place.absolute  # each trial has a working directory of its own


def run_grid(needs: Needs, folder: str, *, train, evaluate, joined: bool, max_concurrent=None) -> Outcome:
    """Runs the trials that are not finished, on the Ray that is connected.

    Args:
        needs: of the grid.
        folder: of its runs, as `open_folder` gave it.
        train, evaluate: as in `run_trial`.
        joined: the cluster is not our own, so it may grow.
        max_concurrent: at most so many trials at once; None for what fits.

    Raises:
        PlacementError: a trial's bundles do not fit the cluster, or a node does not see the folder.
    """
    grid = needs.grid
    wanted = needs.bundles(ray.cluster_resources().get("GPU", 0))
    check_fits(wanted, patience_s=grid.trials[0].config.runtime.startup_timeout_s if joined else 0)
    check_visible(folder)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the command, and --resume goes on
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    watch = Watch(needs, folder)
    try:
        found = _tuner(grid, folder, wanted, watch, train, evaluate, max_concurrent).fit()
    finally:
        watch.progress.close()
    return _outcome(found)


def _tuner(grid, folder, wanted, watch, train, evaluate, max_concurrent):
    first = grid.trials[0]
    configs = {} if grid.space else {trial.name: to_dict(trial.config) for trial in grid.trials}
    strategies = {trial.name: trial.config.runtime.placement.upper() for trial in grid.trials}
    trainable = tune.with_parameters(
        run_trial,
        configs=configs,
        storage=folder,
        runtime=grid.runtime,
        train=train,
        evaluate=evaluate,
        judged_by=grid.evaluate,
    )

    def resources(config):
        name = config["point"]["trial"]
        alike = name if name in wanted else first.name  # suggested trials all hold the same
        return tune.PlacementGroupFactory(wanted[alike], strategy=strategies[alike])

    points = [{"trial": t.name, "method": t.method, "seed": t.seed, **t.point} for t in grid.trials]
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space=None if grid.space else {"point": tune.grid_search(points)},
        tune_config=tune.TuneConfig(
            metric=grid.metric,
            mode=grid.mode,
            scheduler=_scheduler(grid),
            search_alg=suggestions(grid, folder) if grid.space else None,
            num_samples=grid.space.samples if grid.space else 1,
            max_concurrent_trials=max_concurrent,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"attempt_{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=(Storage(folder) / "tune").absolute,
            failure_config=tune.FailureConfig(max_failures=grid.max_failures),
            callbacks=[watch, *logger_callbacks(grid)],
            verbose=0,
        ),
    )


def _scheduler(grid):
    """ASHA (Li et al., 1810.05934) over epochs, or none."""
    if not grid.scheduler:
        return None
    longest = max(trial.config.training.epochs for trial in grid.trials)
    return ASHAScheduler(
        time_attr="epoch",
        max_t=grid.scheduler.max_epochs or longest + 1,  # a run's last epoch is not its end: it is judged then
        grace_period=grid.scheduler.grace_period or max(1, longest // 4),
        reduction_factor=grid.scheduler.reduction_factor,
    )


def _outcome(found) -> Outcome:
    outcome = Outcome()
    for result in found:
        name = result.config["point"]["trial"]
        if result.error is not None:
            outcome.failed[name] = _cause(result.error)
        elif (result.metrics or {}).get("finished"):
            outcome.finished.append(name)
        else:
            outcome.stopped.append(name)
    return outcome


def _cause(error) -> str:
    """The last line of a trial's traceback: the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
