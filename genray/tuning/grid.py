"""Grid files. Every trial is a complete, checked run configuration before the first one starts."""

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
from genray.config.grid_file import GridFile, Method
from genray.config.load import DEFAULT_CONFIG, apply_overrides, listed_overrides, load_config, read_yaml, to_dict
from genray.config.model import collect
from genray.config.schema import RunConfig
from genray.core.user_code import allow_typed
from genray.errors import ConfigError
from genray.evaluation.inputs import EvaluationArguments
from genray.evaluation.job import Request
from genray.storage import Storage, expand

RECORD = "grid.json"  # in a grid's folder: the grid and its trials
MOST_TRIALS = 10_000
SUGGESTED = "suggested"  # in a grid's folder: trials suggested by a searcher, one file each, in order


@dataclass(frozen=True)
class Trial:
    """One run of a grid.

    Attributes:
        name: of its run folder.
        method: label of its line of `methods`, or "".
        point: config key -> value or its label, the coordinates in the grid.
        seed: of the run.
        config: of the run.
    """

    name: str
    method: str
    point: dict
    seed: int
    config: RunConfig

    def record(self) -> dict:
        """Returns the trial as plain data, for the grid's folder."""
        stated = {key: value for key, value in vars(self).items() if key != "config"}
        return {**stated, "config": to_dict(self.config)}


@dataclass(frozen=True)
class Space:
    """The space of a searcher's trials.

    Attributes:
        axes: config key -> ("choices", values), or ("uniform" or "loguniform", low, high).
        base: plain configuration that a point is applied to.
        method, seed: of every trial.
        samples: number of trials.
        search_seed: of the searcher.
    """

    axes: dict
    base: dict = field(repr=False)
    method: str
    seed: int
    samples: int
    search_seed: int

    def trial(self, number: int, point: dict) -> Trial:
        """Trial `number` (from 0) at `point`, config key -> value.

        Raises:
            ConfigError: the configuration is not valid.
        """
        labelled = {key: (value, value) for key, value in point.items()}
        return _trial(number, MOST_TRIALS, self.method, self.base, labelled, self.seed)  # a resumed one may have more

    def ends(self) -> list[dict]:
        """Returns points that together contain every choice, and of every range both ends and a value inside."""
        values = {key: axis_values(axis) for key, axis in self.axes.items()}
        first = {key: some[0] for key, some in values.items()}
        return [first, *(first | {key: value} for key, some in values.items() for value in some[1:])]

    def record(self) -> dict:
        """Returns the fields that must be equal when a search is resumed."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "samples"}


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked.

    Attributes:
        name: of the folder in the storage.
        file: the content of the file.
        trials: in starting order; with a `space`, one at each of its ends, for checks only.
        space: of the trials that Optuna suggests, or None.
        judging: `evaluate` as a `Request`, without the radii of the runs; or None.
        source: the file as plain data, for the record.
    """

    name: str
    file: GridFile
    trials: tuple[Trial, ...]
    space: Space | None
    judging: Request | None
    source: dict = field(repr=False)

    @property
    def evaluate(self) -> dict:
        """{} or arguments of `genray.evaluate`, and `examples`, for every finished run."""
        return self.file.evaluate.model_dump(mode="json", exclude_unset=True) if self.file.evaluate else {}

    @property
    def size(self) -> int:
        """Number of trials to run."""
        return self.space.samples if self.space else len(self.trials)

    def trackers(self, config: RunConfig) -> tuple[str, ...]:
        """Returns the trackers that a trial is sent to: those of the grid and of its configuration."""
        return tuple(dict.fromkeys((*self.file.loggers, *config.loggers)))

    @property
    def longest(self) -> int:
        """Epochs of the longest trial."""
        return max(trial.config.training.epochs for trial in self.trials)


def load_grid(path, overrides=()) -> Grid:
    """Reads a grid file and makes all its trials.

    Args:
        path: path or URI of the file; paths in it are relative to its folder.
        overrides: as in `apply_overrides`, applied to every trial's configuration before its point.

    Raises:
        ConfigError: with one line for every mistake; those in a trial's configuration name the trial.
    """
    path = Storage(path)
    allow_typed(overrides)
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
    source |= {"overrides": listed_overrides(overrides)}
    grid = Grid(file.name or Path(path.name).stem, file, trials, space, judging, source)
    problems = [f"{path}: {problem}" for problem in (*_metric_problems(grid), *_scheduler_problems(grid))]
    if problems:
        raise ConfigError(problems)
    return grid


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
    """Path or URI of a file that a grid file names; relative paths begin at the grid's folder."""
    text = expand(file)
    return text if "://" in text or os.path.isabs(text) else folder / text


