"""A trained model from a run folder or a `model.pt`."""

from pathlib import Path

import torch

from genray.errors import CheckpointError, ConfigError
from genray.models import build_model
from genray.models.checkpoint_layouts import load_into, read_metadata


def load_model(path, device="cpu") -> torch.nn.Module:
    """Loads the model of a genray run.

    Args:
        path: a run folder, or a `model.pt` in one.
        device: where the model is put.

    Returns:
        The network in eval mode: images (N, C, H, W) in [0, 1] -> logits (N, K).

    Raises:
        CheckpointError: absent, corrupt, or not written by genray (for other files: `build_model`, `load_into`).
    """
    file = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    architecture = read_metadata(file).get("architecture")
    if not isinstance(architecture, dict):
        raise CheckpointError(f"{file}: expected a model written by genray, which says its architecture")
    try:
        model = build_model(**architecture)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{file}: its architecture cannot be built: {error}") from None
    load_into(model, file)
    return model.to(device).eval()
