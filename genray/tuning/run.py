"""Runs a grid: what fits the cluster runs at the same time, the rest waits; Tune does the scheduling."""

import json
import os
import time
from dataclasses import dataclass, field

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from genray.config import to_dict
from genray.errors import PlacementError, RunFolderError
from genray.learners.setup import prepare
from genray.recording import Progress
from genray.recording.storage import Storage
from genray.runtime.placement import trial_bundles
from genray.tuning.grid import RECORD, Grid, plain
from genray.tuning.trial import run_trial

VISIBLE_TIMEOUT_S = 120


@dataclass
class Outcome:
    """Attributes:
    finished, stopped: names of the trials that ran to their end, and that the scheduler stopped.
    failed: name -> error in one line.
    """

    finished: list = field(default_factory=list)
    stopped: list = field(default_factory=list)
    failed: dict = field(default_factory=dict)


def bundles(grid: Grid, num_gpus: float) -> dict:
    """Trial name -> its bundles, the trial's own first.

    Args:
        num_gpus: of the cluster.
    """
    made, found = {}, {}
    for trial in grid.trials:  # many trials, few kinds: the data is read once a kind
        kind = json.dumps([to_dict(trial.config)[key] for key in ("data", "model", "base_learners", "device")])
        if kind not in made:
            setup = prepare(trial.config)
            local = grid.runtime == "local"
            made[kind] = (
                [_alone(setup.config, num_gpus)] if local else trial_bundles(setup.plan, setup.weight_bytes, num_gpus)
            )
        found[trial.name] = made[kind]
    return found


def _alone(config, num_gpus):
    """The one bundle of a trial that trains its learners one after another."""
    gpu = {"GPU": 1.0} if num_gpus and config.device != "cpu" else {}
    return {"CPU": float(max(learner.resources.num_cpus for learner in config.base_learners.values())), **gpu}


def open_folder(grid: Grid, storage: str, resume: bool) -> str:
    """The folder of a grid's runs, with its record in place.

    Raises:
        RunFolderError: a grid of this name is there and `resume` is off, or it is another grid.
    """
    place = Storage(f"{storage.rstrip('/')}/{grid.name}")
    place.check_writable()
    record = {"source": grid.source, "trials": {t.name: {**plain(t), "config": to_dict(t.config)} for t in grid.trials}}
    record = json.loads(json.dumps(record, default=str))
    if place.exists(RECORD):
        if not resume:
            raise RunFolderError(f"{place.uri}: a grid of this name exists; give it another name, or --resume")
        before = json.loads(place.read(RECORD))
        if before.get("trials") != record["trials"]:
            raise RunFolderError(f"{place.uri}: cannot resume another grid: its trials differ from those in {RECORD}")
    else:
        place.write(RECORD, json.dumps(record, indent=1).encode())
    return place.uri


def run_grid(grid: Grid, folder: str, *, train, evaluate, joined: bool, max_concurrent: int | None = None) -> Outcome:
    """Runs the trials that are not finished, on the Ray that is connected.

    Args:
        grid: the grid.
        folder: of its runs, as `open_folder` gave it.
        train, evaluate: as in `run_trial`.
        joined: the cluster is not our own, so it may grow.
        max_concurrent: at most so many trials at once; None for what fits.

    Raises:
        PlacementError: a trial's bundles do not fit the cluster, or a node does not see the folder.
    """
    wanted = bundles(grid, ray.cluster_resources().get("GPU", 0))
    check_fits(wanted, patience_s=grid.trials[0].config.runtime.startup_timeout_s if joined else 0)
    check_visible(folder)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the command, and --resume goes on
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    watch = _Watch(grid)
    try:
        found = _tuner(grid, folder, wanted, watch, train, evaluate, max_concurrent).fit()
    finally:
        watch.progress.close()
    return _outcome(found)


def _tuner(grid, folder, wanted, watch, train, evaluate, max_concurrent):
    configs = {trial.name: to_dict(trial.config) for trial in grid.trials}
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
        return tune.PlacementGroupFactory(wanted[name], strategy=strategies[name])

    points = [{"trial": t.name, "method": t.method, "seed": t.seed, **t.point} for t in grid.trials]
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"point": tune.grid_search(points)},
        tune_config=tune.TuneConfig(
            metric=grid.metric,
            mode=grid.mode,
            scheduler=_scheduler(grid),
            max_concurrent_trials=max_concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=f"attempt_{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=f"{folder if '://' in folder else os.path.abspath(folder)}/tune",
            failure_config=tune.FailureConfig(max_failures=grid.max_failures),
            callbacks=[watch],
            verbose=0,
        ),
    )


