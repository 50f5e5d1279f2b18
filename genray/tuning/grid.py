"""A grid file: which runs to compare. Every trial is a whole, checked run configuration before the first one starts."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from genray import records
from genray.config.grid_file import GridFile, Method, Scheduler
from genray.config.load import DEFAULT_CONFIG, apply_overrides, listed_overrides, load_config, read_yaml, to_dict
from genray.config.model import collect
from genray.config.schema import RunConfig
from genray.errors import ConfigError
from genray.evaluation import inputs
from genray.evaluation.job import Request
from genray.storage import Storage, expand
from genray.types import ThreatModel

RECORD = "grid.json"  # in a grid's folder: its trials, as they were run
MOST_TRIALS = 10_000
SUGGESTED = "suggested"  # in a grid's folder: what a searcher made up, one file a trial, in order


@dataclass(frozen=True)
class Trial:
    """One run of a grid.

    Attributes:
        name: of its run folder.
        method: label of its line of `methods`, or "".
        point: config key -> value or its label, where it stands in the grid.
        seed: of the run.
        config: what is run.
    """

    name: str
    method: str
    point: dict
    seed: int
    config: RunConfig

    def record(self) -> dict:
        """As plain data, for the grid's folder."""
        stated = {key: value for key, value in vars(self).items() if key != "config"}
        return {**stated, "config": to_dict(self.config)}


@dataclass(frozen=True)
class Space:
    """Where a searcher may put its trials.

    Attributes:
        axes: config key -> ("choices", values), or ("uniform" or "loguniform", low, high).
        base: plain configuration that a point is put into.
        method, seed: of every trial.
        samples: how many trials.
        search_seed: of the searcher.
    """

    axes: dict
    base: dict = field(repr=False)
    method: str
    seed: int
    samples: int
    search_seed: int

    def trial(self, number: int, point: dict) -> Trial:
        """Trial `number` (from 0), at config key -> value.

        Raises:
            ConfigError: there is no such run.
        """
        labelled = {key: (value, value) for key, value in point.items()}
        return _trial(number, MOST_TRIALS, self.method, self.base, labelled, self.seed)  # samples may become more

    def ends(self) -> list[dict]:
        """Points that together have every choice, and of every range the ends and what is between them."""
        values = {key: axis_values(axis) for key, axis in self.axes.items()}
        first = {key: some[0] for key, some in values.items()}
        return [first, *(first | {key: value} for key, some in values.items() for value in some[1:])]

    def record(self) -> dict:
        """What has to be the same when a search is gone on with."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "samples"}


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked.

    Attributes:
        name: of the folder under the storage.
        trials: in the order in which they start; with a `space`, one at each of its ends, none of which is run.
        space: where Optuna suggests trials, or None.
        metric, mode: what is better; `metric` is reported after every evaluated epoch.
        scheduler: the settings of ASHA, or None.
        evaluate: {} or the arguments of `genray.evaluate` that every finished run is judged with.
        judging: the same as a `Request` with radii that may not be the runs', or None.
        runtime: "ray" (a trial's learners in actors of their own) or "local" (one process a trial: for small runs).
        max_failures: how often a trial may fail and go on from its checkpoint.
        loggers: "mlflow" and "wandb" -> their settings.
        source: the file as plain data, for the record.
    """

    name: str
    trials: tuple[Trial, ...]
    space: Space | None
    metric: str
    mode: str
    scheduler: Scheduler | None
    evaluate: dict
    judging: Request | None
    runtime: str
    max_failures: int
    loggers: dict
    source: dict = field(repr=False)

    @property
    def size(self) -> int:
        """Number of trials that are run."""
        return self.space.samples if self.space else len(self.trials)

    @property
    def longest(self) -> int:
        """Epochs of the longest trial."""
        return _longest(self.trials)


