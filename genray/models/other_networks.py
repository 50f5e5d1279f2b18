"""Networks of timm, of torchvision and of the user's own package, with the interface of our networks.

`model.name` is `timm:NAME`, `torchvision:NAME` or `package.module:FACTORY`; `model.options` are keyword arguments.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from genray.config.model import did_you_mean as _like
from genray.core.user_code import call, errors_as, find, remember_package
from genray.errors import ConfigError

LIBRARIES = ("timm", "torchvision")
# Keyword arguments that would read files or the network: initial weights are `model.weights`.
REFUSED = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg", "cache_dir")


class OtherNetwork(nn.Module):
    """A network of another library: images (N, C, H, W) in [0, 1] -> float32 logits (N, K).

    Attributes:
        normalize: the first layer, as in our own networks.
        body: the library's module; its state dict has the library's names.
        classifier: name of the layer that computes the logits, below this module; None if it is not a linear layer.
    """

    def __init__(self, body: nn.Module):
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.body = body
        self.classifier: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(self.normalize(x))
        if isinstance(outputs, (Tensor, fx.Proxy)):  # in a trace it is a proxy
            return outputs  # type: ignore[return-value]
        # Models of transformers, and some of torchvision in train mode, return an object.
        if not hasattr(outputs, "logits"):
            raise ConfigError(
                f"model.name: expected a network that returns logits, or an object with .logits, came "
                f"{type(outputs).__name__}{' in train mode' * self.training}"
            )
        return outputs.logits


def classifier_name(network: nn.Module) -> str | None:
    """Name of the linear layer that computes a network's logits; of our own networks it is the last one."""
    if isinstance(network, OtherNetwork):
        return network.classifier
    names = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    return names[-1] if names else None


def is_other(name: str) -> bool:
    """Whether `model.name` is not one of our own networks."""
    return ":" in name


def build_other(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    options: dict | None = None,
    factory: Callable | None = None,
) -> OtherNetwork:
    """Builds a network of another library with random initial weights, in train mode.

    Args:
        name: as in `model.name`.
        num_classes, in_channels, image_size: as in `build_model`; a factory gets only those that it has parameters for.
        options: keyword arguments of the factory, plain values.
        factory: the callable itself, instead of `name`.

    Raises:
        ConfigError: the network is unknown, cannot be built, or does not return logits (N, K).
    """
    library, _, inner = name.partition(":")
    options = dict(options or {})
    refused = [option for option in REFUSED if option in options and library in LIBRARIES]
    if refused:
        raise ConfigError(f"model.options.{refused[0]}: expected model.weights for initial weights, got this option")
    data = {"num_classes": num_classes, "in_channels": in_channels, "image_size": tuple(image_size)}
    if factory is not None and (isinstance(factory, nn.Module) or not callable(factory)):
        raise ConfigError(f"network: expected a function or class that makes the network, got {type(factory).__name__}")
    with errors_as(f"model: {name} cannot be built"):
        if factory is None and library in LIBRARIES:
            body = (_timm if library == "timm" else _torchvision)(inner, data, options)
        else:
            if factory is None:
                factory = find(name, "model.name", "load_model(path, network=FACTORY) or trust=True")
            remember_package(factory)
            body = call(factory, data, options)
    if not isinstance(body, nn.Module):
        raise ConfigError(f"model.name: expected {name} to return a torch.nn.Module, got {type(body).__name__}")
    if not any(parameter.requires_grad for parameter in body.parameters()):
        raise ConfigError(f"model.name: expected a network with parameters to train, {name} has none")
    for at, parameter in body.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(f"model.name: expected {name} to have float32 parameters, {at} is {parameter.dtype}")
    network = OtherNetwork(body).train()
    network.classifier = _checked(network, name, data)
    return network


def _timm(inner, data, options):
    try:
        import timm
    except ModuleNotFoundError:
        raise ConfigError("model.name: expected timm to be installed for a timm network (pip install timm)") from None
    if not timm.is_model(inner):
        raise ConfigError(
            f"model.name: expected a network of timm.list_models(), got {inner!r}{_like(inner, timm.list_models())}"
        )
    sizes = {"num_classes": data["num_classes"], "in_chans": data["in_channels"]}
    cfg = timm.get_pretrained_cfg(inner)
    if cfg is not None and cfg.fixed_input_size and "img_size" not in options:
        sizes["img_size"] = data["image_size"]
    return timm.create_model(inner, pretrained=False, **(sizes | options))


def _torchvision(inner, data, options):
    from torchvision import models

    known = models.list_models(module=models)
    if inner not in known:
        raise ConfigError(f"model.name: expected one of torchvision.models, got {inner!r}{_like(inner, known)}")
    if data["in_channels"] != 3:
        raise ConfigError(
            f"model.name: expected images of 3 channels for torchvision:{inner}, got {data['in_channels']}"
        )
    return models.get_model(inner, weights=None, num_classes=data["num_classes"], **options)


def _checked(network, name, data) -> str | None:
    """Runs two images in eval mode; returns the name of the linear layer that computed the logits."""
    device, graph = next(network.parameters()).device, not torch.is_inference_mode_enabled()
    shape = (2, data["in_channels"], *data["image_size"])
    x = torch.linspace(0, 1, math.prod(shape), device=device).reshape(shape).requires_grad_(graph)
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: calls.append((name, output)))
        for name, module in network.named_modules()
        if type(module) is nn.Linear
    ]
    network.eval()
    shape = " x ".join(map(str, x.shape[1:]))
    try:
        with errors_as(f"model.name: {name} does not take images of {shape} (C x H x W)"):
            with torch.set_grad_enabled(graph):
                logits = network(x)
    finally:
        network.train()
        for hook in hooks:
            hook.remove()
    wanted = (2, data["num_classes"])
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"model.name: expected {name} to return logits of shape {wanted} for 2 images, got {got}")
    if not logits.is_meta and not bool(logits.isfinite().all()):
        raise ConfigError(f"model.name: expected finite logits, those of {name} are NaN or infinite")
    if graph and not logits.requires_grad:
        raise ConfigError(f"model.name: expected logits with gradients to the parameters, those of {name} have none")
    return next((name for name, output in reversed(calls) if output.shape == logits.shape), None)
