"""Reads model files of genray and of the published adversarial-training codes into genray's networks.

Producers differ in the container around the weights, in key prefixes, in a dead first group of wide resnets and in
where inputs are normalised. `read_checkpoint` undoes all four, `load_into` then loads strictly. Only tensors are read:
nothing a file contains is ever executed.
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genray.core.seal import SEAL_BYTES, check_seal, is_sealed
from genray.errors import CheckpointError, ConfigError, RunFolderError
from genray.models import MODELS
from genray.models.normalize import CIFAR10_MEAN, CIFAR10_STD, Normalize, set_normalization
from genray.storage import Storage

MODEL_FORMAT = "genray-model/1"
CONTAINER_KEYS = ("state_dict", "model_state_dict", "rmodel", "net", "model", "model_state", "weights", "params")
PREFIXES = ("module.", "model.")
RST_STD = (0.2023, 0.1994, 0.2010)  # RST's own first layer; its mean is CIFAR10_MEAN
MEAN, STD = "normalize.mean", "normalize.std"

_MAX_NESTING = 4
_NAMES_SHOWN = 3
# A normalising layer is either buffers of the outermost module or the first child beside the network proper.
_STATISTIC = re.compile(r"(?:(?:normalize|normalizer|normalization|norm|0)\.)?(mean|std|mu|sigma)")
_STATISTIC_NAME = {"mean": MEAN, "mu": MEAN, "std": STD, "sigma": STD}
_CLASS_COUNTS = {"n_classes", "num_classes"}


@dataclass(frozen=True)
class ModelFile:
    """A model file that was read: what it holds, tensors and plain containers only, and how messages name it."""

    content: object
    where: str


def read_checkpoint(source: Any) -> dict[str, Tensor]:
    """Reads the weights out of a model file, on the CPU, under the plain keys of genray's networks.

    Args:
        source: path or URI of a file, or a `ModelFile`, written by genray, Generalist, SEAT, TRADES, MART, FAT, RST,
            Rice et al., AWP, TMLlib, RobustBench or MAIR, or any state dict in one of their containers.

    Returns:
        name -> tensor. Where the file says how inputs are normalised, that is added as `normalize.mean` and
        `normalize.std`, each (C,); `load_into` knows what to do with them.

    Raises:
        CheckpointError: absent, empty, truncated or foreign file, a file with objects other than tensors, or one
            without a state dict; the message is one line and names the file.
    """
    file = read_file(source)
    return _plain_state(file.content, file.where)


def read_metadata(source: Any) -> dict:
    """What genray wrote beside the weights of a `model.pt`; empty for files of other producers."""
    raw = read_file(source).content
    is_ours = isinstance(raw, Mapping) and raw.get("format") == MODEL_FORMAT
    return dict(raw.get("metadata") or {}) if is_ours else {}


def load_into(
    model: nn.Module,
    source: Any,
    *,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Loads a model file or state dict into a network; afterwards the network takes images in [0, 1].

    Nothing is changed unless everything fits. The train / eval mode stays as it is.

    Args:
        model: from `build_model`, on any device.
        source: path or URI of a model file, a `ModelFile`, or a state dict.
        normalize: how the weights expect their input. None: as the file says, and where it says nothing as the
            model was built. "cifar10" (needed for files of Rice et al., AWP and TMLlib, which do not carry their
            statistics), "none", or a (mean, std) pair overrule file and model.

    Raises:
        CheckpointError: see `read_checkpoint`; or names or shapes differ, weights are not finite, or the file and
            the model disagree about normalisation.
        ConfigError: `normalize` is none of the above.
    """
    file = ModelFile(source, "state dict") if isinstance(source, Mapping) else read_file(source)
    state, where = _plain_state(file.content, file.where), file.where
    from_file = (state.pop(MEAN), state.pop(STD)) if MEAN in state else None
    for name in model.state_dict():
        if name.endswith(".num_batches_tracked"):  # files from before torch 0.4.1 lack it, and no result depends on it
            state.setdefault(name, torch.tensor(0))
    _check_fit(model, state, where)
    first_layer = _first_layer(model, normalize, from_file, where)
    model.load_state_dict(state, strict=True)
    if first_layer is not None:
        set_normalization(model, *first_layer)
    elif normalize == "none":
        model.normalize = nn.Identity()


