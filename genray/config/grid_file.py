"""The content of a grid file of `genray.tune`, as pydantic models."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from genray.config.model import Loggers, RunName, Section, Short, Text, option
from genray.config.values import Exact, parse_fraction

PBT = "none or asha, because PBT and PB2 change a run on its way, and a trial is the run of its configuration"


def _axis(raw: Any) -> Any:
    if not isinstance(raw, (list, dict)) or not raw:
        raise ValueError
    return raw


def _range(raw: Any) -> Any:
    low, high = (float(parse_fraction(end)) for end in raw) if isinstance(raw, list) and len(raw) == 2 else (0, 0)
    if low >= high:
        raise ValueError
    return low, high


def _scheduler(raw: Any) -> Any:
    name = raw.get("name") if isinstance(raw, Mapping) else raw
    if isinstance(name, str) and name.startswith("pb"):
        raise ValueError(PBT)
    return None if raw == "none" else {"name": raw} if isinstance(raw, str) else raw


Axis = Annotated[
    Any,
    PlainValidator(_axis),
    WithJsonSchema(
        {
            "anyOf": [{"type": "array", "minItems": 1}, {"type": "object", "minProperties": 1}],
            "$comment": "a list of values or a section label: value, at least one",
        }
    ),
]
Range = Annotated[
    Any,
    PlainValidator(_range),
    WithJsonSchema({"type": "array", "minItems": 2, "maxItems": 2, "$comment": "[low, high], low below high"}),
]
Choices = Annotated[list[Any], Field(min_length=1)]
Names = Annotated[list[str], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0)]
Radii = dict[str, Exact]


class Method(Section):
    """One line of a comparison."""

    config: Text | None = option(None, "a run's configuration file; null: the grid's `base`")
    set: dict[str, Any] = option(dict, "config key: value, put into it")


class Scheduler(Section):
    """ASHA: trials that are worse than others at the same epoch end early."""

    name: Literal["asha"] = option("asha", "the only scheduler")
    grace_period: int | None = option(None, "no trial ends before; null: a quarter of a run", ge=1, unit="epochs")
    reduction_factor: int = option(2, "of the trials at a rung, one in so many goes on", ge=2)
    max_epochs: int | None = option(
        None, "rungs go up to here, at least to the end of the longest trial; null: to there", ge=1, unit="epochs"
    )


class Evaluate(Section):
    """Arguments of `genray.evaluate`, for every finished run."""

    attacks: Names = option(lambda: ["standard"], "columns or groups")
    norms: Names | None = option(None, "of linf, l2, l1; null: the run's own")
    epsilon: Radii | None = option(None, "norm: radius; null: the run's own, else the papers'")
    step_size: Radii | None = option(None, "norm: step size; null: epsilon / 4")
    examples: int | None = option(None, "the first n test images; null: all", ge=1, unit="images")
    engine: Text | None = option(None, "code of AutoAttack's members; null: the default")
    block_size: int | None = option(None, "examples a block; null: the default", ge=1, unit="images")
    seed: int = option(0, "of all random numbers", ge=0)


AMethod = Annotated[
    Method, Short({"type": ["string", "null"]}, expand=lambda raw: {"config": raw} if isinstance(raw, str) else raw)
]
Methods = Annotated[
    dict[str, AMethod],
    Field(min_length=1),
    Short(
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        expand=lambda raw: (
            {Path(str(file)).stem: file for file in raw}
            if isinstance(raw, list)
            else {str(label): method for label, method in raw.items()}
            if isinstance(raw, dict)
            else raw
        ),
    ),
]
AScheduler = Annotated[Scheduler | None, Short({"enum": ["asha", "none"]}, expand=_scheduler)]


class GridFile(Section):
    """A grid of runs to compare. Every trial is a whole run; the number of trials is that of methods, times
    points of `grid`, times samples, times seeds."""

    name: RunName | None = option(None, "of the folder below the storage; null: the file's name")
    base: Text | None = option(None, "a run's configuration file, relative to this one; null: the embedded digits run")
    set: dict[str, Any] = option(dict, "config key: value, put into every trial")
    methods: Methods | None = option(None, "label: what is compared, each a configuration file or settings")
    grid: Annotated[dict[str, Axis], Field(min_length=1)] | None = option(None, "config key: values, all combinations")
    choices: dict[str, Choices] = option(dict, "config key: values to draw from")
    uniform: dict[str, Range] = option(dict, "config key: [low, high]")
    loguniform: dict[str, Range] = option(dict, "config key: [low, high] above 0, uniform in the logarithm")
    samples: int = option(1, "draws from choices, uniform and loguniform", ge=1, unit="trials")
    search: Literal["grid", "random", "optuna"] | None = option(None, "how points are made; null: random, if drawn")
    search_seed: int = option(0, "of the draws", ge=0)
    seeds: Annotated[list[Seed], Field(min_length=1)] = option(lambda: [0], "each trial is run with each of them")
    metric: Text = option("score", "score, natural or pgdN: reported after every evaluated epoch")
    mode: Literal["max", "min"] = option("max", "what is better")
    scheduler: AScheduler = option(None, "ends trials early; null: none")
    runtime: Literal["ray", "local"] = option("ray", "local: one process a trial, for small runs")
    evaluate: Evaluate | None = option(None, "how every finished run is evaluated; null: it is not")
    max_failures: int = option(2, "how often a trial may fail and go on from its checkpoint", ge=0)
    loggers: Loggers[Literal["mlflow", "wandb"]] = option(
        (), "trackers that each trial is sent to, beside those of its configuration; settings as there"
    )

    @property
    def drawn(self) -> list[str]:
        """Names of the sections that values are drawn from."""
        return [name for name in ("choices", "uniform", "loguniform") if getattr(self, name)]

    @property
    def searcher(self) -> str:
        return self.search or ("random" if self.drawn else "grid")

    @property
    def axes(self) -> dict:
        """config key -> ("choices", values), or ("uniform" or "loguniform", low, high)."""
        found = {key: ("choices", values) for key, values in self.choices.items()}
        for kind in ("uniform", "loguniform"):
            found |= {key: (kind, *ends) for key, ends in getattr(self, kind).items()}
        return found

    def problems(self) -> Iterable[str]:
        for key, (low, high) in self.loguniform.items():
            if low <= 0:
                yield f"loguniform.{key}: expected [low, high], low below high and above 0, got {[low, high]}"
        if self.samples > 1 and not self.drawn:
            yield f"samples: expected 1 without choices, uniform or loguniform, got {self.samples}"
        if self.search == "grid" and self.drawn:
            yield f"search: expected random or optuna with {self.drawn[0]}, got 'grid'"
        if self.searcher != "grid" and not self.drawn:
            words = f"expected choices, uniform or loguniform with {self.search}, for it to choose from"
            yield f"search: {words}, got none of them"
        several = [f"several {key}" for key in ("methods", "seeds") if len(getattr(self, key) or ()) > 1]
        several += ["a grid"] * bool(self.grid)
        if self.search == "optuna" and several:
            yield f"search: expected one method, one seed and no grid with optuna, got {' and '.join(several)}"
