"""Runs a grid with Ray Tune, as many trials at the same time as fit the cluster."""

import json
import logging
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from genray import records
from genray.config import to_dict
from genray.errors import GenrayError, RunFolderError
from genray.storage import Storage
from genray.tuning.checks import check_fits, check_visible
from genray.tuning.grid import RECORD, SUGGESTED, Grid, stated_trials
from genray.tuning.resources import Needs
from genray.tuning.search import suggestions
from genray.tuning.tracking import TrackerCallback
from genray.tuning.trial import run_trial
from genray.tuning.watch import TrialCallback, cause, trial_name


@dataclass
class GridOutcome:
    """Attributes:
    finished: names of the trials that ran to their end.
    stopped: name -> the epoch at which the scheduler stopped the trial.
    failed: name -> error in one line.
    """

    finished: list = field(default_factory=list)
    stopped: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)


def check_folder(grid: Grid, storage: Any, resume: bool, overwrite: bool) -> Storage:
    """Checks the folder of a grid's runs.

    Raises:
        RunFolderError: it cannot be written; or it holds a grid without `resume` or `overwrite`; or another grid is to
            be resumed; or a folder that is no grid is to be overwritten.
    """
    place = Storage(storage) / grid.name
    place.check_writable()
    if not place.exists(RECORD):
        return place
    if not resume and not overwrite:
        raise RunFolderError(f"{place}: a grid of this name exists; give it another name, --resume or --overwrite")
    try:
        before = records.read(records.GridRecord, place, RECORD)
    except records.Damaged as error:
        raise RunFolderError(f"{place}: {error}") from None
    if resume and any(before.get(key) != _record(grid).get(key) for key in ("trials", "space")):
        raise RunFolderError(
            f"{place}: cannot resume another grid: its trials differ from those in {RECORD}; --overwrite begins anew"
        )
    return place


def begin_folder(grid: Grid, place: Storage, overwrite: bool) -> str:
    """Writes the grid's record into its folder, after removing an earlier grid to overwrite; returns the absolute path
    or URI."""
    place.remove_unfinished()
    if overwrite and place.exists(RECORD):
        for name in [*stated_trials(place), "tune", SUGGESTED]:
            if place.exists(name):
                place.delete(name)
    if overwrite or not place.exists(RECORD):
        place.write(RECORD, json.dumps(_record(grid), indent=1).encode())
    return place.absolute  # each trial has a working directory of its own


def _record(grid):
    trials = {} if grid.space else {trial.name: trial.record() for trial in grid.trials}
    record = {"source": grid.source, "trials": trials, **({"space": grid.space.record()} if grid.space else {})}
    return json.loads(json.dumps(record, default=str))


def check_room(needs: Needs, joined: bool):
    """Checks that each trial fits the connected Ray.

    Args:
        needs: of the grid.
        joined: the cluster is not a private Ray, so it may grow.

    Raises:
        PlacementError: a trial does not fit.
    """
    wanted = needs.bundles(ray.cluster_resources().get("GPU", 0))
    patience_s = needs.grid.trials[0].config.runtime.startup_timeout_s if joined else 0
    check_fits(wanted, needs.selectors(), patience_s)


def run_grid(needs: Needs, folder: str, *, train, evaluate, max_concurrent=None, debug=False) -> GridOutcome:
    """Runs the unfinished trials on the connected Ray.

    Args:
        needs: of the grid.
        folder: of its runs, the result of `begin_folder`.
        train, evaluate: as in `run_trial`.
        max_concurrent: at most so many trials at once; None for as many as fit.
        debug: show Tune's own report of a failed trial.

    Raises:
        PlacementError: a node cannot use the folder.
    """
    wanted = needs.bundles(ray.cluster_resources().get("GPU", 0))
    check_visible(folder)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the command; --resume continues
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = str(int(debug))
    watch = TrialCallback(needs, folder)
    try:
        with _quiet(not debug):
            found = _tuner(needs, folder, wanted, watch, train, evaluate, max_concurrent).fit()
    finally:
        watch.progress.close()
    return _outcome(found)


@contextmanager
def _quiet(wanted):
    """Silences Tune's log: genray prints each failure as one line."""
    log, before = logging.getLogger("ray.tune"), logging.getLogger("ray.tune").level
    if wanted:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _tuner(needs, folder, wanted, watch, train, evaluate, max_concurrent):
    grid, selectors = needs.grid, needs.selectors()
    first = grid.trials[0]
    configs = {} if grid.space else {trial.name: to_dict(trial.config) for trial in grid.trials}
    strategies = {trial.name: trial.config.runtime.placement.upper() for trial in grid.trials}
    trainable = tune.with_parameters(
        run_trial,
        configs=configs,
        storage=folder,
        runtime=grid.file.runtime,
        train=train,
        evaluate=evaluate,
        judged_by=grid.evaluate,
    )

    def resources(config):
        name = config["point"]["trial"]
        alike = name if name in wanted else first.name  # all suggested trials have the same resources
        labels = {"bundle_label_selector": selectors[alike]}
        return tune.PlacementGroupFactory(wanted[alike], strategy=strategies[alike], **labels)

    points = [{"trial": t.name, "method": t.method, "seed": t.seed, **t.point} for t in grid.trials]
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space=None if grid.space else {"point": tune.grid_search(points)},
        tune_config=tune.TuneConfig(
            metric=grid.file.metric,
            mode=grid.file.mode,
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
            failure_config=tune.FailureConfig(max_failures=grid.file.max_failures),
            callbacks=[watch, TrackerCallback(grid, folder, watch.progress.say)],
            verbose=0,
        ),
    )


def _scheduler(grid):
    """ASHA (Li et al., 1810.05934) over epochs, or none."""
    if not grid.file.scheduler:
        return None
    longest = grid.longest
    return ASHAScheduler(
        time_attr="epoch",
        max_t=(grid.file.scheduler.max_epochs or longest) + 1,  # it is evaluated after its last epoch
        grace_period=grid.file.scheduler.grace_period or max(1, longest // 4),
        reduction_factor=grid.file.scheduler.reduction_factor,
    )


def _outcome(found) -> GridOutcome:
    outcome = GridOutcome()
    for result in found:
        name = result.config["point"]["trial"]
        if result.error is not None:
            outcome.failed[name] = cause(result.error)
        elif (result.metrics or {}).get("finished"):
            outcome.finished.append(name)
        else:
            outcome.stopped[name] = (result.metrics or {}).get("epoch", 0)
    return outcome


def check_ended(outcome, size):
    """Raises GenrayError if a trial failed or none finished."""
    if outcome.failed:
        name, reason = next(iter(outcome.failed.items()))
        raise GenrayError(
            f"{len(outcome.failed)} of {size} trials failed, first {name}: {reason}; --resume tries again"
        )
    if not outcome.finished:
        ends = "; ".join(f"{name} was stopped at epoch {epoch}" for name, epoch in list(outcome.stopped.items())[:3])
        raise GenrayError(f"none of {size} trials was finished, so that there is no result: {ends or 'none began'}")
