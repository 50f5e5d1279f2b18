"""Everything a run needs before its first step, the same for both runtimes."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from genray.config.schema import RunConfig
from genray.core.rng import key_seed
from genray.core.user_code import errors_as, find
from genray.data.datasets import load_image_data, validation_split
from genray.data.extra import with_extra
from genray.data.fingerprint import identify
from genray.data.reading import Reading
from genray.data.request import PARTS
from genray.errors import ConfigError
from genray.models import build_model
from genray.models.guarded import guard_weight_gradients
from genray.models.other_networks import classifier_name, is_other
from genray.parallel.whole_batch import per_process_layers
from genray.run.fitting import Fitting, batch_problems
from genray.run.initial_weights import InitialWeights, freeze, read_initial_weights
from genray.run.own_methods import try_own_methods
from genray.run.plan import RunPlan, make_plan
from genray.run.published_radii import radius_warnings
from genray.run.targets import read_targets
from genray.storage import without_secrets


@dataclass(frozen=True)
class RunSetup:
    """Attributes:
    plan: the run's plan, with its configuration.
    splits: {"train", "validation", "test"} -> `Split`; the validation part is taken out of the training images.
    class_names: one a class.
    num_extra: images of `data.extra`, which are the last of the training images.
    notes: how the data was read, one line each.
    warnings: what is most likely not meant, one line each.
    identity: {split: {"examples", "fingerprint"}}; empty if the images are not decoded.
    initial: the weights of `model.weights`, which replace random ones.
    factory: of a network of the user's own that has no name.
    targets: learner name -> network of `objective.target.model`.
    own: `package.module:NAME` -> the user's network, objective or attack that the configuration names.
    """

    plan: RunPlan
    splits: dict
    class_names: tuple[str, ...]
    num_extra: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    identity: dict = field(default_factory=dict)
    initial: InitialWeights | None = None
    factory: Callable[..., torch.nn.Module] | None = None
    targets: dict[str, torch.nn.Module] = field(default_factory=dict)
    own: dict[str, Callable] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return self.plan.config

    @property
    def architecture(self) -> dict:
        """The arguments of `build_model` that give the run's network."""
        model, shape = self.config.model, self.splits["train"].shape
        return {
            "name": model.name,
            "num_classes": len(self.class_names),
            "in_channels": shape[0],
            "image_size": shape[1:],
            "width": model.width,
            "batch_norm": model.batch_norm,
            "mean": model.mean,
            "std": model.std,
            **({"activation": model.activation} if model.activation != "relu" else {}),
            **({"options": model.options} if model.options else {}),
            **({"factory": self.factory} if self.factory else {}),
        }

    @property
    def extra(self) -> dict | None:
        """The entry of `data.extra` in a run's records; None without extra images."""
        extra, labelled = self.config.data.extra, self.splits["train"].labelled
        if extra is None:
            return None
        return {
            "source": without_secrets(f"{extra.source} {extra.path or ''}".strip()),
            "examples": self.num_extra,
            "pseudo_labelled": 0 if labelled is None else int((~labelled).sum()),
            "batch_share": extra.batch_share,
        }

    def with_initial_weights(self, stored: InitialWeights | None = None) -> "RunSetup":
        """The same run with the weights of `model.weights`, and the normalisation that their file states.

        Args:
            stored: as in `read_initial_weights`.

        Raises:
            CheckpointError, ConfigError: the file cannot be read or does not fit the network.
        """

        def build(model):
            return replace(self, plan=replace(self.plan, config=self.config.replace(model=model))).build_network()

        initial, model = read_initial_weights(self.config.model, build, stored)
        plan = replace(self.plan, config=self.config.replace(model=model))
        return replace(self, plan=plan, initial=initial, notes=(*self.notes, initial.note))

    def build_network(self):
        """A new network with the run's initial weights: the same in every process, in memory order too, because flat
        weights are in the order of memory."""
        network = build_model(**self.architecture, seed=key_seed(self.config.seed, "initial weights"))
        if self.initial is not None:
            self.initial.load_into(network)
        freeze(network, self.config.model.freeze or ())
        return guard_weight_gradients(network.to(memory_format=memory_format(self.config)))

    def target_network(self, learner: str) -> torch.nn.Module | None:
        """A new target network of a learner, with the weights to begin with; None if its objective has none."""
        if self.config.base_learners[learner].target is None:
            return None
        return copy.deepcopy(self.targets[learner]) if learner in self.targets else self.build_network()

    @cached_property
    def initial_for_checkpoint(self) -> dict:
        """As `InitialWeights.for_checkpoint`; no step changes it."""
        assert self.initial is not None, "a run that begins at random weights"
        return self.initial.for_checkpoint(self.build_network(), self.config.model)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of one learner's flat float32 weights, which it sends at the end of a window."""
        tensors = self.build_network().state_dict().values()
        return 4 * sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def memory_format(config: RunConfig) -> torch.memory_format:
    """Memory format of images and convolution weights."""
    return torch.channels_last if config.compute.channels_last else torch.contiguous_format


