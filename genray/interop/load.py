"""Loads a trained model from a run folder or a `model.pt`."""

from collections.abc import Callable

import torch

from genray.core.user_code import allow_import
from genray.errors import CheckpointError, ConfigError, one_line
from genray.interop.checkpoint_file import ModelFile, read_file
from genray.interop.checkpoint_layouts import load_into, read_metadata
from genray.interop.safetensors_file import SAFETENSORS
from genray.models import build_model
from genray.storage import Storage


def load_model(path, device="cpu", *, network=None, trust: bool = False) -> torch.nn.Module:
    """As `genray.load_model`, which describes and checks the arguments."""
    place = _device(device)
    return model_of(read_file(model_file(Storage(path))), network, trust).to(place)


def model_file(place: Storage) -> Storage:
    """Returns the model file of a run folder, or of one on the Hub, or the given model file."""
    if not place.is_folder():
        return place
    return place / SAFETENSORS if place.is_file(SAFETENSORS) and not place.is_file("model.pt") else place / "model.pt"


def model_of(file: ModelFile, network: Callable | None = None, trust: bool = False) -> torch.nn.Module:
    """Returns the network of a model file as `load_model` does, on the CPU."""
    architecture = read_metadata(file).get("architecture")
    if not isinstance(architecture, dict):
        raise CheckpointError(f"{file.where}: expected a model written by genray, which says its architecture")
    if trust:
        allow_import(architecture.get("name", ""))
    try:
        model = build_model(**architecture, factory=network)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{file.where}: its architecture cannot be built: {error}") from None
    load_into(model, file)
    return model.eval()


def _device(name):
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises all of these
        raise ConfigError(
            f"device: expected cpu, cuda or another device of torch, got {name!r}: {one_line(error)}"
        ) from None
