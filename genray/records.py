"""Every record that genray writes as JSON and reads back, and one line for what does not fit.

A record may have other fields too, as newer versions write them. Older versions did not write the fields that have a
default.
"""

import json
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, RootModel, WithJsonSchema

from genray.config.model import Described, collect, wrong
from genray.errors import InputError, one_line
from genray.types import ball_names


class Damaged(InputError):
    """A file is not a valid record; the message is one line: the field, what was expected and what came."""


def _fraction(words, fits):
    """An exact number as text, short enough for `Fraction` not to work for hours."""

    def read(text):
        try:
            if len(text) < 40 and "e" not in text.lower() and fits(Fraction(text)):
                return text
        except ZeroDivisionError:
            pass
        raise ValueError

    return Annotated[str, AfterValidator(read), WithJsonSchema({"type": "string", "$comment": words})]


T = TypeVar("T")
Named = dict[str, T]
Finite = Annotated[float, Field(allow_inf_nan=False), WithJsonSchema({"type": "number", "$comment": "a finite number"})]
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Radius = _fraction("a number above 0 as text, such as 8/255", lambda number: 0 < number < 10_000)
Share = _fraction("a number from 0 to 1 as text", lambda number: 0 <= number <= 1)


class Record(Described):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class AccuracyRecord(Record):
    """An accuracy with its interval, all fractions."""

    value: Rate
    low: Rate
    high: Rate
    examples: Positive
    per_class: Named[Rate] = {}

    def problems(self):
        if not self.low <= self.value <= self.high:
            yield wrong("value", f"a number from {self.low} to {self.high}", self.value)


Columns = Named[AccuracyRecord]


class BallRecord(Record):
    """A threat model; epsilon exact and as a decimal."""

    norm: str
    epsilon: Radius  # type: ignore[valid-type]  # pydantic reads the annotation
    epsilon_decimal: Finite


# --- a run ------------------------------------------------------------------------------------------------------------


class RunBall(BallRecord):
    threat_model: str = ""
    step_size: str = ""
    step_size_decimal: Finite = 0


class ExtraRecord(Record):
    """Training images beside the data set's own."""

    source: str
    examples: Positive
    pseudo_labelled: int
    batch_share: Finite | None


class RunProtocol(RunBall):
    data: str
    fingerprint: str = ""
    extra: ExtraRecord | None = None
    split: str = "test"
    examples: int
    threat_model: str
    num_steps: int = 0
    other_norms: Named[RunBall] = {}
    attack: str
    selected_on: str
    interval: str = ""


class RunResults(Record):
    """`results.json` of a run: the accuracies of all its models on the test images."""

    models: Named[Columns]
    protocol: RunProtocol
    best_epoch: int
    versions: Named[Any]
    seed: int
    wall_s: Finite
    warnings: list[str] = []

    def problems(self):
        found, others = self.models.get("global", {}), self.protocol.other_norms
        for name in ("natural", *others):
            if name not in found:
                yield f"models.global.{name}: missing"
        if not found.keys() - others.keys() - {"natural", "union"}:
            yield wrong("models.global", "an accuracy under protocol.attack", [*found])


RADII = ("radius_mean", "radius_spread")  # of `WindowStats`, with a radius per example
TIMES = ("seconds", "attack_seconds", "averaging_seconds", "transfer_seconds", "waiting_seconds")  # of `WindowStats`


class LearnerEpoch(Record):
    """A learner's numbers of an epoch; accuracies of its own model are called after what they were measured on."""

    loss: float | None = None
    train_accuracy: float | None = None
    learning_rate: float | None = None
    rollbacks: int = 0
    seconds: Finite = 0
    attack_seconds: Finite | None = None
    averaging_seconds: Finite = 0
    transfer_seconds: Finite = 0
    waiting_seconds: Finite = 0
    radius_mean: Finite | None = None
    radius_spread: Finite | None = None
    __pydantic_extra__: dict[str, float]

    def problems(self):
        for name in TIMES if self.attack_seconds is not None else ():
            if name not in self.model_fields_set:
                yield f"{name}: missing"


class EpochRecord(Record):
    """A line of `metrics.jsonl`."""

    epoch: int
    step: int = 0
    wall_s: Finite
    redistributions: int
    learners: Named[LearnerEpoch]
    mixing_weights: Named[Finite]
    global_: Named[Rate] | None = Field(alias="global")
    best_epoch: int
    warnings: list[str] = []


class IdentityRecord(Record):
    """Images by their fingerprint, or a file by its hash. `broken` are image files that are left out because they
    cannot be decoded."""

    examples: int | None = None
    fingerprint: str | None = None
    broken: list[str] = []
    path: str | None = None
    sha256: str | None = None

    def problems(self):
        if None in (self.examples, self.fingerprint) and None in (self.path, self.sha256):
            name = "examples" if self.examples is None else "fingerprint"
            yield f"{name}: missing, expected examples and fingerprint of images, or path and sha256 of a file"


class DataRecord(RootModel[Named[IdentityRecord]]):
    """`data.json`: which images a run is on, a part each, and which files of weights it began with."""


class TrackedRuns(RootModel[Named[str]]):
    """`trackers.json`: the ids of the run in MLflow and Weights & Biases, by the names of `loggers`."""


# --- an evaluation ----------------------------------------------------------------------------------------------------


class AttackRecord(Record):
    name: str
    norm: str = ""
    epsilon: Finite = 0
    loss: str = ""
    num_steps: int
    step_size: Finite | None = None
    restarts: int | None = None
    passes: int | None = None
    queries: int | None = None
    notes: list[str]


class AttackedBall(BallRecord):
    attacks: list[AttackRecord]


