"""Reads model files of genray and of the published adversarial-training codes into genray's networks.

Producers differ in the container around the weights, in key prefixes, in a dead first group of wide resnets and in
where inputs are normalised. `open_checkpoint` undoes all four, `load_into` then loads strictly. Only tensors are read:
nothing a file contains is ever executed. What a file leaves open is a finding of the model's `origin`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from genray.errors import CheckpointError, ConfigError
from genray.interop.checkpoint_file import read_file
from genray.interop.origin import Origin
from genray.models.fit import check_fit, listed
from genray.models.normalize import CIFAR10_MEAN, MEAN, NORMALIZATIONS, STD, Normalize, set_normalization
from genray.models.other_networks import OtherNetwork

MODEL_FORMAT = "genray-model/1"
# Where a file holds several state dicts, the first of these is taken. Any other key may hold the only one.
CONTAINER_KEYS = ("state_dict", "model_state_dict", "rmodel", "net", "model", "model_state", "weights", "params")
RST_STD = (0.2023, 0.1994, 0.2010)  # RST's own first layer; its mean is CIFAR10_MEAN

_MAX_NESTING = 4
# A normalising layer is either buffers of the outermost module or a child beside the network proper.
_STATISTIC = re.compile(r"(?:\w+\.)?_?(?:image_|pixel_)?(mean|std|mu|sigma)")
_STATISTIC_NAME = {"mean": MEAN, "mu": MEAN, "std": STD, "sigma": STD}
_COUNTS = {"n_classes", "num_classes", "n_averaged"}
# An attribute of an exported state dict, JSON text: no loader sees it, so that the names stay those of other codes.
ATTRIBUTE = "genray_metadata"
# torch puts these into the middle of names; `module` and all others stand before whole state dicts.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a model file, under the keys of genray's networks and on the CPU.

    Attributes:
        state: name -> tensor.
        statistics: `normalize.mean` and `normalize.std`, each (C,), where the file says how inputs are normalised.
        says_normalization: whether it says that, or that they are not.
        metadata: what genray wrote beside the weights.
        findings: what else the file leaves open, one sentence each.
    """

    state: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    says_normalization: bool = False
    metadata: Mapping = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    stored: dict[str, Tensor] = field(default_factory=dict)  # under the names that the file has


