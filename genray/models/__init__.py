"""Networks by name. Every one takes images in [0, 1] and returns logits."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from genray.errors import ConfigError
from genray.models.normalize import CIFAR10_MEAN, CIFAR10_STD, Normalize, set_normalization
from genray.models.other_networks import build_other, is_other
from genray.models.preact_resnet import PreActResNet18
from genray.models.resnet import ResNet18
from genray.models.small_cnn import SmallCNN
from genray.models.wide_resnet import WideResNet

__all__ = ["CIFAR10_MEAN", "CIFAR10_STD", "MODELS", "Normalize", "build_model", "count_parameters", "set_normalization"]

MIN_IMAGE_SIDE = 8  # three halvings leave one pixel

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "resnet18": ResNet18,
    "preact_resnet18": partial(PreActResNet18, batch_norm_before_fc=True),
    "preact_resnet18_softplus": partial(PreActResNet18, batch_norm_before_fc=True, activation="softplus"),
    "preact_resnet18_no_bn": partial(PreActResNet18, batch_norm_before_fc=False),
    "preact_resnet18_no_bn_raw_shortcut": partial(PreActResNet18, batch_norm_before_fc=False, raw_shortcut=True),
    "wrn_28_10": partial(WideResNet, blocks_per_group=4),
    # Papers' "WRN-32-10" counts (depth - 2) / 6 blocks a group: the same network as WRN-34-10 under another name.
    "wrn_32_10": partial(WideResNet, blocks_per_group=5),
    "wrn_34_10": partial(WideResNet, blocks_per_group=5),
}
WITHOUT_CHOICE = ("small_cnn", "preact_resnet18_softplus")  # of an activation


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    width: int | None = None,
    batch_norm: bool = False,
    dropout: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: str = "relu",
    options: dict | None = None,
    seed: int | None = None,
    factory: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Builds a freshly initialised network, in train mode, on torch's default device (on CPU with a seed).

    Args:
        name: a key of `MODELS`, `timm:NAME`, `torchvision:NAME` or `package.module:FACTORY`.
        num_classes: K, the number of logits, at least 2.
        in_channels: channels of an image.
        image_size: (H, W), each at least 8.
        width: channels of the first stage (SmallCNN 32, ResNets 64) or the widen factor of a wide ResNet (10);
            None for the published width.
        batch_norm: BatchNorm after each convolution; `small_cnn` only, the others have it anyway.
        dropout: drop probability in [0, 1); `small_cnn` only, None for its published 0.5.
        mean: per-channel means on the [0, 1] scale, applied inside the network before its first layer. They are
            not part of the state dict, so whoever loads the weights again must give them again.
        std: per-channel standard deviations; given with `mean` or not at all.
        activation: "relu" or "silu" (swish); of our residual networks only.
        options: keyword arguments of a network that is not ours.
        seed: draws the initial weights reproducibly, without touching torch's global generators.
        factory: the callable that `name` refers to, so that nothing is imported.

    Returns:
        A module from (N, C, H, W) in [0, 1] to logits (N, K).

    Raises:
        ConfigError: unknown name or a value out of range; every problem is listed.
    """
    problems = _problems(name, num_classes, in_channels, image_size, width, batch_norm, dropout, mean, std, options)
    if activation != "relu" and (name in WITHOUT_CHOICE or is_other(name) or activation != "silu"):
        problems.append(f"activation: expected relu for {name}, or silu for our residual networks, got {activation}")
    if problems:
        raise ConfigError(problems)
    sizes: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    own: dict[str, Any] = {} if width is None else {"width": width}
    own |= {} if activation == "relu" else {"activation": activation}
    if name == "small_cnn":
        own |= {"image_size": tuple(image_size), "batch_norm": batch_norm}
        own |= {} if dropout is None else {"dropout": dropout}
    with contextlib.nullcontext() if seed is None else _private_randomness(seed):
        if is_other(name):
            model: nn.Module = build_other(name, **sizes, image_size=image_size, options=options, factory=factory)
        else:
            model = MODELS[name](**sizes, **own)
    if mean is not None:
        set_normalization(model, mean, std)
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars (buffers such as running statistics are not counted)."""
    return sum(parameter.numel() for parameter in model.parameters())


def _problems(name, num_classes, in_channels, image_size, width, batch_norm, dropout, mean, std, options) -> list[str]:
    ours = not is_other(name)
    checks = [
        (name in MODELS or not ours, f"model: expected one of {', '.join(MODELS)}, got {name!r}"),
        (num_classes >= 2, f"num_classes: expected at least 2, got {num_classes}"),
        (in_channels >= 1, f"in_channels: expected at least 1, got {in_channels}"),
        (
            len(image_size) == 2 and min(image_size) >= (MIN_IMAGE_SIDE if ours else 1),
            f"image_size: expected (height, width), each at least {MIN_IMAGE_SIDE}, got {tuple(image_size)}",
        ),
        (width is None or width >= 1, f"width: expected at least 1, got {width}"),
        (width is None or ours, f"width: only our own networks have this option, the model is {name}"),
        (not options or not ours, f"options: only networks of others have options, the model is {name}"),
        (not batch_norm or name == "small_cnn", f"batch_norm: only small_cnn has this option, the model is {name}"),
        (dropout is None or name == "small_cnn", f"dropout: only small_cnn has this option, the model is {name}"),
        (dropout is None or 0 <= dropout < 1, f"dropout: expected at least 0 and less than 1, got {dropout}"),
        ((mean is None) == (std is None), "mean and std: expected both or neither"),
    ]
    for field, values in (("mean", mean), ("std", std)):
        fits = values is None or len(values) == in_channels
        checks.append((fits, f"{field}: expected {in_channels} numbers, one a channel, got {values}"))
    return [problem for holds, problem in checks if not holds]


@contextlib.contextmanager
def _private_randomness(seed: int) -> Iterator[None]:
    """Seeds the CPU generator and puts its old state back; `torch.manual_seed` would reseed every GPU as well."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