def load_grid(path, overrides=()) -> Grid:
    """Reads a grid file and makes all its trials.

    Args:
        path: path or URI of the file; paths in it are relative to its folder.
        overrides: as in `apply_overrides`, applied to every trial's configuration before its place in the grid.

    Raises:
        ConfigError: with one line for every mistake; those in a trial's configuration name the trial.
    """
    path = Storage(path)
    source = read_yaml(path)
    file, problems = collect(GridFile, source)
    if file is None:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    methods = _methods(file, path.parent, problems)
    judging = _judging(file.evaluate, problems)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    methods = {label: apply_overrides(data, overrides) for label, data in methods.items()}
    seeds, space = list(dict.fromkeys(file.seeds)), None
    if file.searcher == "optuna":
        ((method, base),) = methods.items()
        space = Space(file.axes, base, method, seeds[0], file.samples, file.search_seed)
        points = [{key: (value, value) for key, value in point.items()} for point in space.ends()]
    else:
        points = _points(file)
    trials = _trials(methods, points, seeds, path)
    _check_metric(file.metric, trials, path)
    if file.scheduler:
        _check_scheduler(file.scheduler, trials, path)
    return Grid(
        name=file.name or Path(path.name).stem,
        trials=trials,
        space=space,
        metric=file.metric,
        mode=file.mode,
        scheduler=file.scheduler,
        evaluate=file.evaluate.model_dump(mode="json", exclude_unset=True) if file.evaluate else {},
        judging=judging,
        runtime=file.runtime,
        max_failures=file.max_failures,
        loggers=file.loggers.model_dump(exclude_unset=True),
        source=source | {"overrides": listed_overrides(overrides)},
    )


def _methods(file, folder, problems):
    """label -> plain configuration; without `methods`, one without a label."""
    found = {}
    for label, method in (file.methods or {"": Method()}).items():
        config, settings = method.config or file.base, file.set | method.set
        try:
            data = read_yaml(DEFAULT_CONFIG if config is None else _beside(folder, config))
            found[label] = apply_overrides(data, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        except ConfigError as error:
            problems += [f"{f'methods.{label}' if label else 'base'}: {problem}" for problem in error.problems]
    return found


def _beside(folder, file):
    """Where a file named in a grid file is: relative to the grid's folder, or where its own path or URI says."""
    text = expand(file)
    return text if "://" in text or os.path.isabs(text) else folder / text


def _judging(evaluate, problems) -> Request | None:
    """What `evaluate` asks for, checked as far as it goes without a model, so that no trial is trained in vain."""
    if evaluate is None:
        return None
    norms = evaluate.norms or ["linf"]
    try:
        radii = inputs.radii(norms, evaluate.epsilon)
        threats = tuple(ThreatModel(norm, radius) for norm, radius in radii.items())
        steps = inputs.step_sizes(norms, evaluate.step_size)
        inputs.check_engine(evaluate.engine)
        size = {"block_size": evaluate.block_size} if evaluate.block_size else {}
        request = Request(threats, tuple(evaluate.attacks), steps, engine=evaluate.engine, **size)
        for norm in norms:
            request.columns(norm)
    except ConfigError as error:
        problems += [f"evaluate: {problem}" for problem in error.problems]
        return None
    return request


def _points(file) -> list[dict]:
    """config key -> (label, value): every point of the grid, times the random samples."""
    axes = {
        key: list(values.items()) if isinstance(values, dict) else [(value, value) for value in values]
        for key, values in (file.grid or {}).items()
    }
    corners = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    draw = random.Random(file.search_seed)
    samples = [_sample(draw, file.axes) for _ in range(file.samples)]
    return [corner | sample for corner in corners for sample in samples]


def _sample(draw, axes):
    """A point with a value drawn on every axis, six digits of it."""
    point = {key: draw.choice(axis[1]) for key, axis in axes.items() if axis[0] == "choices"}
    point |= {key: rounded(between(axis, draw.random())) for key, axis in axes.items() if axis[0] != "choices"}
    return {key: (value, value) for key, value in point.items()}


def between(axis, at: float) -> float:
    """The value at `at` of [0, 1] of a range, in its own measure."""
    kind, low, high = axis
    if kind == "uniform":
        return low + at * (high - low)
    return math.exp(math.log(low) + at * (math.log(high) - math.log(low)))


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def axis_values(axis) -> list:
    """All choices; of a range its ends and, first, a value between them."""
    return list(axis[1]) if axis[0] == "choices" else [rounded(between(axis, 0.4)), *axis[1:]]


def reported(config: RunConfig) -> tuple[str, ...]:
    """The names a run reports after each evaluated epoch: of theta_g on what checkpoints are chosen on."""
    return ("score", "natural", f"pgd{config.evaluation.attack.num_steps}")


def _check_metric(metric, trials, path):
    for trial in trials:
        if metric not in reported(trial.config):
            names = ", ".join(reported(trial.config))
            raise ConfigError(f"{path}: metric: expected what trial {trial.name} reports ({names}), got {metric!r}")


def _longest(trials):
    return max(trial.config.training.epochs for trial in trials)


def _check_scheduler(scheduler, trials, path):
    """Epochs of ASHA beside those of the trials: one that ends every trial before its last epoch leaves no result."""
    longest, problems = _longest(trials), []
    most, grace = scheduler.max_epochs or longest, scheduler.grace_period or 1
    if most < longest:
        problems.append(
            f"scheduler.max_epochs: expected at least training.epochs ({longest}), got {most}, before some end"
        )
    if grace > longest:
        problems.append(f"scheduler.grace_period: expected at most training.epochs ({longest}), got {grace}")
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])


