"""`python -m genray.evaluate RUN --mixtures 0:1:0.1`: operating points of a finished run, without training again."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

from genray.errors import CheckpointError, ConfigError
from genray.evaluation import inputs
from genray.evaluation.evaluator import clean_batches, reestimate_batch_norm
from genray.evaluation.mixture_record import CHOSEN_ON, build_row, choose, curve_csv, curve_table, mark_pareto
from genray.evaluation.mixtures import Mixture, gamma_learner, mix, parse_mixtures
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
from genray.recording.writer import write_all
from genray.reporting.mixture_plot import AGAIN, draw_curve
from genray.reporting.style import MissingMatplotlib
from genray.run.setup import prepare
from genray.storage import Storage
from genray.types import fraction_text

SPLITS = (CHOSEN_ON, "test")


@dataclass(frozen=True)
class SweepRequest:
    """Which mixtures of a run are measured or written, and on what.

    Attributes:
        model: the run's folder.
        mixtures: points to measure, as in `parse_mixtures`; None: none.
        save_mixture: one point, to be written as a model file; None: none.
        batch_norm: running statistics of mixtures: "mix" or "reestimate".
        splits: names of `SPLITS`; None: all that the run has.
        data: SOURCE:PATH, where the run's data lie elsewhere now.
        examples: the first so many of each split; None: all.
        attacks, norms, epsilon, step_size, engine: as in `genray.evaluate`, the two by norm.
        options: of a model file: refused, because a run's models are known.
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
    """A run's mixtures: the models, and where what is found about them goes.

    Args:
        asked: what is wanted.

    Raises:
        InputError: what is asked for is wrong or something of the run is absent.
    """

    def __init__(self, asked: SweepRequest):
        self.asked, self.place = asked, Storage(asked.model)
        config = config_of(self.place)
        _check_request(asked, config)
        names, self.gamma_of = tuple(config.base_learners), gamma_learner(config)
        self.mixtures = parse_mixtures(asked.mixtures, names, self.gamma_of) if asked.mixtures is not None else []
        self.saved = _saved(asked.save_mixture, names, self.gamma_of)
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
        """What is known of the models: by the run's model file, where there is one."""
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
        found = [OperatingPoint("mixture", self._name(mixture), mixture.key, mixture) for mixture in self.mixtures]
        there = {mixture.only for mixture in self.mixtures} if self.asked.batch_norm == "mix" else set()
        found += [
            OperatingPoint("base learner", f"base learner {name}", f"learner-{name}")
            for name in self.learners.states
            if name not in there
        ]
        if self.place.is_file("model.pt"):
            found.append(OperatingPoint("theta_g", "theta_g (model.pt)", "theta_g"))
        return found

    def _name(self, mixture):
        gamma = self.gamma_of and dict(mixture.weights)[self.gamma_of]
        name = str(mixture) if self.gamma_of is None else f"gamma {fraction_text(gamma)}"
        same = mixture.only and self.asked.batch_norm == "mix"
        return f"{name} = base learner {mixture.only}" if same else name

    def model(self, entry: OperatingPoint):
        """The network of an entry, in eval mode."""
        if entry.kind == "theta_g":
            network = load_model(self.place / "model.pt")
            network.origin = self.origin  # type: ignore[assignment]  # not a part of the network
            return network
        network = build_model(**self.setup.architecture)
        network.origin = self.origin  # type: ignore[assignment]
        if entry.mixture is None:
            network.load_state_dict(self.learners.states[entry.key.removeprefix("learner-")])
            return network.eval()
        network.load_state_dict(mix(self.learners.states, entry.mixture, self.counters_of))
        if self.asked.batch_norm == "reestimate":
            reestimate_batch_norm(network, clean_batches(self.config, self.setup.splits["train"], "cpu"))
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
            cluster: gives the context in which all evaluations run, one Ray for all: starting one takes longer than
                many a block.
        """
        left = self._left()
        splits, done = {}, 0
        with cluster() if left else nullcontext():
            for split, examples in self.splits.items():
                rows = []
                for entry in self.entries():
                    folder = f"{split}/{entry.key}"
                    if folder in left:
                        done += 1
                        Progress().say(f"{done}/{len(left)}: {entry.name}, {split} images")
                    data = {"source": self.config.data.source, "split": split}
                    record = measure(self.model(entry), examples, self.radii, self.storage / folder, data)
                    rows.append(
                        build_row(
                            entry.kind, entry.name, dict(entry.mixture.weights) if entry.mixture else None, record
                        )
                    )
                mark_pareto(rows)
                splits[split] = {"protocol": record["protocol"], "rows": rows}
        return self._results(splits)

    def _left(self):
        """Evaluations that are not finished; refuses those that are there where nothing is to go on."""
        folders = [f"{split}/{entry.key}" for split in self.splits for entry in self.entries()]
        for folder in folders:
            check_place(self.storage / folder, self.asked.resume, self.asked.overwrite)
        if self.asked.overwrite:
            return folders
        return [folder for folder in folders if not self.storage.exists(f"{folder}/results.json")]

    def _results(self, splits):
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


def show(sweep: MixtureSweep, results: dict):
    """Prints the tables and writes `results.json`, `curve.csv` and a plot a split."""
    for split in results["splits"]:
        print(curve_table(results, split), end="\n\n")
    if results["step"] < results["total_steps"]:
        print(f"the run has not ended: base learners of step {results['step']} of {results['total_steps']}")
    files = {
        "results.json": (json.dumps(results, indent=1) + "\n").encode(),
        "curve.csv": curve_csv(results).encode(),
    }
    try:
        for split in results["splits"]:
            files |= {f"curve_{split}.{ending}": drawn for ending, drawn in draw_curve(results, split).items()}
    except MissingMatplotlib:
        print(AGAIN)
    write_all(sweep.storage, files)
    print(f"everything is in {sweep.storage}")


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


def _saved(text, names, gamma_of):
    if text is None:
        return None
    points = parse_mixtures(text, names, gamma_of, "--save-mixture")
    if len(points) > 1:
        raise ConfigError(f"--save-mixture: expected one mixture, got {len(points)} in {text!r}")
    return points[0]


def _with_data(config, text):
    """The run's configuration, with its data where `--data` says they lie, and all test images."""
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
    """Split name -> examples; by default validation, where the run holds any out, and test."""
    names = SPLITS if asked.splits is None else asked.splits
    for name in names:
        if name not in SPLITS:
            raise ConfigError(f"--split: expected {' or '.join(SPLITS)}, or both with a comma, got {name!r}")
    if len(setup.splits[CHOSEN_ON]) == 0 and CHOSEN_ON in names:
        if asked.splits is not None:
            raise ConfigError("--split: expected test, because the run held no validation images out, got validation")
        names = ("test",)
    found = {name: setup.splits[name] for name in SPLITS if name in names}
    if asked.examples is not None:
        largest = max(found.values(), key=len)
        largest.first(asked.examples, "--examples")  # a split with fewer is taken whole
        found = {name: split.first(min(asked.examples, len(split))) for name, split in found.items()}
    return found
