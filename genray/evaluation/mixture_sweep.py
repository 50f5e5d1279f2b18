"""`python -m genray.evaluate RUN --mixtures 0:1:0.1`: operating points of a finished run, without training again."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

from genray.errors import CheckpointError, ConfigError
from genray.evaluation import inputs
from genray.evaluation.evaluator import clean_batches, reestimate_batch_norm
from genray.evaluation.mixtures import Mixture, gamma_learner, mix, pareto, parse_mixtures
from genray.evaluation.sources import FileOptions, config_of, look_at_data, own_radius
from genray.evaluation.suite import expand_names
from genray.interop.load import load_model
from genray.interop.origin import Origin, origin_of
from genray.learners.global_learner import GlobalLearner
from genray.models import build_model
from genray.recording.base_learners import load_base_learners
from genray.recording.evaluation_folder import check_place
from genray.recording.model_description import describe_model
from genray.recording.progress import Progress
from genray.recording.run_folder import model_bytes
from genray.run.setup import prepare
from genray.storage import Storage
from genray.types import fraction_text

CHOSEN_ON = "validation"
SPLITS = (CHOSEN_ON, "test")


@dataclass(frozen=True)
class SweepRequest:
    """Mixtures of a run to measure or to write, and the data.

    Attributes:
        model: the run's folder.
        mixtures: points to measure, as in `parse_mixtures`; None: none.
        save_mixture: one point, to be written as a model file; None: none.
        batch_norm: running statistics of mixtures: "mix" or "reestimate".
        splits: names of `SPLITS`; None: all that the run has.
        data: SOURCE:PATH, if the run's data have moved.
        examples: the first so many of each split; None: all.
        attacks, norms, epsilon, step_size, engine: as in `genray.evaluate`; epsilon and step_size by norm.
        options: of a model file; refused, because a run's models are known.
        output: folder; None: `mixtures` in the run's.
        resume, overwrite: as in `genray.evaluate`.
    """

    model: str
    mixtures: str | None = None
    save_mixture: str | None = None
    batch_norm: str = "mix"
    splits: tuple[str, ...] | None = None
    data: str | None = None
    examples: int | None = None
    attacks: tuple[str, ...] = ("standard",)
    norms: tuple[str, ...] = ("linf",)
    epsilon: dict = field(default_factory=dict)
    step_size: dict = field(default_factory=dict)
    engine: str | None = None
    options: FileOptions = FileOptions()
    output: str | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class OperatingPoint:
    """A model of the table: its row's kind and name, its folder's name, and the weights of a mixture."""

    kind: str
    name: str
    key: str
    mixture: Mixture | None = None


class MixtureSweep:
    """A run's mixtures: builds, evaluates and saves the models.

    Args:
        asked: the request.

    Raises:
        InputError: the request is wrong or a file of the run is absent.
    """

    def __init__(self, asked: SweepRequest):
        self.asked, self.place = asked, Storage(asked.model)
        config = config_of(self.place)
        _check_request(asked, config)
        names, self.gamma_of, self.saved = tuple(config.base_learners), gamma_learner(config), None
        self.mixtures = parse_mixtures(asked.mixtures, names, self.gamma_of) if asked.mixtures is not None else []
        if asked.save_mixture is not None:
            self.saved, *more = parse_mixtures(asked.save_mixture, names, self.gamma_of, "--save-mixture")
            if more:
                raise ConfigError(f"--save-mixture: expected one mixture, got several in {asked.save_mixture!r}")
        self.radii = own_radius(config, asked.norms) | asked.epsilon
        inputs.radii(asked.norms, self.radii)
        self.setup = prepare(_with_data(config, asked.data))
        self.config = self.setup.config
        self.splits = _splits(asked, self.setup)
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

    # --- models ---------------------------------------------------------------------------------------------------

    def entries(self) -> list[OperatingPoint]:
        """The mixtures, then for comparison the base learners with their own statistics and the run's theta_g."""
        found, alone = [], list(self.learners.states)
        for mixture in self.mixtures:
            name = f"gamma {fraction_text(dict(mixture.weights)[self.gamma_of])}" if self.gamma_of else str(mixture)
            if mixture.only and self.asked.batch_norm == "mix":
                name += f" = base learner {mixture.only}"
                alone.remove(mixture.only)
            found.append(OperatingPoint("mixture", name, mixture.key, mixture))
        found += [OperatingPoint("base learner", f"base learner {name}", f"learner-{name}") for name in alone]
        if self.place.is_file("model.pt"):
            found.append(OperatingPoint("theta_g", "theta_g (model.pt)", "theta_g"))
        return found

    def model(self, entry: OperatingPoint):
        """The network of an entry, in eval mode."""
        if entry.kind == "theta_g":
            network = load_model(self.place / "model.pt")
        else:
            states, mixture = self.learners.states, entry.mixture
            state = mix(states, mixture, self.counters_of) if mixture else states[entry.key.removeprefix("learner-")]
            network = build_model(**self.setup.architecture)
            network.load_state_dict(state)
            if mixture and self.asked.batch_norm == "reestimate":
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
            "batch_norm": self.asked.batch_norm,
        }
        name = f"{self.saved.key}.pt"
        self.storage.write(name, model_bytes(network.state_dict(), description))
        return str(Storage(self.storage.absolute) / name)

    # --- measuring ------------------------------------------------------------------------------------------------

    def evaluate(self, measure, cluster=nullcontext) -> dict:
        """Evaluates every model on every split.

        Args:
            measure: (model, split, radii, folder, data) -> record of one model's evaluation.
            cluster: () -> context of all evaluations: one Ray for all, because starting it takes longer than a block.
        """
        folders = [f"{split}/{entry.key}" for split in self.splits for entry in self.entries()]
        for folder in folders:
            check_place(self.storage / folder, self.asked.resume, self.asked.overwrite)
        done = set() if self.asked.overwrite else {f for f in folders if self.storage.exists(f"{f}/results.json")}
        left, splits = [folder for folder in folders if folder not in done], {}
        with cluster() if left else nullcontext():
            for split, examples in self.splits.items():
                rows = []
                for entry in self.entries():
                    folder = f"{split}/{entry.key}"
                    if folder in left:
                        Progress().say(f"{left.index(folder) + 1}/{len(left)}: {entry.name}, {split} images")
                    data = {"source": self.config.data.source, "split": split}
                    record = measure(self.model(entry), examples, self.radii, self.storage / folder, data)
                    rows.append(build_row(entry, record))
                mark_pareto(rows)
                splits[split] = {"protocol": record["protocol"], "rows": rows}
        return {
            "run": self.config.name,
            "data": self.config.data.source,
            "learners": list(self.learners.states),
            "gamma_of": self.gamma_of,
            "step": self.learners.step,
            "total_steps": self.setup.plan.total_steps,
            "batch_norm": self.asked.batch_norm,
            "norms": list(self.asked.norms),
            "chosen": choose(splits[CHOSEN_ON]["rows"]) if CHOSEN_ON in splits else None,
            "theta_g_selected_on": self.config.evaluation.select_on,
            "splits": splits,
        }


