"""A grid file: which runs to compare. Every trial is a whole, checked run configuration before the first one starts."""

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from genray.config.load import apply_overrides, listed_overrides, load_config, read_yaml, to_dict
from genray.config.model import did_you_mean
from genray.config.schema import RunConfig
from genray.errors import ConfigError
from genray.evaluation.job import Request
from genray.storage import Storage
from genray.tuning.reader import Reader, axis_values

KEYS = {
    "name",
    "base",
    "set",
    "methods",
    "grid",
    "choices",
    "uniform",
    "loguniform",
    "samples",
    "search",
    "search_seed",
    "seeds",
    "metric",
    "mode",
    "scheduler",
    "runtime",
    "evaluate",
    "max_failures",
    "loggers",
}
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
        scheduler: {} for none, or the settings of ASHA.
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
    scheduler: dict
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
    problems = [
        f"{key}: unknown key; a grid has {', '.join(sorted(KEYS))}{did_you_mean(key, KEYS)}"
        for key in source
        if key not in KEYS
    ]
    reader = Reader(source, path.parent, problems)
    name, methods, seeds, searcher = (
        reader.name(Path(path.name).stem),
        reader.methods(),
        reader.seeds(),
        reader.search(),
    )
    points = [{}] if searcher == "optuna" else reader.points()
    evaluate, judging = reader.evaluate()
    rest = {
        "mode": reader.one_of("mode", ("max", "min"), "max"),
        "scheduler": reader.scheduler(),
        "evaluate": evaluate,
        "judging": judging,
        "runtime": reader.one_of("runtime", ("ray", "local"), "ray"),
        "max_failures": reader.whole("max_failures", 2, 0),
        "loggers": reader.loggers(),
    }
    space = reader.space() if searcher == "optuna" else None
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    methods = {label: apply_overrides(data, overrides) for label, data in methods.items()}
    if space:
        (axes, samples, search_seed), ((method, base),) = space, methods.items()
        space = Space(axes, base, method, seeds[0], samples, search_seed)
        points = [{key: (value, value) for key, value in point.items()} for point in space.ends()]
    trials = _trials(methods, points, seeds, path)
    metric = _metric(source.get("metric", "score"), trials, path)
    return Grid(name, trials, space, metric, source=source | {"overrides": listed_overrides(overrides)}, **rest)


def reported(config: RunConfig) -> tuple[str, ...]:
    """The names a run reports after each evaluated epoch: of theta_g on what checkpoints are chosen on."""
    return ("score", "natural", f"pgd{config.evaluation.attack.num_steps}")


def _metric(metric, trials, path):
    for trial in trials:
        if metric not in reported(trial.config):
            names = ", ".join(reported(trial.config))
            raise ConfigError(f"{path}: metric: expected what trial {trial.name} reports ({names}), got {metric!r}")
    return metric


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
    """
    record = json.loads(storage.read(RECORD))
    found, number = dict(record["trials"]), 0
    while "space" in record and storage.exists(suggested_file(number)):
        found |= json.loads(storage.read(suggested_file(number)))
        number += 1
    return found


def suggested_file(number: int) -> str:
    """Where trial `number` of a search is recorded, from before it begins."""
    return f"{SUGGESTED}/{number}.json"