def _name(trial):
    return trial.config["point"]["trial"]


def _scheduler(grid):
    """ASHA (Li et al., 1810.05934) over epochs, or none."""
    if not grid.scheduler:
        return None
    longest = max(trial.config.training.epochs for trial in grid.trials)
    return ASHAScheduler(
        time_attr="epoch",
        max_t=grid.scheduler.get("max_epochs", longest + 1),  # a run's last epoch is not its end: it is judged then
        grace_period=grid.scheduler.get("grace_period", max(1, longest // 4)),
        reduction_factor=grid.scheduler.get("reduction_factor", 2),
    )


class _Watch(tune.Callback):
    """Shows what a user wants to see of a grid: how far it is, which trial ended how, and what is left."""

    def __init__(self, grid):
        self.number = len(grid.trials)
        self.epochs = {trial.name: trial.config.training.epochs for trial in grid.trials}
        self.done, self.ended = dict.fromkeys(self.epochs, 0), 0
        self.progress = Progress()
        self.progress.phase(f"{self.number} trials,", sum(self.epochs.values()), unit="epochs")

    def __getstate__(self):  # Tune keeps a copy of it on disk, where a terminal has no place
        return {name: value for name, value in vars(self).items() if name != "progress"}

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.done[_name(trial)] = max(self.done[_name(trial)], result.get("epoch", 0))
        self.progress.steps(sum(self.done.values()))

    def on_trial_complete(self, iteration, trials, trial, **info):
        result = trial.last_result or {}
        self.done[_name(trial)] = self.epochs[_name(trial)]
        self._end(trial, "finished" if result.get("finished") else f"stopped at epoch {result.get('epoch', 0)}", result)

    def on_trial_error(self, iteration, trials, trial, **info):
        self._end(trial, "failed", {})

    def _end(self, trial, how, result):
        self.ended += 1
        rates = [f"{k.replace('_', ' ')} {100 * v:.2f} %" for k, v in result.items() if k.startswith("test_")]
        self.progress.say(f"[{self.ended}/{self.number}] {_name(trial)} {how}  {', '.join(rates)}".rstrip())
        self.progress.steps(sum(self.done.values()))


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


# --- before the first trial -------------------------------------------------------------------------------------------


def check_fits(wanted: dict, patience_s: float = 0):
    """Whether each trial fits the cluster when it has all of it.

    Args:
        wanted: trial name -> bundles.
        patience_s: how long to wait for an autoscaler where one does not fit.

    Raises:
        PlacementError: names the first trial that does not, what it wants and what is there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, trial in wanted.items():
        each_fits = all(any(_holds(node, bundle) for node in nodes) for bundle in trial)
        fits = each_fits and _holds(_sum(nodes), _sum(trial))
        if not fits and not (patience_s and _grows(trial, patience_s)):
            text = ", ".join(f"{_sum(trial).get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
            there = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
            raise PlacementError(
                f"trial {name}: wants {text} in bundles of one learner each, the cluster has {len(nodes)} nodes "
                f"({there}); lower base_learners.<name>.resources, or add nodes"
            )


def _grows(trial, patience_s):
    """Whether the cluster makes room for a trial when it is asked to."""
    group = placement_group(trial)
    try:
        return bool(ray.wait([group.ready()], timeout=patience_s)[0])
    finally:
        remove_placement_group(group)


def _holds(node, bundle):
    return all(node.get(kind, 0) >= amount for kind, amount in bundle.items())


def _sum(parts):
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in {k for part in parts for k in part}}


def check_visible(folder: str):
    """Whether every node can write where the runs go.

    Raises:
        PlacementError: names the nodes that cannot.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or "://" in folder:
        return
    folder = os.path.abspath(folder)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[node["NodeManagerAddress"]] = _sees.options(num_cpus=0, scheduling_strategy=strategy).remote(folder)
    blind = [address for address, ref in asked.items() if not ray.get(ref, timeout=VISIBLE_TIMEOUT_S)]
    if blind:
        raise PlacementError(
            f"--storage {folder}: expected a folder that every node sees, {', '.join(blind)} do not; use a shared file "
            "system or a URI such as s3://bucket/prefix"
        )


@ray.remote
def _sees(folder):
    return os.path.exists(os.path.join(folder, RECORD)) and os.access(folder, os.W_OK)
