"""Every record that genray writes as JSON and reads back, and one line for what does not fit.

A record may have other fields too, as newer versions write them. Older versions did not write the fields that have a
default.
"""

import json
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, RootModel, WithJsonSchema

from genray.config.model import Described, collect, option, required, wrong
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

    value: Rate = required("fraction of the images that are right")
    low: Rate = required("lower end of the 95 % Wilson interval")
    high: Rate = required("its upper end")
    examples: Positive = required("number of images")
    per_class: Named[Rate] = option({}, "fraction of each class")

    def problems(self):
        if not self.low <= self.value <= self.high:
            yield wrong("value", f"a number from {self.low} to {self.high}", self.value)


Columns = Named[AccuracyRecord]


class BallRecord(Record):
    """A threat model; epsilon exact and as a decimal."""

    norm: str = required("linf, l2 or l1")
    epsilon: Radius = required("radius as people write it, such as 8/255, on the pixel scale [0, 1]")  # type: ignore[valid-type]  # pydantic reads the annotation
    epsilon_decimal: Finite = required("the same as a number")


# --- a run ------------------------------------------------------------------------------------------------------------


class RunBall(BallRecord):
    threat_model: str = option("", "norm and radius in words")
    step_size: str = option("", "of PGD's steps, as people write it")
    step_size_decimal: Finite = option(0, "the same as a number")


class ExtraRecord(Record):
    """Training images beside the data set's own."""

    source: str = required("`data.extra.source` and its path, without credentials")
    examples: Positive = required("how many images")
    pseudo_labelled: int = required("how many of them have a model's labels")
    batch_share: Finite | None = required("`data.extra.batch_share`")


class RunProtocol(RunBall):
    data: str = required("`data.source`")
    fingerprint: str = option("", "hash of the test images and their labels")
    extra: ExtraRecord | None = option(None, "training images beside the data set's own")
    split: str = option("test", "what the images of the table are")
    examples: int = required("how many")
    threat_model: str = required("norm and radius in words")
    num_steps: int = option(0, "PGD's steps")
    other_norms: Named[RunBall] = option({}, "the balls of the further norms, by the name of their column")
    attack: str = required("the attack in words")
    selected_on: str = required(
        "part of the images by which theta_g's best epoch was chosen; `test` for reproducing papers only"
    )
    interval: str = option("", "kind of the intervals")


class RunResults(Record):
    """`results.json` of a run: the accuracies of all its models on the test images."""

    models: Named[Columns] = required(
        "`global` (theta_g of the best epoch), `global_last` (of the last) and each base learner: column -> accuracy "
        "on the test images; `union`: right under every attack"
    )
    protocol: RunProtocol = required("how the table was measured")
    best_epoch: int = required("of `global` and model.pt")
    versions: Named[Any] = required("of packages, and the devices")
    seed: int = required("of the run")
    wall_s: Finite = required("training, over all resumptions")
    warnings: list[str] = option([], "what made the run suspect, as it was said in the log")

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

    loss: float | None = option(None, "mean over the images that it trained on")
    train_accuracy: float | None = option(None, "of the same, on the inputs that it trained on")
    learning_rate: float | None = option(None, "at the last step")
    rollbacks: int = option(0, "of earlier versions")
    seconds: Finite = option(0, "its windows took, and of these")
    attack_seconds: Finite | None = option(None, "crafting adversarial images")
    averaging_seconds: Finite = option(0, "its average and its share of theta_g")
    transfer_seconds: Finite = option(0, "beside them: copying weights out of the device's memory and into it")
    waiting_seconds: Finite = option(0, "beside them: for theta_g, for other learners, for its next call")
    radius_mean: Finite | None = option(None, "with `radius_clip`: mean radius of a batch")
    radius_spread: Finite | None = option(None, "and its standard deviation")
    __pydantic_extra__: dict[str, float]

    def problems(self):
        for name in TIMES if self.attack_seconds is not None else ():
            if name not in self.model_fields_set:
                yield f"{name}: missing"


class EpochRecord(Record):
    """A line of `metrics.jsonl`."""

    epoch: int = required("from 1")
    step: int = option(0, "finished steps of each learner")
    wall_s: Finite = required("training so far, over all resumptions")
    redistributions: int = required("how often theta_g was handed back so far")
    learners: Named[LearnerEpoch] = required(
        "those that trained in the epoch; with `evaluation.base_learners` also `<split>_<attack>`, the accuracy of its "
        "own model"
    )
    mixing_weights: Named[Finite] = required("of each learner in theta_g, at the last step")
    global_: Named[Rate] | None = Field(
        alias="global",
        description="accuracies of theta_g where its best epoch is chosen: `natural`, `pgd20`; null without evaluation",
    )
    best_epoch: int = required("so far; 0: none yet")
    warnings: list[str] = option([], "what makes the run suspect, where it begins")