def prepare(
    config: RunConfig,
    follows=(),
    *,
    decode: bool = True,
    copies: int = 1,
    progress=None,
    network: Callable | None = None,
    arrays: dict | None = None,
    stored: InitialWeights | None = None,
) -> RunSetup:
    """Loads the data, splits it, checks it against the configuration and plans the run.

    Args:
        config: the run's; its copy in the setup names the Parquet columns that were found.
        follows: its fields that are lowered to fit the data, as in `Fitting`.
        decode: False reads no images: they are tensors on torch's device "meta".
        copies, progress: as in `load_image_data`.
        network: factory of the run's network, instead of `model.name`.
        arrays: {"train", "test"}, the images of `data.source: arrays`.
        stored: as in `read_initial_weights`.

    Raises:
        DataError, ConfigError: the data is absent or does not fit the configuration.
    """
    own = {name: find(name, at) for at, name in config.own_code.items() if network is None or at != "model.name"}
    fitting = Fitting(config, follows)
    data = load_image_data(
        config.data.source,
        path=arrays or config.data.path,
        image_column=config.data.image_column,
        label_column=config.data.label_column,
        download=config.data.download,
        image_size=config.data.image_size,
        train_examples=config.data.train_examples,
        test_examples=config.data.test_examples,
        decode=PARTS if decode else (),
        copies=copies,
        progress=progress,
        check=fitting.check,
        home=config.data.home,
        cache=config.data.cache,
        on_broken=config.data.on_broken,
    )
    for note in fitting.notes if progress else ():
        progress.say(f"note: {note}")
    config = fitting.config.replace(data=fitting.config.data.replace(**data.columns))
    validation = config.data.validation_examples, config.data.validation_seed
    train, validation = validation_split(data.train, *validation, in_place=True)
    reading = Reading(progress)
    training = with_extra(train, config.data, data.class_names, reading)
    reading.report()
    an_epoch = train if config.data.extra and config.data.extra.batch_share else training
    problems = [*batch_problems(config, len(an_epoch)), *_rst_problems(config, training)]
    if problems:
        raise ConfigError(problems)
    test = data.test if config.evaluation.examples is None else data.test.first(config.evaluation.examples)
    splits = {"train": training, "validation": validation, "test": test}
    plan = make_plan(config, len(an_epoch))
    notes = *data.notes, *reading.notes, *fitting.notes
    warnings = tuple(radius_warnings(config, training.shape))
    for warning in warnings if progress else ():
        progress.say(f"warning: {warning}")
    setup = RunSetup(
        plan, splits, data.class_names, len(training) - len(train), notes, warnings, factory=network, own=own
    )
    if config.model.weights is not None:
        setup = setup.with_initial_weights(stored)
        for note in setup.notes[len(notes) :] if progress else ():
            progress.say(note)
    network = setup.build_network()  # raises if the images do not fit the model
    if is_other(config.model.name) or plan.smallest_batch == 1:
        _try_training(network, setup)
    try_own_methods(network, setup)
    for name, learner in config.base_learners.items():
        if getattr(learner.objective, "freeze_head", False) and classifier_name(network) is None:
            raise ConfigError(
                f"base_learners.{name}.objective.freeze_head: expected a network with a linear layer that computes the "
                f"logits, {config.model.name} has none"
            )
    if (workers := [name for name, learner in config.base_learners.items() if learner.workers != 1]) and (
        layers := per_process_layers(network)
    ):
        raise ConfigError(f"base_learners.{workers[0]}.workers: expected 1, because of the layer {layers[0]}")
    targets, files = read_targets(setup)
    setup = replace(setup, targets=targets)
    if not decode:
        return setup
    identity, repeated = identify(splits)
    for part, names in (data.broken | reading.broken).items():
        record = identity["test" if part == "test" else "train"]
        record["broken"] = [*record.get("broken", ()), *names]
    for note in repeated if progress else ():
        progress.say(f"data: {note}")
    if setup.initial is not None:
        identity["initial weights"] = setup.initial.record
    identity |= files
    return replace(setup, notes=(*setup.notes, *repeated), identity=identity)


def _gradual(number, shape, device):
    """(number, *shape): images of all brightnesses, for trials."""
    return torch.linspace(0, 1, number * math.prod(shape), device=device).reshape(number, *shape)


def _try_training(network, setup):
    """A forward pass in train mode: networks of others may return something else there, BatchNorm refuses one image."""
    model, number = setup.config.model, min(2, setup.plan.smallest_batch)
    size = f"a batch of {number} (training.batch_size, training.drop_last)"
    with errors_as(f"model.name: {model.name} cannot be trained on {size}"), torch.random.fork_rng(devices=[]):
        x = _gradual(number, setup.splits["train"].shape, next(network.parameters()).device)
        found = network.train()(x)
    if not bool(found.isfinite().all()):
        raise ConfigError(
            f"model.name: expected finite logits, those of {model.name} are NaN or infinite in train mode"
        )
    if found.shape != (number, len(setup.class_names)):
        raise ConfigError(
            f"model.name: expected {model.name} to return logits of shape {(number, len(setup.class_names))} in train "
            f"mode, got {tuple(found.shape)}"
        )


def _rst_problems(config, training):
    """A line for each objective that weighs pseudo-labelled images apart, if no image is marked so."""
    for name, learner in config.base_learners.items():
        if getattr(learner.objective, "needs_pseudo_labels", False) and training.labelled is None:
            yield (
                "data.extra.path: expected images that are marked as pseudo-labelled (`pseudo`, as genray.label writes "
                f"it), which base_learners.{name}.objective weighs apart, came none"
            )
