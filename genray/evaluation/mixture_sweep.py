"""`python -m genray.evaluate RUN --mixtures 0:1:0.1`: operating points of a finished run, without training again."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from genray.errors import CheckpointError, ConfigError
from genray.evaluation.evaluator import clean_batches, reestimate_batch_norm
from genray.evaluation.inputs import EvaluationArguments
from genray.evaluation.mixtures import Mixture, gamma_learner, mix, pareto, parse_mixtures
from genray.evaluation.sources import config_of, look_at_data, own_radius
from genray.interop.load import load_model
from genray.interop.origin import Origin, origin_of
from genray.learners.global_learner import GlobalLearner
from genray.models import build_model
from genray.recording.base_learners import load_base_learners
from genray.recording.evaluation_folder import check_place
from genray.recording.model_description import describe_model
from genray.recording.progress import Progress
from genray.recording.run_folder import RunFolder, model_bytes
from genray.run.initial_weights import InitialWeights
from genray.run.setup import prepare
from genray.storage import Storage
from genray.types import fraction_text

CHOSEN_ON = "validation"
SPLITS = (CHOSEN_ON, "test")


@dataclass(frozen=True)
class OperatingPoint:
    """A model of the table: its row's kind and name, its folder's name, and the weights of a mixture."""

    kind: str
    name: str
    key: str
    mixture: Mixture | None = None


class MixtureSweep:
    """The mixtures of a run: builds, evaluates and saves the models.

    Args:
        model: the run's folder.
        asked: how each model is evaluated; its `output` is the folder of all, by default `mixtures` in the run's.
        mixtures: points to measure, as in `parse_mixtures`; None: none.
        save_mixture: one point, to be written as a model file; None: none.
        batch_norm: running statistics of mixtures: "mix" or "reestimate".
        splits: names of `SPLITS`; None: all that the run has.
        data: SOURCE:PATH, if the run's data have moved.
        examples: the first so many of each split; None: all.

    Raises:
        InputError: an argument is wrong or a file of the run is absent.
    """

    def __init__(self, model, asked: EvaluationArguments, mixtures, save_mixture, batch_norm, splits, data, examples):
        self.place, self.batch_norm = Storage(model), batch_norm
        config = config_of(self.place)
        if config is None:
            option = "--save-mixture" if mixtures is None else "--mixtures"
            raise CheckpointError(
                f"{option}: expected a run folder, which holds the base learners, got the file {model}"
            )
        self.asked = replace(asked, epsilon=own_radius(config, asked.norms) | asked.epsilon)
        request = self.asked.request()
        if mixtures is not None and not any(map(request.columns, asked.norms)):
            expected = "expected at least one attack beside natural with --mixtures"
            raise ConfigError(f"--attacks: {expected}, got {','.join(asked.attacks)!r}")
        names, self.gamma_of, self.saved = tuple(config.base_learners), gamma_learner(config), None
        self.mixtures = parse_mixtures(mixtures, names, self.gamma_of) if mixtures is not None else []
        if save_mixture is not None:
            self.saved, *more = parse_mixtures(save_mixture, names, self.gamma_of, "--save-mixture")
            if more:
                raise ConfigError(f"--save-mixture: expected one mixture, got several in {save_mixture!r}")
        stored = None
        if config.model.weights is not None:
            stored = InitialWeights.of_checkpoint(RunFolder(self.place.parent, self.place.name).read_newest_state())
        self.setup = prepare(_with_data(config, data), stored=stored)
        self.config = self.setup.config
        self.splits = _splits(self.setup.splits, splits, examples)
        self.learners = load_base_learners(self.place, self.setup)
        self.counters_of = names[GlobalLearner(config).counter_index]
        self.storage = Storage(asked.output or self.place / "mixtures")
        self.storage.check_writable()

    @cached_property
    def origin(self) -> Origin:
        """The `Origin` of the models: from the run's model file, if there is one."""
        found = Origin.of(describe_model(self.setup))
        if self.place.is_file("model.pt"):
            written = origin_of(load_model(self.place / "model.pt"))
            found = replace(found, data=written.data, class_names=written.class_names or found.class_names)
        test = self.setup.splits["test"]
        findings = look_at_data(found, self.setup.class_names, test, self.config.data.source)
        return replace(found, findings=tuple(findings))

    def points(self) -> list[OperatingPoint]:
        """The mixtures, then for comparison the base learners with their own statistics and the run's theta_g."""
        found, alone = [], list(self.learners.states)
        for mixture in self.mixtures:
            name = f"gamma {fraction_text(dict(mixture.weights)[self.gamma_of])}" if self.gamma_of else str(mixture)
            if mixture.only and self.batch_norm == "mix":
                name += f" = base learner {mixture.only}"
                alone.remove(mixture.only)
            found.append(OperatingPoint("mixture", name, mixture.key, mixture))
        found += [OperatingPoint("base learner", f"base learner {name}", f"learner-{name}") for name in alone]
        if self.place.is_file("model.pt"):
            found.append(OperatingPoint("theta_g", "theta_g (model.pt)", "theta_g"))
        return found

    def model(self, point: OperatingPoint):
        """The network of a point, in eval mode."""
        if point.kind == "theta_g":
            network = load_model(self.place / "model.pt")
        else:
            states, mixture = self.learners.states, point.mixture
            state = mix(states, mixture, self.counters_of) if mixture else states[point.key.removeprefix("learner-")]
            network = build_model(**self.setup.architecture)
            network.load_state_dict(state)
            if mixture and self.batch_norm == "reestimate":
                reestimate_batch_norm(network, clean_batches(self.config, self.setup.splits["train"], "cpu"))
        network.origin = self.origin  # type: ignore[assignment]  # not a part of the network
        return network.eval()

    def save(self) -> str:
        """Writes the mixture of `--save-mixture` as a file like `model.pt`; returns its path."""
        network = self.model(OperatingPoint("mixture", "", "", self.saved))
        description = {
            **describe_model(self.setup),
            "data": dict(self.origin.data),
            "step": self.learners.step,
            "mixture": {name: fraction_text(weight) for name, weight in self.saved.weights},
            "batch_norm": self.batch_norm,
        }
        name = f"{self.saved.key}.pt"
        self.storage.write(name, model_bytes(network.state_dict(), description))
        return str(Storage(self.storage.absolute) / name)

    def evaluate(self, measure, cluster=nullcontext) -> dict:
        """Evaluates every model on every split.

        Args:
            measure: (model, split, `EvaluationArguments`) -> record of one model's evaluation.
            cluster: () -> context of all evaluations: one Ray for all, because starting it takes longer than a block.
        """
        tasks = [
            (split, point, self.storage / f"{split}/{point.key}") for split in self.splits for point in self.points()
        ]
        for *_, folder in tasks:
            check_place(folder, self.asked.resume, self.asked.overwrite)
        new = [folder for *_, folder in tasks if self.asked.overwrite or not folder.exists("results.json")]
        splits = {split: {"protocol": None, "rows": []} for split in self.splits}
        with cluster() if new else nullcontext():
            for split, point, folder in tasks:
                if folder in new:
                    Progress().say(f"{new.index(folder) + 1}/{len(new)}: {point.name}, {split} images")
                data = {"source": self.config.data.source, "split": split}
                asked = replace(self.asked, output=folder, data=data)
                record = measure(self.model(point), self.splits[split], asked)
                splits[split]["protocol"] = record["protocol"]
                splits[split]["rows"].append(build_row(point, record))
        for part in splits.values():
            mark_pareto(part["rows"])
        return {
            "run": self.config.name,
            "data": self.config.data.source,
            "learners": list(self.learners.states),
            "gamma_of": self.gamma_of,
            "step": self.learners.step,
            "total_steps": self.setup.plan.total_steps,
            "batch_norm": self.batch_norm,
            "norms": list(self.asked.norms),
            "chosen": choose(splits[CHOSEN_ON]["rows"]) if CHOSEN_ON in splits else None,
            "theta_g_selected_on": self.config.evaluation.select_on,
            "splits": splits,
        }


