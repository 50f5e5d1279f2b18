"""Initial weights from a file (`model.weights`), and the parameters that are not trained (`model.freeze`)."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from genray.config.schema import ModelConfig
from genray.errors import CheckpointError, ConfigError, RunFolderError
from genray.interop.checkpoint_file import read_file
from genray.interop.checkpoint_layouts import Checkpoint, matching_state, open_checkpoint
from genray.interop.load import model_file
from genray.models.fit import check_fit, listed
from genray.models.normalize import MEAN, STD
from genray.models.other_networks import OtherNetwork, classifier_name
from genray.storage import Storage


@dataclass(frozen=True)
class InitialWeights:
    """Attributes:
    state: name -> tensor, parameters and buffers of the network that are read from the file.
    record: {"path", "sha256", "loaded": number of tensors, "new": names, "left_out": names}, plain data.
    mean, std: the normalisation of the run's network, of those in a checkpoint.
    """

    state: dict[str, Tensor] = field(repr=False)
    record: dict
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of_checkpoint(cls, state: dict | None) -> "InitialWeights | None":
        """Those of a checkpoint that has what `for_checkpoint` gave."""
        if not state or "initial" not in state:
            return None
        initial = state["initial"]
        tensors = {name: torch.as_tensor(value) for name, value in initial["constants"].items()}
        return cls(tensors, initial["record"], *(part and tuple(part) for part in initial["normalisation"]))

    def for_checkpoint(self, network: nn.Module, config: ModelConfig) -> dict:
        """What a resumed run needs of the file, beside the learners' states: what no step changes.

        Args:
            network: of the run.
            config: its `model` section.
        """
        normalisation = [part and list(part) for part in (config.mean, config.std)]
        return {"constants": constants(network), "record": self.record, "normalisation": normalisation}

    def load_into(self, network: nn.Module):
        """Overwrites the network's tensors of these names."""
        _inner(network).load_state_dict(self.state, strict=False)

    @property
    def note(self) -> str:
        """One line: the loaded, new and left-out tensors."""
        record = self.record
        said = [f"{record['loaded']} tensors of {record['path']} (sha256 {record['sha256'][:12]})"]
        said += [f"new: {listed(record['new'])}"] if record["new"] else []
        said += [f"left out: {listed(record['left_out'])}"] if record["left_out"] else []
        return f"initial weights: {'; '.join(said)}"


def constants(network: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of a network's state that no step changes: frozen parameters, and masks and the like."""
    parameters = {name: p.data for name, p in _inner(network).named_parameters() if not p.requires_grad}
    state = _inner(network).state_dict()
    return {name: b for name, b in state.items() if b.dtype not in (torch.float32, torch.int64)} | parameters


def read_initial_weights(
    config: ModelConfig, build: Callable[[ModelConfig], nn.Module], stored: InitialWeights | None = None
):
    """Reads `model.weights`.

    Args:
        config: with `weights`; with `new_head`, the layer that computes the logits keeps its random weights.
        build: () -> a network of the run, for a given `model` section.
        stored: of the checkpoint of a resumed run, which serve where the file is gone.

    Returns:
        (`InitialWeights`, the configuration with the normalisation that the file states).

    Raises:
        CheckpointError, ConfigError: the file cannot be read or does not fit the network.
    """
    try:
        place = model_file(Storage(config.weights))
        if stored is not None and not place.exists():
            return stored, config.replace(mean=stored.mean, std=stored.std)
        file = read_file(place)
        checkpoint = open_checkpoint(file)
    except (CheckpointError, RunFolderError) as error:
        raise type(error)(f"model.weights: {error}") from None
    config = _normalised(config, checkpoint, file.where)
    network = build(config)
    wanted = _inner(network).state_dict()
    state = matching_state(network, checkpoint)
    head = _head(network, wanted)
    if config.new_head and not head:
        raise ConfigError(f"model.new_head: expected a linear layer that computes the logits, {config.name} has none")
    shapes = {name: (tuple(state[name].shape), tuple(wanted[name].shape)) for name in head if name in state}
    differing = next((name for name, (there, here) in shapes.items() if there != here), None)
    if differing and not config.new_head:
        there, here = shapes[differing]
        raise ConfigError(
            f"model.weights: {file.where}: {differing} is {there}, the run's {here}; model.new_head: true makes it anew"
        )
    new = head if config.new_head else []
    left_out = [name for name in state if name not in wanted or name in new] if config.new_head else []
    kept = {name: value for name, value in state.items() if name not in left_out}
    for name in wanted:  # files from before torch 0.4.1 lack these
        if name.endswith(".num_batches_tracked") and name not in kept:
            kept[name] = wanted[name]
    expected = {name: wanted[name] for name in wanted if name not in new}
    check_fit(expected, kept, f"model.weights: {file.where}")
    record = {**identity_of(place), "loaded": len(kept), "new": new, "left_out": left_out}
    return InitialWeights({name: value.clone() for name, value in kept.items()}, record), config


def identity_of(place: Storage) -> dict:
    """{"path", "sha256"} of a file."""
    with place.fetch() as path, open(path, "rb") as opened:
        return {"path": str(place), "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def freeze(network: nn.Module, patterns) -> list[str]:
    """Freezes the parameters whose names match one of the patterns.

    Returns:
        Names of all frozen parameters.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    named = dict(_inner(network).named_parameters())
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"model.freeze: expected patterns of parameter names ({listed(named)}), got {pattern!r}")
        for name in matched:
            named[name].requires_grad_(False)
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if patterns and len(frozen) == len(named):
        raise ConfigError("model.freeze: expected patterns that leave parameters to train, all are frozen")
    return frozen


def _inner(network):
    """The module whose tensors have the library's names."""
    return network.body if isinstance(network, OtherNetwork) else network


def _head(network, wanted):
    """Names of the tensors of the layer that computes the logits."""
    name = classifier_name(network)
    if name is None:
        return []
    name = name.removeprefix("body.") if isinstance(network, OtherNetwork) else name
    return [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in wanted]


def _normalised(config: ModelConfig, checkpoint: Checkpoint, where) -> ModelConfig:
    """The configuration with the normalisation that the file states; refuses another one."""
    if not checkpoint.statistics:
        return config
    mean, std = (tuple(checkpoint.statistics[name].tolist()) for name in (MEAN, STD))
    if config.mean is None:
        return config.replace(mean=mean, std=std)
    if any(abs(a - b) > 1e-3 for a, b in zip((*config.mean, *config.std), (*mean, *std))):
        raise CheckpointError(
            f"model.weights: {where}: expects inputs normalised by {mean} and {std}, model.mean and std are others"
        )
    return config
