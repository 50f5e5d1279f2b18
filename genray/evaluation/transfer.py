"""The networks on which the images of the transfer columns are made."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from genray.attacks.transfer import TRANSFER, TRANSFER_FROM
from genray.data.splits import ImageData, Split
from genray.errors import CheckpointError, ConfigError, DataError
from genray.evaluation.contract import as_network
from genray.evaluation.job import as_pixels
from genray.evaluation.sources import TRIED, FileOptions, model_of_file
from genray.interop.checkpoint_file import read_file
from genray.interop.load import model_file
from genray.interop.origin import origin_of
from genray.recording.run_folder import LEARNERS
from genray.storage import Storage


def transfer_networks(attacks, transfer: Any, images, labels, num_classes: int):
    """Reads the networks of all transfer columns.

    Args:
        attacks: names of columns.
        transfer: a run folder, whose base learners they are, or name -> network, run folder or model file.
        images, labels: of the evaluation.
        num_classes: K.

    Returns:
        (networks, findings): column -> name -> network, and what model files leave open, one sentence each.

    Raises:
        InputError: a file cannot be read, or a network does not take the images.
    """
    given: dict[str, Mapping] = {TRANSFER: _given(transfer)} if TRANSFER in attacks else {}
    for column in dict.fromkeys(attacks):
        if column.startswith(TRANSFER_FROM):
            place = column.removeprefix(TRANSFER_FROM)
            given[column] = {place: place}
    pixels, tried = as_pixels(images[:32]), (as_pixels(images[:TRIED]) * 255).round().to(torch.uint8)
    split = Split(tried, labels[:TRIED])
    data = ImageData(split, split, tuple(map(str, range(num_classes))), "given")
    found: dict[str, dict[str, nn.Module]] = {}
    findings = []
    for column, networks in given.items():
        found[column] = {}
        for name, network in networks.items():
            if not callable(network):
                network = model_of_file(FileOptions(), read_file(model_file(Storage(network))), data)
                findings += [f"{column}: {text}" for text in origin_of(network).findings]
            found[column][name] = _checked(f"{column}: {name}", network, pixels, num_classes)
    return found, findings


def _given(transfer) -> Mapping:
    if isinstance(transfer, Mapping):
        if not transfer:
            raise ConfigError("transfer: expected at least one network, got none")
        return transfer
    folder = Storage(transfer)
    if not folder.is_folder():
        raise CheckpointError(f"{folder}: expected a run folder for the column transfer; of a file, transfer_from=FILE")
    names = [name.removesuffix(".pt") for name in folder.names(LEARNERS) if name.endswith(".pt")]
    if not names:
        raise CheckpointError(
            f"{folder}: expected base learners in {LEARNERS}/ for the column transfer, there are none"
        )
    return {name: folder / f"{LEARNERS}/{name}.pt" for name in names}


def _checked(what, network, pixels, num_classes):
    try:
        network, logits, _ = as_network(network, pixels)
    except DataError as error:
        raise DataError(f"{what}: {str(error).removeprefix('model: ')}") from None
    if logits.shape[1] != num_classes:
        raise DataError(f"{what}: expected logits of {num_classes} classes as the model's, got {logits.shape[1]}")
    return network.eval()
