"""The target networks that objectives `anchor` read from files (`objective.target.model`)."""

import torch

from genray.errors import CheckpointError, ConfigError, RunFolderError, one_line
from genray.interop.load import load_model, model_file
from genray.run.initial_weights import identity_of
from genray.storage import Storage


def read_targets(setup) -> tuple[dict[str, torch.nn.Module], dict[str, dict]]:
    """Loads the target networks of a run.

    Args:
        setup: its `RunSetup`, with the images.

    Returns:
        (learner name -> network, entries of the run's identity: {"path", "sha256"} of each file).

    Raises:
        CheckpointError, ConfigError, RunFolderError: a file cannot be read, or its network does not fit the data.
    """
    networks, files = {}, {}
    shape, expected = setup.splits["train"].shape, (1, len(setup.class_names))
    for name, learner in setup.config.base_learners.items():
        target = learner.target
        if target is None or target.model is None:
            continue
        where = f"base_learners.{name}.objective.target.model"
        try:
            place = model_file(Storage(target.model))
            networks[name], files[f"target of {name}"] = load_model(place, network=setup.factory), identity_of(place)
        except (CheckpointError, RunFolderError) as error:
            raise type(error)(f"{where}: {error}") from None
        try:
            with torch.no_grad():
                found = tuple(networks[name](torch.zeros(1, *shape)).shape)
        except RuntimeError as error:
            raise ConfigError(f"{where}: {place} cannot take images of {tuple(shape)}: {one_line(error)}") from None
        if found != expected:
            raise ConfigError(f"{where}: expected a network with logits of shape {expected}, got {found}")
    return networks, files
