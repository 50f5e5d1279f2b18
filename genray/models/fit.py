"""Which networks a state dict fits: by names and shapes alone, without memory for weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genray.errors import CheckpointError
from genray.models import MODELS
from genray.models.normalize import MEAN, STD

SAME_NETWORK = {"wrn_32_10": "wrn_34_10"}  # two names in papers, see `MODELS`
NAMES_SHOWN = 3

_STEM_AND_HEAD = (
    ("conv1.weight", "linear.weight"),
    ("conv1.weight", "fc.weight"),
    ("feature_extractor.conv1.weight", "classifier.fc3.weight"),
)


def fitting_architectures(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the registered networks whose names and shapes, at some width, are those of a plain state dict.

    Several are variants of one network that no tensor tells apart: another activation, another path of the shortcut.
    """
    return _fit(state)[0]


def check_fit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Whether a state dict has the names and shapes of a network's, `wanted`, and finite values.

    Raises:
        CheckpointError: names or shapes differ, or values are not finite or not ordinary; the line begins with `where`.
    """
    unexpected = [name for name in state if name not in wanted]
    missing = [name for name in wanted if name not in state]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]
    if faults:
        names, size = _fit(state)
        hint = f"; it fits {' or '.join(names)} ({size})" if names else "; no architecture known to genray fits it"
        raise CheckpointError(f"{where}: does not fit the model: {', '.join(faults)}{hint}")
    for name, value in state.items():
        if value.is_meta or value.is_quantized or value.layout is not torch.strided:
            raise CheckpointError(f"{where}: {name} is not an ordinary dense tensor")
        if not value.isfinite().all():
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values")


def _fit(state: Mapping[str, Tensor]) -> tuple[list[str], str]:
    """(names, their size in words)."""
    for stem, head in _STEM_AND_HEAD:
        if stem in state and head in state and state[stem].ndim == 4 and state[head].ndim == 2:
            first = state.get("block1.layer.0.conv1.weight", state[stem])
            width = first.shape[0] // (1 if first is state[stem] else 16)
            size = {"num_classes": state[head].shape[0], "in_channels": state[stem].shape[1], "width": width}
            names = [
                name
                for name in (MODELS if width else ())
                if name not in SAME_NETWORK and any(_same_shapes(state, other) for other in _candidates(name, size))
            ]
            if names:
                return names, f"width {width}, {size['in_channels']} input channels, {size['num_classes']} classes"
    return [], ""


def _candidates(name: str, size: dict[str, int]) -> list[nn.Module]:
    with torch.device("meta"):
        if name != "small_cnn":
            return [MODELS[name](**size)]
        return [MODELS[name](**size, image_size=(28, 28), batch_norm=batch_norm) for batch_norm in (False, True)]


def _same_shapes(state: Mapping[str, Tensor], other: nn.Module) -> bool:
    def shapes(tensors):
        # SmallCNN's first linear layer depends on the image size, which a state dict does not tell.
        return {
            name: None if name == "classifier.fc1.weight" else value.shape
            for name, value in tensors.items()
            if name not in (MEAN, STD) and not name.endswith(".num_batches_tracked")
        }

    return shapes(state) == shapes(other.state_dict())


def listed(names) -> str:
    """The first of many names, as text."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
