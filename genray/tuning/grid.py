"""A grid file: which runs to compare. Every trial is a whole, checked run configuration before the first one starts."""

import dataclasses
import itertools
import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from genray.config.load import DEFAULT_CONFIG, apply_overrides, load_config, read_yaml
from genray.config.schema import RunConfig
from genray.errors import ConfigError
from genray.evaluation import inputs
from genray.evaluation.job import Request
from genray.types import ThreatModel

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
    "search_seed",
    "seeds",
    "metric",
    "mode",
    "scheduler",
    "runtime",
    "evaluate",
    "max_failures",
}
SCHEDULER_KEYS = {"name", "grace_period", "reduction_factor", "max_epochs"}
EVALUATE_KEYS = {"attacks", "norms", "epsilon", "step_size", "examples", "engine", "block_size", "seed"}
RECORD = "grid.json"  # in a grid's folder: its trials, as they were run
MOST_TRIALS = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked.

    Attributes:
        name: of the folder under the storage.
        trials: in the order in which they start.
        metric, mode: what is better; `metric` is reported after every evaluated epoch.
        scheduler: {} for none, or the settings of ASHA.
        evaluate: {} or the arguments of `genray.evaluate` that every finished run is judged with.
        runtime: "ray" (a trial's learners in actors of their own) or "local" (one process a trial: for small runs).
        max_failures: how often a trial may fail and go on from its checkpoint.
        source: the file as plain data, for the record.
    """

    name: str
    trials: tuple[Trial, ...]
    metric: str
    mode: str
    scheduler: dict
    evaluate: dict
    runtime: str
    max_failures: int
    source: dict = field(repr=False)


def load_grid(path, overrides=()) -> Grid:
    """Reads a grid file and makes all its trials.

    Args:
        path: of the file; paths in it are relative to its folder.
        overrides: "key=value" strings, applied to every trial's configuration before its place in the grid.

    Raises:
        ConfigError: with one line for every mistake; those in a trial's configuration name the trial.
    """
    path = Path(path)
    source = read_yaml(path)
    problems = [f"{key}: unknown key; a grid has {', '.join(sorted(KEYS))}" for key in source if key not in KEYS]
    reader = _Reader(source, path.parent, problems)
    name = reader.name(path.stem)
    methods, points, seeds = reader.methods(), reader.points(), reader.seeds()
    rest = {
        "mode": reader.one_of("mode", ("max", "min"), "max"),
        "scheduler": reader.scheduler(),
        "evaluate": reader.evaluate(),
        "runtime": reader.one_of("runtime", ("ray", "local"), "ray"),
        "max_failures": reader.whole("max_failures", 2, 0),
    }
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    methods = {label: apply_overrides(data, overrides) for label, data in methods.items()}
    trials = _trials(methods, points, seeds, path)
    return Grid(
        name,
        trials,
        _metric(source.get("metric", "score"), trials, path),
        source=source | {"overrides": list(overrides)},
        **rest,
    )


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
    trials, problems, width = [], {}, len(str(number - 1))
    for (method, base), point, seed in itertools.product(methods.items(), points, seeds):
        labels = {key: label for key, (label, _) in point.items()}
        places = [f"{short}={_text(label)}" for short, label in zip(short_names(labels), labels.values())]
        words = [method, *places, f"seed={seed}"]
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(word for word in words if word)).strip("-._")
        name = f"{len(trials):0{width}d}_{label}"[:100]
        try:
            settings = [f"{key}={json.dumps(value)}" for key, (_, value) in point.items()]
            config = load_config(apply_overrides(base, settings), [f"seed={seed}", f"name={name}"])
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(label)
            continue
        trials.append(Trial(name, method, labels, seed, config))
    if problems:
        raise ConfigError([f"{path}: {_of_trials(labels)}: {problem}" for problem, labels in problems.items()])
    return tuple(trials)


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


class _Reader:
    """The parts of a grid file, each checked; problems are collected."""

    def __init__(self, source, folder, problems):
        self.source, self.folder, self.problems = source, folder, problems

    def wrong(self, key, expected, got=None):
        shown = repr(self.source.get(key) if got is None else got)
        self.problems.append(f"{key}: expected {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")

    def name(self, default):
        name = self.source.get("name", default)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self.wrong("name", "text of letters, digits, . _ and -, at most 100", name)
            return default
        return name

    def one_of(self, key, choices, default):
        value = self.source.get(key, default)
        if value not in choices:
            self.wrong(key, f"one of {', '.join(choices)}", value)
        return value

    def whole(self, key, default, least):
        value = self.source.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.wrong(key, f"a whole number of at least {least}", value)
            return default
        return value

    def section(self, key, known=None):
        value = self.source.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(key, "a section of key: value lines", value)
            return {}
        for name in value:
            if known is not None and name not in known:
                self.problems.append(f"{key}.{name}: unknown key; expected one of {', '.join(sorted(known))}")
        return value

    def seeds(self):
        seeds = self.source.get("seeds", [0])
        good = isinstance(seeds, list) and seeds
        if not good or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
            self.wrong("seeds", "a list of whole numbers, at least one", seeds)
            return [0]
        return list(dict.fromkeys(seeds))

    # --- which configurations ---------------------------------------------------------------------------------------

    def methods(self) -> dict:
        """label -> plain configuration."""
        common = self.section("set")
        given = self.source.get("methods")
        if given is None:
            return {"": self._read(self.source.get("base"), common, "base")}
        if isinstance(given, list):
            given = {Path(str(file)).stem: file for file in given}
        if not isinstance(given, dict) or not given:
            self.wrong("methods", "a list of config files or a section label: file or settings", given)
            return {"": {}}
        return {str(label): self._method(label, value, common) for label, value in given.items()}

    def _method(self, label, value, common):
        where = f"methods.{label}"
        if isinstance(value, str):
            return self._read(value, common, where)
        if value is not None and (not isinstance(value, dict) or set(value) - {"config", "set"}):
            self.wrong(where, "a config file, or a section with config: and set:", value)
            return {}
        value = value or {}
        own = value.get("set") or {}
        if not isinstance(own, dict):
            self.wrong(f"{where}.set", "a section of key: value lines", own)
            own = {}
        return self._read(value.get("config", self.source.get("base")), common | own, where)

    def _read(self, file, settings, where):
        try:
            data = read_yaml(DEFAULT_CONFIG if file is None else self._path(file))
            return apply_overrides(data, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        except ConfigError as error:
            self.problems += [f"{where}: {problem}" for problem in error.problems]
        except TypeError as error:
            self.problems.append(f"{where}: expected plain values, got {error}")
        return {}

    def _path(self, file):
        return self.folder / str(file)

    # --- where in the space -----------------------------------------------------------------------------------------

    def points(self) -> list[dict]:
        """config key -> (label, value): every point of the grid, times the random samples."""
        grid = self.section("grid")
        if "grid" in self.source and self.source["grid"] in ({}, None):
            self.wrong("grid", "at least one config key with a list of values", self.source["grid"])
        for key, values in grid.items():
            if not isinstance(values, (list, dict)) or not values:
                self.wrong(f"grid.{key}", "a list of values or a section label: value, at least one", values)
                return [{}]
        axes = [list(v.items()) if isinstance(v, dict) else [(value, value) for value in v] for v in grid.values()]
        corners = [dict(zip(grid, values)) for values in itertools.product(*axes)]
        samples = self._samples()
        return [corner | sample for corner in corners for sample in samples]

    def _samples(self):
        choices, spans = self.section("choices"), {}
        for kind in ("uniform", "loguniform"):
            for key, span in self.section(kind).items():
                low, high = (_number(value) for value in span) if _is_pair(span) else (None, None)
                if low is None or high is None or low >= high or (kind == "loguniform" and low <= 0):
                    self.wrong(
                        f"{kind}.{key}", "[low, high], low below high" + " and above 0" * (kind != "uniform"), span
                    )
                else:
                    spans[key] = (kind, low, high)
        for key, values in choices.items():
            if not isinstance(values, list) or not values:
                self.wrong(f"choices.{key}", "a list of values, at least one", values)
        number = self.whole("samples", 1, 1)
        if not (choices or spans):
            if number > 1:
                self.wrong("samples", "1 without choices, uniform or loguniform", number)
            return [{}]
        draw = random.Random(self.whole("search_seed", 0, 0))
        return [self._sample(draw, choices, spans) for _ in range(number)] if not self.problems else [{}]

    @staticmethod
    def _sample(draw, choices, spans):
        point = {key: draw.choice(values) for key, values in choices.items()}
        for key, (kind, low, high) in spans.items():
            at = draw.random()
            log = math.log(low) + at * (math.log(high) - math.log(low)) if kind == "loguniform" else 0
            point[key] = float(f"{math.exp(log) if kind == 'loguniform' else low + at * (high - low):.6g}")
        return {key: (value, value) for key, value in point.items()}

    # --- how --------------------------------------------------------------------------------------------------------

    def scheduler(self):
        value = self.source.get("scheduler")
        if value in (None, "none"):
            return {}
        if value == "asha":
            return {"name": "asha"}
        section = self.section("scheduler", SCHEDULER_KEYS)
        if section.get("name") != "asha":
            self.wrong("scheduler.name", "none or asha", section.get("name"))
        for key in SCHEDULER_KEYS - {"name"}:
            number = section.get(key, 2)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                self.wrong(f"scheduler.{key}", "a whole number of at least 1", number)
        return section

    def evaluate(self):
        """Checked as far as it goes without a model, so that no trial is trained in vain."""
        section = self.section("evaluate", EVALUATE_KEYS)
        for key in ("attacks", "norms"):
            if key in section and not (isinstance(section[key], list) and section[key]):
                self.wrong(f"evaluate.{key}", "a list of names", section[key])
                return {}
        for key in ("examples", "block_size", "seed"):
            number = section.get(key, 1)
            if isinstance(number, bool) or not isinstance(number, int) or number < (key != "seed"):
                self.wrong(f"evaluate.{key}", f"a whole number of at least {int(key != 'seed')}", number)
                return {}
        try:
            norms = section.get("norms", ["linf"])
            radii = inputs.radii(norms, section.get("epsilon"))
            threats = tuple(ThreatModel(norm, radius) for norm, radius in radii.items())
            steps = inputs.step_sizes(norms, section.get("step_size"))
            engine = inputs.engine_name(section.get("engine"))
            request = Request(threats, tuple(section.get("attacks", ["standard"])), steps, 0, 100, engine)
            for norm in norms:
                request.columns(norm)
        except ConfigError as error:
            self.problems += [f"evaluate: {problem}" for problem in error.problems]
        return section


def _is_pair(value):
    return isinstance(value, list) and len(value) == 2


def _number(value):
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def plain(trial: Trial) -> dict:
    """What a table says of a trial besides its numbers."""
    return {key: value for key, value in dataclasses.asdict(trial).items() if key != "config"}