class EvaluatedData(Record):
    source: str
    split: str = ""
    examples: int
    fingerprint: str = ""


class EvaluationProtocol(Record):
    """The protocol of an evaluation; `engines` is the engine of each column in each norm."""

    data: EvaluatedData
    threats: Annotated[list[AttackedBall], Field(min_length=1)]
    seed: int
    block_size: int = 0
    engine: str
    num_classes: int = 0
    interval: str = ""
    hash: str
    engines: Named[Named[str]] = {}
    versions: Named[Any] = {}


class EvaluationRequest(Record):
    """`request.json` of an evaluation: its arguments, and fingerprints of the model and the images."""

    protocol: EvaluationProtocol | None = None
    model: str
    images: str = ""
    predictions: str = ""


class NormRecord(Record):
    columns: Columns
    union: AccuracyRecord | None = None
    findings: list[str]


class EvaluationRecord(Record):
    """`results.json` of an evaluation."""

    natural: AccuracyRecord
    norms: Named[NormRecord]
    findings: list[str]
    union: AccuracyRecord | None = None
    protocol: EvaluationProtocol

    def problems(self):
        threats = self.protocol.threats
        for ball, threat in zip(ball_names({"norm": t.norm, "epsilon": t.epsilon} for t in threats), threats):
            columns = self.norms[ball].columns if ball in self.norms else {}
            for attack in threat.attacks:
                if attack.name not in columns:
                    yield f"norms.{ball}.columns.{attack.name}: missing"


# --- mixtures ---------------------------------------------------------------------------------------------------------


class MixtureRow(Record):
    kind: str
    name: str
    weights: Named[Share] | None  # type: ignore[valid-type]
    natural: AccuracyRecord
    columns: Named[Columns]
    robust: AccuracyRecord
    findings: list[str]
    pareto: bool = False


class MixtureSplit(Record):
    protocol: EvaluationProtocol
    rows: list[MixtureRow]

    def problems(self):
        mixtures = [row for row in self.rows if row.kind == "mixture"]
        columns = self.rows[0].columns if mixtures else {}
        if not columns or not all(columns.values()):
            yield "rows: expected mixtures with at least one attack, got none"
        for number, row in enumerate(self.rows):
            for norm, name in ((norm, name) for norm, of in columns.items() for name in of):
                if name not in row.columns.get(norm, {}):
                    yield f"rows[{number}].columns.{norm}.{name}: missing"
            if row.kind == "mixture" and (row.weights is None or "pareto" not in row.model_fields_set):
                yield f"rows[{number}].{'weights' if row.weights is None else 'pareto'}: missing"


class MixtureResults(Record):
    """`results.json` of mixtures: a row a model of each split."""

    run: str
    data: str
    learners: list[str]
    gamma_of: str | None
    step: int = 0
    total_steps: int = 0
    batch_norm: Literal["mix", "reestimate"]
    norms: list[str]
    chosen: str | None
    theta_g_selected_on: str
    splits: Named[MixtureSplit]

    def problems(self):
        for split, part in self.splits.items():
            for number, row in enumerate(part.rows):
                if row.kind == "mixture" and self.gamma_of is not None and self.gamma_of not in row.weights:
                    yield f"splits.{split}.rows[{number}].weights.{self.gamma_of}: missing"


# --- a grid -----------------------------------------------------------------------------------------------------------


class TrialData(Record):
    source: str
    path: str | None = None


class TrialConfig(Record):
    """A run's configuration as plain data; `load_config` reads the whole of it."""

    data: TrialData


class TrialRecord(Record):
    name: str = ""
    method: str
    point: Named[Any]
    seed: int
    config: TrialConfig


class GridRecord(Record):
    """`grid.json`: the trials of a grid, or the space of a search."""

    source: Any = None
    trials: Named[TrialRecord]
    space: Named[Any] = {}


class SuggestedTrials(RootModel[Named[TrialRecord]]):
    """A file of `suggested`: a trial that a searcher suggested."""


def check(model, plain) -> Any:
    """Returns the plain data of a record, unchanged.

    Raises:
        Damaged: it is not such a record; the first mistake as a line.
    """
    try:
        _, problems = collect(model, plain)
    except RecursionError as error:
        problems = [f"nested too deep: {one_line(error)}"]
    if problems:
        raise Damaged(one_line(problems[0].removeprefix(": ")))
    return plain


def parse(model, text: str | bytes) -> dict:
    """A record from its JSON text.

    Raises:
        Damaged: it is none.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(one_line(error)) from None
    return check(model, plain)


def read(model, storage, name: str) -> dict:
    """A record from its JSON file.

    Args:
        storage: a `Storage`.
        name: of the file in it.

    Raises:
        Damaged: it is none; the message begins with the name.
        StorageError: the storage does not answer.
    """
    try:
        return parse(model, storage.read(name))
    except Damaged as error:
        raise Damaged(f"{name} is damaged or not of genray: {error}") from None


def first_difference(before, now, path="", ignored=()) -> str:
    """The first place at which two pieces of plain data differ, in words; empty where they agree.

    Args:
        ignored: keys that may differ.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(key, before.get(key), now.get(key)) for key in {**now, **before} if key not in ignored]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(i, *pair) for i, pair in enumerate(zip(before, now))]
    elif before == now:
        return ""
    elif any(len(str(value)) > 60 for value in (before, now)):
        return f"{path} not what it was"
    else:
        return f"{path} was {before}, is {now}"
    found = (first_difference(old, new, f"{path}.{key}" if path else str(key), ignored) for key, old, new in pairs)
    return next((text for text in found if text), "")