def matching_state(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint, under the file's own names if the network (or body) has exactly these."""
    inner, stored = model.body if isinstance(model, OtherNetwork) else model, checkpoint.stored
    while True:  # all names of a network of others may begin alike, so that wrappers go one by one
        for names in (inner.state_dict(), model.state_dict()):
            if names.keys() == stored.keys():
                return {name.removeprefix("body.") if inner is not model else name: t for name, t in stored.items()}
        if len({name.partition(".")[0] for name in stored}) != 1 or not all("." in name for name in stored):
            return dict(checkpoint.state)
        stored = {name.partition(".")[2]: t for name, t in stored.items()}


def open_checkpoint(source: Any, part: str | None = None) -> Checkpoint:
    """Reads a model file.

    Args:
        source: as of `read_file`: a file written by genray, Generalist, SEAT, TRADES, MART, FAT, RST, Rice et al.,
            AWP, TMLlib, RobustBench or MAIR, or any state dict in a container; or such content in memory.
        part: which weights, where there are several: a container's key such as "state_dict_ema", or the first part of
            the names in a state dict ("student" of `student.conv1.weight`).

    Raises:
        CheckpointError: see `read_file`; or there is no state dict, or no such part. The line names the file.
    """
    file = read_file(source)
    raw, where = file.content, file.where
    found = _take(list(_parts(raw)), part, raw, where)
    checkpoint = _plain(found, where)
    others = [other for other in _parts(raw) if other.name != found.name] if part is None else []
    rivals = [other.name for other in others if _is_rival(other, checkpoint, where)]
    if not rivals:
        return checkpoint
    doubt = f"the file holds several weights of one network: {found.name} was taken, not {' or '.join(rivals)}"
    return replace(checkpoint, findings=(f"{doubt}; --weights NAME decides",))


def read_metadata(source: Any) -> dict:
    """Returns the metadata of a `model.pt`; empty for files of other producers."""
    file = read_file(source)
    return _metadata(file.content, file.where)


def load_into(
    model: nn.Module,
    source: Any,
    *,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None,
    part: str | None = None,
) -> None:
    """Loads a model file or state dict into a network; afterwards the network takes images in [0, 1].

    Nothing is changed unless everything fits. The train / eval mode stays as it is. `model.origin` then says what the
    file says of the model and what it leaves open; `genray.evaluate` reads it.

    Args:
        model: from `build_model`, on any device.
        source: path or URI of a model file, a `ModelFile`, or a state dict.
        normalize: how the weights expect their input. None: as the file says, and where it says nothing as the
            model was built. "cifar10" (needed for files of Rice et al., AWP and TMLlib, which do not carry their
            statistics), "cifar100", "none", or a (mean, std) pair overrule file and model.
        part: as in `open_checkpoint`.

    Raises:
        CheckpointError: see `open_checkpoint`; or names or shapes differ, weights are not finite, or the file and
            the model disagree about normalisation.
        ConfigError: `normalize` is none of the above.
    """
    file = read_file(source)
    checkpoint, where = open_checkpoint(file, part), file.where
    state, inner = matching_state(model, checkpoint), model.body if isinstance(model, OtherNetwork) else model
    for name in inner.state_dict():
        if name.endswith(".num_batches_tracked"):  # files from before torch 0.4.1 lack it, and no result depends on it
            state.setdefault(name, torch.tensor(0))
    check_fit(inner.state_dict(), state, where)
    first_layer = _first_layer(model, normalize, checkpoint.statistics, where)
    try:
        origin = Origin.of(checkpoint.metadata)
    except ValueError as error:
        raise CheckpointError(f"{where}: says nothing legible of its model ({error})") from None
    inner.load_state_dict(state, strict=True)
    if first_layer is not None:
        set_normalization(model, *first_layer)
    elif normalize == "none":
        model.normalize = nn.Identity()
    findings = checkpoint.findings
    if normalize is None and not checkpoint.says_normalization and not isinstance(model.normalize, Normalize):
        findings += (UNKNOWN_NORMALIZATION,)
    model.origin = replace(origin, findings=findings)  # type: ignore[assignment]  # not a part of the network


UNKNOWN_NORMALIZATION = (
    "the file does not say how the network's input is normalised, and none was assumed; "
    f"--normalize none, {', '.join(NORMALIZATIONS)} or MEAN:STD decides"
)


# ---- the container


@dataclass(frozen=True)
class _StateDict:
    """A state dict in a file: under which keys, and the containers around it, the outermost first."""

    name: str
    state: Mapping[str, Tensor]
    around: tuple[Mapping, ...]


def _parts(raw: Any, keys: tuple[str, ...] = (), around: tuple = ()) -> Iterator[_StateDict]:
    """The state dicts of a file, the one to be taken first."""
    if _is_state_dict(raw):
        # Under an unknown key, a few scalars are a record of something.
        if not keys or keys[-1] in CONTAINER_KEYS or any(value.ndim > 1 for value in raw.values()):
            yield _StateDict(".".join(keys), raw, around)
    elif isinstance(raw, Mapping) and len(keys) < _MAX_NESTING:
        names = [name for name in raw if isinstance(name, str) and isinstance(raw[name], Mapping)]
        rank = {name: i for i, name in enumerate(CONTAINER_KEYS)}
        for name in sorted(names, key=lambda name: rank.get(name, len(rank))):
            # MAIR's outer mean and std are notes: its forward pass does not use them.
            notes = ("mean", "std") if name == "rmodel" else ()
            inner = raw[name] if not notes else {key: raw[name][key] for key in raw[name] if key not in notes}
            yield from _parts(inner, (*keys, name), (*around, raw))


def _take(parts: list[_StateDict], wanted: str | None, raw: object, where: str) -> _StateDict:
    if not parts:
        raise CheckpointError(f"{where}: holds no state dict of tensors; {_what(raw)}")
    if wanted is None:
        return parts[0]
    for part in parts:
        if wanted in (part.name, part.name.rpartition(".")[2]):
            return part
    for part in parts:
        begin = f"{wanted}."
        inner = {name: value for name, value in part.state.items() if name.startswith(begin)}
        if inner:
            return replace(part, state=inner)
    first = dict.fromkeys(name.partition(".")[0] for part in parts for name in part.state)
    there = [part.name for part in parts if part.name] or first
    raise CheckpointError(f"{where}: holds no weights called {wanted}, but {listed(there)}")


def _what(raw: Any) -> str:
    """What a file without a state dict holds."""
    for _ in range(_MAX_NESTING):
        key = next((k for k in CONTAINER_KEYS if isinstance(raw, Mapping) and isinstance(raw.get(k), Mapping)), None)
        if key is None:
            break
        raw = raw[key]
    if not isinstance(raw, Mapping):
        return f"it is a {type(raw).__name__}"
    return f"its top-level keys are {listed(map(str, raw))}" if raw else "it is empty"


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(entry, Tensor) for entry in value.values())
    )