def build_row(point: OperatingPoint, record: dict) -> dict:
    """One evaluated model's row, from the record of `genray.evaluate`."""
    columns = {  # without the cascade's members: `aa` is the last one's result
        threat["norm"]: {a["name"]: _plain(record["norms"][threat["norm"]]["columns"][a["name"]])
                         for a in threat["attacks"]}
        for threat in record["protocol"]["threats"]
    }  # fmt: skip
    lowest = min((value for by_name in columns.values() for value in by_name.values()), key=lambda v: v["value"])
    first = next(iter(record["norms"].values()))
    return {
        "kind": point.kind,
        "name": point.name,
        "weights": point.mixture and {learner: fraction_text(weight) for learner, weight in point.mixture.weights},
        "natural": _plain(record["natural"]),
        "columns": columns,
        "robust": _plain(record.get("union") or first.get("union", lowest)),
        "findings": record["findings"] + [f for part in record["norms"].values() for f in part["findings"]],
    }


def _plain(accuracy):
    return {key: accuracy[key] for key in ("value", "low", "high", "examples")}


def mark_pareto(rows: list[dict]):
    """Sets `pareto` of each mixture: no other one is at least as good in both accuracies and better in one."""
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    front = pareto([_both(row) for row in mixtures])
    for row in mixtures:
        row["pareto"] = _both(row) in front


def choose(rows: list[dict]) -> str:
    """Name of the mixture with the largest natural + robust accuracy; among equals the more robust, then the first."""
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    return max(mixtures, key=lambda row: (round(sum(_both(row)), 9), row["robust"]["value"]))["name"]


def _both(row):
    return row["natural"]["value"], row["robust"]["value"]


def _with_data(config, text):
    """The run's configuration, with the data path of `--data` and all test images."""
    config = config.replace(evaluation=config.evaluation.replace(examples=None))
    if text is None:
        return config
    source, _, path = text.partition(":")
    if source != config.data.source:
        raise ConfigError(
            f"--data: expected the run's own source {config.data.source} with --mixtures, because its training and "
            f"validation images are needed, got {source!r}"
        )
    return config.replace(data=config.data.replace(path=path or config.data.path))


def _splits(there, wanted, examples):
    """Split name -> examples; by default validation, if the run holds any out, and test."""
    for name in wanted or ():
        if name not in SPLITS:
            raise ConfigError(f"--split: expected {' or '.join(SPLITS)}, or both with a comma, got {name!r}")
    if wanted and CHOSEN_ON in wanted and not len(there[CHOSEN_ON]):
        raise ConfigError("--split: expected test, because the run held no validation images out, got validation")
    found = {name: there[name] for name in SPLITS if name in (wanted or SPLITS) and len(there[name])}
    if examples is not None:
        max(found.values(), key=len).first(examples, "--examples")  # a smaller split is used whole
        found = {name: split.first(min(examples, len(split))) for name, split in found.items()}
    return found
