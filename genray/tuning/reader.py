"""The parts of a grid file, each checked."""

import itertools
import json
import math
import os
import random
import re
from pathlib import Path

from genray.config.load import DEFAULT_CONFIG, apply_overrides, read_yaml
from genray.config.model import did_you_mean
from genray.errors import ConfigError
from genray.evaluation import inputs
from genray.evaluation.job import Request
from genray.storage import expand
from genray.types import ThreatModel

SCHEDULER_KEYS = {"name", "grace_period", "reduction_factor", "max_epochs"}
EVALUATE_KEYS = {"attacks", "norms", "epsilon", "step_size", "examples", "engine", "block_size", "seed"}
LOGGER_KEYS = {"mlflow": {"tracking_uri", "experiment_name"}, "wandb": {"project", "group", "entity", "mode"}}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PBT = "none or asha, because PBT and PB2 change a run on its way, and a trial is the run of its configuration"


class Reader:
    """The parts of a grid file, each checked; problems are collected."""

    def __init__(self, source, folder, problems):
        self.source, self.folder, self.problems = source, folder, problems

    def wrong(self, key, expected, got=None, hint=""):
        shown = repr(self.source.get(key) if got is None else got)
        self.problems.append(
            f"{key}: expected {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}{hint}"
        )

    def name(self, default):
        name = self.source.get("name", default)
        name = str(name) if type(name) is int else name
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self.wrong("name", "text of letters, digits, . _ and -, at most 100", name)
            return default
        return name

    def one_of(self, key, choices, default):
        value = self.source.get(key, default)
        if value not in choices:
            self.wrong(key, f"one of {', '.join(choices)}", value, did_you_mean(value, choices))
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
                self.problems.append(
                    f"{key}.{name}: unknown key; expected one of {', '.join(sorted(known))}{did_you_mean(name, known)}"
                )
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
        text = expand(str(file))
        return text if "://" in text or os.path.isabs(text) else self.folder / text

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
        axes = self.axes()
        number = self.whole("samples", 1, 1)
        if not axes:
            if number > 1:
                self.wrong("samples", "1 without choices, uniform or loguniform", number)
            return [{}]
        draw = random.Random(self.whole("search_seed", 0, 0))
        return [_sample(draw, axes) for _ in range(number)] if not self.problems else [{}]

    def axes(self) -> dict:
        """config key -> ("choices", values), or ("uniform" or "loguniform", low, high)."""
        found = {}
        for key, values in self.section("choices").items():
            if not isinstance(values, list) or not values:
                self.wrong(f"choices.{key}", "a list of values, at least one", values)
            found[key] = ("choices", values)
        for kind in ("uniform", "loguniform"):
            for key, span in self.section(kind).items():
                low, high = (_number(value) for value in span) if _is_pair(span) else (None, None)
                if low is None or high is None or low >= high or (kind == "loguniform" and low <= 0):
                    self.wrong(
                        f"{kind}.{key}", "[low, high], low below high" + " and above 0" * (kind != "uniform"), span
                    )
                found[key] = (kind, low, high)
        return found

    def search(self):
        """Who makes the points: "grid", "random" or "optuna"."""
        random_keys = [key for key in ("choices", "uniform", "loguniform") if self.source.get(key)]
        given = self.one_of("search", ("grid", "random", "optuna"), "random" if random_keys else "grid")
        if given == "grid" and random_keys:
            self.wrong("search", f"random or optuna with {random_keys[0]}", given)
        if given != "grid" and not random_keys:
            self.wrong("search", f"choices, uniform or loguniform with {given}, for it to choose from", "none of them")
        several = [f"several {key}" for key in ("methods", "seeds") if len(self.source.get(key) or ()) > 1]
        several += ["a grid"] * bool(self.source.get("grid"))
        if given == "optuna" and several:
            self.wrong("search", "one method, one seed and no grid with optuna", " and ".join(several))
        return given

    def space(self) -> tuple:
        """(axes, number of samples, seed of the searcher) for Optuna."""
        return self.axes(), self.whole("samples", 1, 1), self.whole("search_seed", 0, 0)

    # --- how --------------------------------------------------------------------------------------------------------

    def scheduler(self):
        value = self.source.get("scheduler")
        if value in (None, "none"):
            return {}
        if value == "asha":
            return {"name": "asha"}
        if isinstance(value, str):
            self.wrong("scheduler", PBT if value.startswith("pb") else "none or asha", value)
            return {}
        section = self.section("scheduler", SCHEDULER_KEYS)
        name = section.get("name")
        if name != "asha":
            self.wrong("scheduler.name", PBT if str(name).startswith("pb") else "none or asha", name)
        for key in SCHEDULER_KEYS - {"name"}:
            number = section.get(key, 2)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                self.wrong(f"scheduler.{key}", "a whole number of at least 1", number)
        return section

    def evaluate(self):
        """(the section, what it asks for), checked as far as it goes without a model, so that no trial is trained in
        vain."""
        section = self.section("evaluate", EVALUATE_KEYS)
        for key in ("attacks", "norms"):
            if key in section and not (isinstance(section[key], list) and section[key]):
                self.wrong(f"evaluate.{key}", "a list of names", section[key])
                return {}, None
        for key in ("examples", "block_size", "seed"):
            number = section.get(key, 1)
            if isinstance(number, bool) or not isinstance(number, int) or number < (key != "seed"):
                self.wrong(f"evaluate.{key}", f"a whole number of at least {int(key != 'seed')}", number)
                return {}, None
        try:
            return section, self._request(section) if section else None
        except ConfigError as error:
            self.problems += [f"evaluate: {problem}" for problem in error.problems]
        return {}, None

    @staticmethod
    def _request(section):
        norms = section.get("norms", ["linf"])
        radii = inputs.radii(norms, section.get("epsilon"))
        threats = tuple(ThreatModel(norm, radius) for norm, radius in radii.items())
        steps = inputs.step_sizes(norms, section.get("step_size"))
        engine, size = inputs.engine_name(section.get("engine")), section.get("block_size", 100)
        request = Request(threats, tuple(section.get("attacks", ["standard"])), steps, 0, size, engine)
        for norm in norms:
            request.columns(norm)
        return request

    def loggers(self) -> dict:
        """Name -> settings of Ray's own callbacks; what opens an account stays in the environment."""
        given = self.source.get("loggers") or {}
        if isinstance(given, str) or not isinstance(given, (list, dict)):
            self.wrong("loggers", "a list or section of mlflow and wandb", given)
            return {}
        given = given if isinstance(given, dict) else {str(name): None for name in given}
        for name, settings in given.items():
            if name not in LOGGER_KEYS:
                self.problems.append(f"loggers.{name}: unknown; expected one of {', '.join(LOGGER_KEYS)}")
            elif not isinstance(settings, (dict, type(None))):
                self.wrong(f"loggers.{name}", "a section of key: value lines", settings)
            else:
                self._logger(name, settings or {})
        return {name: settings or {} for name, settings in given.items()}

    def _logger(self, name, settings):
        for key, value in settings.items():
            if key not in LOGGER_KEYS[name]:
                self.problems.append(
                    f"loggers.{name}.{key}: unknown key; expected one of {', '.join(sorted(LOGGER_KEYS[name]))}; "
                    "passwords and keys stay in the environment (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN)"
                )
            elif not isinstance(value, str):
                self.wrong(f"loggers.{name}.{key}", "text", value)
            elif "@" in value.partition("://")[2].partition("/")[0]:
                self.problems.append(
                    f"loggers.{name}.{key}: expected no user or password; they stay in the environment "
                    "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
                )


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


def _is_pair(value):
    return isinstance(value, list) and len(value) == 2


def _number(value):
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