def _is_rival(part: _StateDict, taken: Checkpoint, where: str) -> bool:
    """Whether a part holds other weights of the same network."""
    try:
        other = _plain(part, where).state
        same = other.keys() == taken.state.keys()
        same = same and all(other[name].shape == value.shape for name, value in taken.state.items())
        return same and not all(torch.equal(other[name], value) for name, value in taken.state.items())
    except (CheckpointError, RuntimeError):  # sparse tensors and the like, which are refused where they are taken
        return False


# ---- the layout


def _plain(part: _StateDict, where: str) -> Checkpoint:
    """Strips prefixes, drops what no forward pass uses and puts input statistics under one name."""
    state, statistics = _without_wrappers(part.state), {}
    while True:
        for name in list(state):
            if (match := _STATISTIC.fullmatch(name)) and state[name].is_floating_point() and state[name].numel() < 9:
                statistics[_STATISTIC_NAME[match[1]]] = state.pop(name).detach().flatten().float()
            elif name in _COUNTS:
                del state[name]
        # The names of a network of ours begin in several ways, so what all begin with is somebody's wrapper.
        prefixes = {name.partition(".")[0] for name in state if "." in name}
        if len(prefixes) != 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    if any(name.startswith("block1.layer.") for name in state):
        state = {name: value for name, value in state.items() if not name.startswith("sub_block1.")}
    stated, says = _stated(part, where)
    statistics = statistics or stated
    if len(statistics) == 1:
        raise CheckpointError(f"{where}: holds {next(iter(statistics))} but not the other half of the normalisation")
    state = {name: value.detach() for name, value in state.items()}
    metadata = next((found for raw in (part.state, *part.around) if (found := _metadata(raw, where))), {})
    stored = {name: value.detach() for name, value in _without_wrappers(part.state).items()}
    return Checkpoint(state, statistics, says or bool(statistics), metadata, stored=stored)


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: _WRAPPERS.sub("", name) for name in state}
    return (
        {names[name]: value for name, value in state.items()} if len(set(names.values())) == len(names) else dict(state)
    )


def _stated(part: _StateDict, where: str) -> tuple[dict[str, Tensor], bool]:
    """The input statistics that the containers state in words, and whether they state anything of them."""
    given, says = (None, None), False
    for container in (*part.around, part.state):
        if isinstance(container.get("normalize_input"), bool):  # RST
            given, says = (CIFAR10_MEAN, RST_STD) if container["normalize_input"] else (None, None), True
        architecture = _metadata(container, where).get("architecture")
        if isinstance(architecture, Mapping):
            given, says = (architecture.get("mean"), architecture.get("std")), "name" in architecture or says
    pairs = [(name, values) for name, values in zip((MEAN, STD), given, strict=True) if values is not None]
    try:
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in pairs}, says
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{where}: its normalisation is not two lists of numbers, but {given!r}") from None


def _metadata(raw: object, where: str) -> dict:
    if not isinstance(raw, Mapping):
        return {}
    if isinstance(text := getattr(raw, ATTRIBUTE, None), str):
        raw = {"format": MODEL_FORMAT, "metadata": _read_json(text)}
    elif "format" not in raw or isinstance(raw["format"], Tensor):
        return {}
    if raw["format"] != MODEL_FORMAT:
        raise CheckpointError(f"{where}: expected format {MODEL_FORMAT}, got {raw['format']!r}")
    found = raw.get("metadata")
    return dict(found) if isinstance(found, Mapping) else {}


def _read_json(text: str) -> object:
    """What `ATTRIBUTE` holds; None where it is damaged."""
    try:
        return json.loads(text)
    except ValueError:
        return None


# ---- the first layer


def _first_layer(model, normalize, statistics, where) -> tuple[Tensor, Tensor] | None:
    """The (mean, std) to put before the network, or None to leave its first layer alone."""
    if normalize == "none":
        return None
    pair = NORMALIZATIONS.get(normalize, normalize) if isinstance(normalize, str) else normalize
    if isinstance(pair, str) or (pair is not None and len(pair) != 2):
        known = ", ".join(f'"{name}"' for name in NORMALIZATIONS)
        raise ConfigError(f'normalize: expected {known}, "none" or (mean, std), got {normalize!r}')
    if pair is None:
        if not statistics:
            return None
        pair = statistics[MEAN], statistics[STD]
    try:
        layer = Normalize(*pair)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if layer.mean.max() > 1:
        raise CheckpointError(f"{where}: normalises with {layer.extra_repr()}, which is not on the pixel scale [0, 1]")
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), layer.mean.numel())
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