class IdentityRecord(Record):
    """Images by their fingerprint, or a file by its hash. `broken` are image files that are left out because they
    cannot be decoded."""

    examples: int | None = option(None, "how many images")
    fingerprint: str | None = option(None, "hash of images and labels")
    broken: list[str] = option([], "image files that are left out because they cannot be decoded")
    path: str | None = option(None, "of a file of weights, without credentials")
    sha256: str | None = option(None, "of that file")

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
    name: str = required("of the column")
    norm: str = option("", "of the ball")
    epsilon: Finite = option(0, "its radius")
    loss: str = option("", "what it maximises")
    num_steps: int = required("steps of a restart")
    step_size: Finite | None = option(None, "length of a step")
    restarts: int | None = option(None, "random starts")
    passes: int | None = option(None, "gradients an image, at most")
    queries: int | None = option(None, "forward passes an image, at most")
    notes: list[str] = required("what else its definition has")


class AttackedBall(BallRecord):
    attacks: list[AttackRecord] = required("tried in this ball")


class EvaluatedData(Record):
    source: str = required("`data.source`, or what the caller said")
    split: str = option("", "part of the data set")
    examples: int = required("how many images")
    fingerprint: str = option("", "hash of images and labels")


class EvaluationProtocol(Record):
    """The protocol of an evaluation; `engines` is the engine of each column in each norm."""

    data: EvaluatedData = required("the images")
    threats: Annotated[list[AttackedBall], Field(min_length=1)] = required("the balls, with the attacks in each")
    seed: int = required("of all random numbers")
    block_size: int = option(0, "images a block, which its own random numbers go with")
    engine: str = required("code of AutoAttack's members")
    num_classes: int = option(0, "K")
    interval: str = option("", "kind of the intervals")
    hash: str = required("equal hashes: measured alike")
    engines: Named[Named[str]] = option({}, "ball -> column -> code that ran")
    versions: Named[Any] = option({}, "of packages")


class EvaluationRequest(Record):
    """`request.json` of an evaluation: its arguments, and fingerprints of the model and the images."""

    protocol: EvaluationProtocol | None = None
    model: str
    images: str = ""
    predictions: str = ""


class StoredImages(Record):
    """The stored images of an attack."""

    stored: int = required("how many")
    wrong: int = required("of these fool the model when they are read back")
    wrong_in_8_bits: int = required("of these still do after rounding to multiples of 1 / 255")
    in_8_bits: int = required("of those are in the ball after rounding")


class NormRecord(Record):
    columns: Columns = required("attack -> accuracy under it")
    union: AccuracyRecord | None = option(None, "accuracy under all attacks of the ball together")
    findings: list[str] = required("reasons to distrust a number of the ball")
    images: Named[StoredImages] = option({}, "attack, or member of `aa` -> what became of its stored images")


class EvaluationRecord(Record):
    """`results.json` of an evaluation."""

    natural: AccuracyRecord = required("accuracy without attack")
    norms: Named[NormRecord] = required(
        "ball -> its accuracies; a ball is a norm, with its radius where there are several"
    )
    findings: list[str] = required("reasons to distrust the whole")
    union: AccuracyRecord | None = option(None, "accuracy under all attacks of all balls together")
    protocol: EvaluationProtocol = required("what was measured")

    def problems(self):
        threats = self.protocol.threats
        for ball, threat in zip(ball_names({"norm": t.norm, "epsilon": t.epsilon} for t in threats), threats):
            columns = self.norms[ball].columns if ball in self.norms else {}
            for attack in threat.attacks:
                if attack.name not in columns:
                    yield f"norms.{ball}.columns.{attack.name}: missing"


class ImageRow(Record):
    """A row of `results.parquet` of an evaluation: one image, in stored order. Its further columns are of truth values:
    `<ball>_<attack>`, as in `linf_pgd20`: still right under this attack, false where `natural` is; and `<ball>_aa`:
    under all four members of AutoAttack."""

    index: int = required("position among the evaluated images, from 0")
    label: int = required("the true class")
    natural: bool = required("right without attack")
    __pydantic_extra__: dict[str, bool]


class StoredImageRow(Record):
    """A row of a file in `images/` of an evaluation: an image that fell, at the smallest radius at which its attack
    found it."""

    index: int = required("position among the evaluated images, from 0")
    label: int = required("the true class")
    before: int = required("class that the clean image is given")
    after: int = required("class that this one is given")
    norm: str = required("of the ball")
    epsilon: Radius = required("its radius")  # type: ignore[valid-type]
    attack: str = required("column; of `aa` the member, as in `aa_apgd_t`")
    length: Finite = required("norm of the perturbation")
    image: list = required("float32 pixels, of Arrow's type for tensors of one shape (C, H, W)")


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
