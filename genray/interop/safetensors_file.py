"""Model files in the safetensors format: a header in JSON, which has the metadata of a run, and the tensors' bytes."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genray.errors import CheckpointError, ConfigError, one_line

SAFETENSORS = "model.safetensors"
FORMAT, KEY = "genray-model/1", "genray"
LONGEST_HEADER = 100_000_000  # of the format's own readers


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as this format does: the length of its header in 8 bytes, and the header, in JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def safetensors_bytes(state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A model file with the metadata of a run's model.

    Raises:
        ConfigError: safetensors is not installed.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    return _library().save(tensors, {"format": "pt", KEY: json.dumps(metadata)})


def read_safetensors(path, where: str) -> dict:
    """The content of a model file: as that of a `model.pt`, or a bare state dict without metadata of ours.

    Raises:
        CheckpointError: it is damaged, or safetensors is not installed.
    """
    try:
        library = _library()
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    try:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get(KEY)
        tensors = library.load_file(path)
        if described is None:
            return tensors
        return {"format": FORMAT, "state_dict": tensors, "metadata": json.loads(described)}
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointError(f"{where}: is corrupt or truncated ({one_line(error)})") from None


def _library():
    try:
        import safetensors.torch
    except ImportError:
        raise ConfigError("safetensors is not installed; pip install 'genray[hub]'") from None
    return safetensors.torch