def guess_architecture(state: Mapping[str, Tensor]) -> str | None:
    """Name of the registered architecture whose keys and shapes, at some width, are those of a plain state dict.

    WRN-32-10 and WRN-34-10 are one network; the answer is then "wrn_34_10". None if no architecture fits.
    """
    fit = _fitting_architecture(state)
    return fit[0] if fit else None


# ---- the file


class _Discarded:
    """Stands in for NumPy scalars, arrays and parsed arguments saved beside the weights (accuracies, mostly).

    They are not wanted, and NumPy's own constructors were not written for hostile input.
    """

    def __init__(self, *args):
        pass

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


_STAND_INS = [
    (_Discarded, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
    )
]


def read_file(source: Any) -> ModelFile:
    """Reads a model file once, for all that is asked of it.

    Args:
        source: path, URI or `Storage` of the file; a `ModelFile` is given back.

    Raises:
        CheckpointError: as of `read_checkpoint`.
    """
    if isinstance(source, ModelFile):
        return source
    try:
        place = Storage(source)
        if not place.is_file():
            raise CheckpointError(f"{place}: {'cannot be read (is a folder)' if place.exists() else 'no such file'}")
        with place.fetch() as path:
            return ModelFile(_read(path, str(place)), str(place))
    except RunFolderError as error:
        raise CheckpointError(str(error)) from None


def _read(path, where):
    """The content of a torch file, tensors and plain containers only."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror or error})") from None
    _refuse_foreign(where, head)
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, it then refuses: the error below says it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything, and all of it means the same to the user
        raise CheckpointError(f"{where}: {_reason(error, head)}") from error
    _check_seal(path, where)
    return content


def _check_seal(path, where):
    """Files of genray end with a checksum; those of others, or saved anew by hand, have none."""
    with open(path, "rb") as file:
        file.seek(-min(SEAL_BYTES, path.stat().st_size), os.SEEK_END)
        if not is_sealed(file.read()):
            return
    try:
        check_seal(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{where}: is corrupt or truncated ({error})") from None


def _refuse_foreign(where: str, head: bytes) -> None:
    text = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{where}: the file is empty")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(f"{where}: is a web page (HTML), not a model file; the download went wrong")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{where}: is a Git LFS pointer, not the model file itself; run `git lfs pull`")


def _reason(error: Exception, head: bytes) -> str:
    text = " ".join(str(error).split())
    is_zip, is_pickle = head.startswith(b"PK"), head.startswith(b"\x80")
    named = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", text)
    # torch's reader stops at the first instruction that only objects or newer pickles need.
    if named or "TorchScript" in text or ("Weights only load failed" in text and (is_zip or is_pickle)):
        found = f" ({named[1]})" if named else " (or is damaged)"
        return f"contains code or objects other than tensors{found}, refused; save model.state_dict() instead"
    if is_zip or is_pickle:
        return f"is corrupt or truncated ({text[:120] or type(error).__name__})"
    return "is not a PyTorch model file"


# ---- the layout


def _plain_state(raw: object, where: str) -> dict[str, Tensor]:
    """Unwraps, strips prefixes, drops what no forward pass uses and puts input statistics under one name."""
    state, stated = _unwrap(raw, where)
    statistics = {}
    while True:
        for name in list(state):
            if match := _STATISTIC.fullmatch(name):
                statistics[_STATISTIC_NAME[match[1]]] = state.pop(name).detach().flatten().float()
            elif name in _CLASS_COUNTS:
                del state[name]
        # In nn.Sequential(normalising layer, network) the network's prefix is its place.
        prefixes = (*PREFIXES, "1.") if statistics else PREFIXES
        prefix = next((p for p in prefixes if state and all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if any(name.startswith("block1.layer.") for name in state):
        state = {name: value for name, value in state.items() if not name.startswith("sub_block1.")}
    statistics = statistics or stated
    if len(statistics) == 1:
        raise CheckpointError(f"{where}: holds {next(iter(statistics))} but not the other half of the normalisation")
    return {name: value.detach() for name, value in state.items()} | statistics


def _unwrap(raw: object, where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The innermost state dict, and the input statistics that the containers around it state in words."""
    stated: dict[str, Tensor] = {}
    for _ in range(_MAX_NESTING):
        if _is_state_dict(raw):
            return dict(raw), stated
        if not isinstance(raw, Mapping):
            break
        key = next((k for k in CONTAINER_KEYS if isinstance(raw.get(k), Mapping)), None)
        if key is None:
            break
        stated = _stated_statistics(raw, where) or stated
        # MAIR's outer mean and std are notes: its forward pass does not use them.
        notes = ("mean", "std") if key == "rmodel" else ()
        raw = {name: value for name, value in raw[key].items() if name not in notes}
    found = f"it is a {type(raw).__name__}"
    if isinstance(raw, Mapping):
        found = f"its top-level keys are {_listed(map(str, raw))}" if raw else "it is empty"
    raise CheckpointError(f"{where}: holds no state dict of tensors; {found}")