def _judging(evaluate, problems) -> Request | None:
    """The `Request` of `evaluate`, checked as far as possible without a model, before any trial is trained."""
    if evaluate is None:
        return None
    given = {name: value for name, value in vars(evaluate).items() if value is not None and name != "examples"}
    try:
        return EvaluationArguments(**given).request()
    except ConfigError as error:
        problems += [f"evaluate: {problem}" for problem in error.problems]
        return None


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
    """A random point, with values of six digits."""
    point = {key: draw.choice(axis[1]) for key, axis in axes.items() if axis[0] == "choices"}
    point |= {key: rounded(between(axis, draw.random())) for key, axis in axes.items() if axis[0] != "choices"}
    return {key: (value, value) for key, value in point.items()}


def between(axis, at: float) -> float:
    """Returns the value at fraction `at` of a range, on its linear or logarithmic scale."""
    kind, low, high = axis
    if kind == "uniform":
        return low + at * (high - low)
    return math.exp(math.log(low) + at * (math.log(high) - math.log(low)))


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def axis_values(axis) -> list:
    """Returns all choices; for a range a value inside and both ends."""
    return list(axis[1]) if axis[0] == "choices" else [rounded(between(axis, 0.4)), *axis[1:]]


def reported(config: RunConfig) -> tuple[str, ...]:
    """Returns the metrics of theta_g that a run reports after each evaluated epoch, on the selection split."""
    return ("score", "natural", f"pgd{config.evaluation.attack.num_steps}")


def _metric_problems(grid):
    for trial in grid.trials:
        if grid.file.metric not in reported(trial.config):
            names = ", ".join(reported(trial.config))
            yield f"metric: expected what trial {trial.name} reports ({names}), got {grid.file.metric!r}"
            return


def _scheduler_problems(grid):
    """ASHA's epochs against those of the trials: no result is left if it ends every trial early."""
    scheduler, longest = grid.file.scheduler, grid.longest
    if scheduler and (scheduler.max_epochs or longest) < longest:
        most = scheduler.max_epochs
        yield f"scheduler.max_epochs: expected at least training.epochs ({longest}), got {most}, before some end"
    if scheduler and (scheduler.grace_period or 1) > longest:
        grace = scheduler.grace_period
        yield f"scheduler.grace_period: expected at most training.epochs ({longest}), got {grace}"


def _trials(methods, points, seeds, path):
    number = len(methods) * len(points) * len(seeds)
    if not 0 < number <= MOST_TRIALS:
        raise ConfigError(f"{path}: expected 1 to {MOST_TRIALS} trials, got {number}")
    trials, problems = [], {}
    for seed, (method, base), point in itertools.product(seeds, methods.items(), points):
        try:
            trials.append(_trial(len(trials), number, method, base, point, seed))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(_label(method, point, seed))
    if problems:
        raise ConfigError([f"{path}: {_of_trials(labels)}: {problem}" for problem, labels in problems.items()])
    return tuple(trials)


def _trial(place, number, method, base, point, seed) -> Trial:
    """Trial `place` of `number`: a method's plain configuration at a point, config key -> (label, value)."""
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
    """Returns the shortest endings that distinguish config keys: ["natural.lr", "linf.lr", "sync_every"]."""
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
    """Returns trial name -> record, with its configuration, of a grid folder; for a search, the trials so far.

    Args:
        storage: a `Storage` of the folder.

    Raises:
        Damaged: a file is not valid.
    """
    record = records.read(records.GridRecord, storage, RECORD)
    found, number = dict(record["trials"]), 0
    while "space" in record and storage.exists(suggested_file(number)):
        found |= records.read(records.SuggestedTrials, storage, suggested_file(number))
        number += 1
    return found


def suggested_file(number: int) -> str:
    """Returns the name of the file with the record of trial `number` of a search."""
    return f"{SUGGESTED}/{number}.json"