def build_row(entry: OperatingPoint, record: dict) -> dict:
    """One evaluated model's row, from the record of `genray.evaluate`."""
    columns = {  # without the cascade's members: `aa` is the last one's result
        threat["norm"]: {a["name"]: _plain(record["norms"][threat["norm"]]["columns"][a["name"]])
                         for a in threat["attacks"]}
        for threat in record["protocol"]["threats"]
    }  # fmt: skip
    lowest = min((value for by_name in columns.values() for value in by_name.values()), key=lambda v: v["value"])
    first = next(iter(record["norms"].values()))
    return {
        "kind": entry.kind,
        "name": entry.name,
        "weights": entry.mixture and {learner: fraction_text(weight) for learner, weight in entry.mixture.weights},
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


def _check_request(asked, config):
    option = "--mixtures" if asked.mixtures is not None else "--save-mixture"
    if config is None:
        raise CheckpointError(
            f"{option}: expected a run folder, which holds the base learners, got the file {asked.model}"
        )
    asked.options.refuse()
    if asked.mixtures is not None and not any(expand_names(asked.attacks, norm) for norm in asked.norms):
        raise ConfigError(
            f"--attacks: expected at least one attack beside natural with --mixtures, got {','.join(asked.attacks)!r}"
        )
    inputs.step_sizes(asked.norms, asked.step_size)
    inputs.check_engine(asked.engine)


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


def _splits(asked, setup):
    """Split name -> examples; by default validation, if the run holds any out, and test."""
    for name in asked.splits or ():
        if name not in SPLITS:
            raise ConfigError(f"--split: expected {' or '.join(SPLITS)}, or both with a comma, got {name!r}")
    found = {name: setup.splits[name] for name in SPLITS if name in (asked.splits or SPLITS)}
    if CHOSEN_ON in found and len(found[CHOSEN_ON]) == 0:
        if asked.splits is not None:
            raise ConfigError("--split: expected test, because the run held no validation images out, got validation")
        del found[CHOSEN_ON]
    if asked.examples is not None:
        max(found.values(), key=len).first(asked.examples, "--examples")  # a smaller split is used whole
        found = {name: split.first(min(asked.examples, len(split))) for name, split in found.items()}
    return found