def _stated_statistics(container: Mapping, where: str) -> dict[str, Tensor]:
    given = (CIFAR10_MEAN, RST_STD) if container.get("normalize_input") is True else (None, None)
    if "format" in container:
        if container["format"] != MODEL_FORMAT:
            raise CheckpointError(f"{where}: expected format {MODEL_FORMAT}, got {container['format']!r}")
        architecture = (container.get("metadata") or {}).get("architecture") or {}
        given = architecture.get("mean"), architecture.get("std")
    return {name: torch.tensor(values) for name, values in zip((MEAN, STD), given, strict=True) if values is not None}


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(entry, Tensor) for entry in value.values())
    )


# ---- the fit


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    wanted = model.state_dict()
    unexpected = [name for name in state if name not in wanted]
    missing = [name for name in wanted if name not in state]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds.items() if names]
    if faults:
        fit = _fitting_architecture(state)
        hint = "; no architecture known to genray fits it" if fit is None else f"; it fits {fit[0]} ({fit[1]})"
        raise CheckpointError(f"{where}: does not fit the model: {', '.join(faults)}{hint}")
    for name, value in state.items():
        if value.is_meta or value.is_quantized or value.layout is not torch.strided:
            raise CheckpointError(f"{where}: {name} is not an ordinary dense tensor")
        if not value.isfinite().all():
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values")


def _first_layer(model, normalize, from_file, where) -> tuple[Tensor, Tensor] | None:
    """The (mean, std) to put before the network, or None to leave its first layer alone."""
    if normalize == "none":
        return None
    if normalize == "cifar10":
        normalize = (CIFAR10_MEAN, CIFAR10_STD)
    if isinstance(normalize, str) or (normalize is not None and len(normalize) != 2):
        raise ConfigError(f'normalize: expected "cifar10", "none" or (mean, std), got {normalize!r}')
    pair = from_file if normalize is None else normalize
    if pair is None:
        return None
    try:
        layer = Normalize(*pair)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    if layer.mean.numel() not in (1, channels):
        raise CheckpointError(f"{where}: normalises {layer.mean.numel()} channels, the model takes {channels}")
    if normalize is None and isinstance(model.normalize, Normalize):
        _refuse_disagreement(model.normalize, layer, where)
    return layer.mean.flatten(), layer.std.flatten()


def _refuse_disagreement(built: Normalize, stated: Normalize, where: str) -> None:
    pairs = ((built.mean, stated.mean), (built.std, stated.std))
    if not all(torch.allclose(a.cpu(), b, atol=1e-3) for a, b in pairs):
        raise CheckpointError(
            f"{where}: normalises with {stated.extra_repr()}, but the model was built with "
            f"{built.extra_repr()}; pass normalize=(mean, std) to decide"
        )


_STEM_AND_HEAD = (
    ("conv1.weight", "linear.weight"),
    ("conv1.weight", "fc.weight"),
    ("feature_extractor.conv1.weight", "classifier.fc3.weight"),
)


def _fitting_architecture(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(name, its size in words), found by building each candidate without memory and comparing names and shapes."""
    for stem, head in _STEM_AND_HEAD:
        if stem in state and head in state and state[stem].ndim == 4 and state[head].ndim == 2:
            first = state.get("block1.layer.0.conv1.weight", state[stem])
            width = first.shape[0] // (1 if first is state[stem] else 16)
            size = {"num_classes": state[head].shape[0], "in_channels": state[stem].shape[1], "width": width}
            for name in MODELS if width else ():
                if name != "wrn_32_10" and any(_same_shapes(state, other) for other in _candidates(name, size)):
                    return name, f"width {width}, {size['in_channels']} input channels, {size['num_classes']} classes"
    return None


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


def _listed(names) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