def _trials(methods, points, seeds, path):
    number = len(methods) * len(points) * len(seeds)
    if not 0 < number <= MOST_TRIALS:
        raise ConfigError(f"{path}: expected 1 to {MOST_TRIALS} trials, got {number}")
    trials, problems = [], {}
    for (method, base), point, seed in itertools.product(methods.items(), points, seeds):
        try:
            trials.append(_trial(len(trials), number, method, base, point, seed))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(_label(method, point, seed))
    if problems:
        raise ConfigError([f"{path}: {_of_trials(labels)}: {problem}" for problem, labels in problems.items()])
    return tuple(trials)


def _trial(place, number, method, base, point, seed) -> Trial:
    """Trial `place` of `number`: a method's plain configuration, with config key -> (label, value)."""
    name = f"{place:0{len(str(number - 1))}d}_{_label(method, point, seed)}"[:100]
    settings = [f"{key}={json.dumps(value)}" for key, (_, value) in point.items()]
    config = load_config(apply_overrides(base, settings), {"seed": seed, "name": name})
    return Trial(name, method, {key: label for key, (label, _) in point.items()}, seed, config)


def _label(method, point, seed):
    places = [f"{short}={_text(label)}" for short, (label, _) in zip(short_names(point), point.values())]
    words = [method, *places, f"seed={seed}"]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(word for word in words if word)).strip("-._")


def _of_trials(labels):
    return f"trial {labels[0]}" + (f" and {len(labels) - 1} more" if len(labels) > 1 else "")


def short_names(keys) -> list[str]:
    """Config keys by their last parts, as few as tell them apart: ["natural.lr", "linf.lr", "sync_every"]."""
    found = []
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(other.split(".")[-count:] == parts[-count:] for other in keys) == 1:
                break
        found.append(name)
    return found


def _text(value):
    return str(value) if isinstance(value, (int, float, str)) else json.dumps(value).replace(" ", "")


def stated_trials(storage) -> dict:
    """Trial name -> its record, with its configuration, in the folder of a grid: as stated, or as suggested so far.

    Args:
        storage: a `Storage` of the folder.

    Raises:
        Damaged: a file is not what it should be.
    """
    record = records.read(records.GridRecord, storage, RECORD)
    found, number = dict(record["trials"]), 0
    while "space" in record and storage.exists(suggested_file(number)):
        found |= records.read(records.SuggestedTrials, storage, suggested_file(number))
        number += 1
    return found


def suggested_file(number: int) -> str:
    """Where trial `number` of a search is recorded, from before it begins."""
    return f"{SUGGESTED}/{number}.json"
