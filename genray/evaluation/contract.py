"""The contract of a model to evaluate: images (N, C, H, W) float32 in [0, 1] -> logits (N, K) float32.

A wrapper or a copy corrects a breach if that is possible; every other breach is one line.
"""

import copy
import functools
import inspect

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from genray.attacks import temporary_mode
from genray.errors import DataError, one_line


def as_network(model, pixels) -> tuple[nn.Module, torch.Tensor, list[str]]:
    """A module that keeps the contract and gives the results of the caller's model.

    Args:
        model: a module, or a function of images.
        pixels: (N, C, H, W) float32 in [0, 1], N >= 2: for a trial; not changed.

    Returns:
        (network, logits, findings): `model` itself if it keeps the contract, its logits (N, K), and the
        corrections, one sentence each.

    Raises:
        DataError: the model cannot be evaluated; the line names the breach.
    """
    if torch.is_inference_mode_enabled():
        raise DataError("model: expected a call outside torch.inference_mode, under which there are no gradients")
    network = model if isinstance(model, nn.Module) else _Function(_callable(model))
    _check_weights(network)
    network, findings = _in_float32(network)
    before = pixels.to(device_of(network), copy=True)
    x = before.clone()
    version = x._version
    outputs = _run(network, x, model)
    if not isinstance(outputs, torch.Tensor) and isinstance(getattr(outputs, "logits", None), torch.Tensor):
        network, outputs = _Logits(network), outputs.logits  # as the models of transformers return
    if x._version != version or not torch.equal(x, before):
        network = _Adapted(network)
        outputs = _run(network, before, model)
        findings.append("the model changes its input in place: it is given copies")
    outputs = _checked(outputs, pixels)
    if outputs.dtype != torch.float32:
        findings.append(f"the outputs are {_name(outputs.dtype)}, compared in float32: rounded logits may tie")
        network = network if isinstance(network, _Adapted) else _Adapted(network)
    return network, outputs.float(), findings


def device_of(model) -> torch.device:
    """The device of a model's weights; the CPU for a model without any."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


class _Adapted(nn.Module):
    """A network that is called with a copy of the input and returns float32."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, x):
        return self.network(x.clone()).float()


class _Logits(nn.Module):
    """A network whose outputs have the logits as an attribute."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, x):
        return self.network(x).logits


class _Function(nn.Module):
    """A function of images as a module; the modules that the function uses are its sub-modules.

    They are searched in its object, its bound arguments and the variables of enclosing scopes.
    """

    def __init__(self, function):
        super().__init__()
        self.function = function
        for i, module in enumerate(_modules_of(function)):
            self.add_module(str(i), module)
        self.training = any(module.training for module in self.children())

    def forward(self, x):
        return self.function(x)

    def __deepcopy__(self, memo):
        raise copy.Error("a function keeps the modules that it was made with")


def _modules_of(function):
    places = [getattr(function, "__self__", None)]
    if isinstance(function, functools.partial):
        return [m for part in (function.func, *function.args, *function.keywords.values()) for m in _modules_of(part)]
    if isinstance(function, nn.Module):
        return [function]
    if not inspect.isroutine(function):  # an object with __call__
        places += getattr(function, "__dict__", {}).values()
    elif inspect.isfunction(inspect.unwrap(function)):
        used = inspect.getclosurevars(inspect.unwrap(function))
        places += [*used.nonlocals.values(), *used.globals.values()]
    return list(dict.fromkeys(place for place in places if isinstance(place, nn.Module)))


def _callable(model):
    if isinstance(model, type):
        raise DataError(f"model: expected torch.nn.Module, got the class {model.__name__}; make an object of it first")
    if not callable(model):
        hint = "; genray.load_model reads model files" if hasattr(model, "__fspath__") or isinstance(model, str) else ""
        raise DataError(f"model: expected torch.nn.Module or a function, got {type(model).__name__}{hint}")
    return model


def _check_weights(network):
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise DataError(f"model: {name} has no weights yet; a lazy module gets them from its first images")
        if tensor.is_meta:
            raise DataError(f"model: {name} has no weights, it is on the device meta")
    devices = list(dict.fromkeys(str(tensor.device) for tensor in tensors.values()))
    if len(devices) > 1:
        raise DataError(f"model: expected all weights on one device, got {', '.join(devices)}")


def _in_float32(network):
    """The network, or a copy in float32 if its weights have another type or block gradients."""
    tensors = [*network.parameters(), *network.buffers()]
    types = sorted({_name(tensor.dtype) for tensor in tensors if tensor.is_floating_point()})
    inference = any(tensor.is_inference() for tensor in tensors)
    if types in ([], ["float32"]) and not inference:
        return network, []
    try:
        found = copy.deepcopy(network).float()
    except (RuntimeError, TypeError, copy.Error):
        what = "tensors of torch.inference_mode" if inference else ", ".join(types)
        raise DataError(f"model: expected ordinary float32 weights, got {what}; call model.float()") from None
    return found, [f"the weights are {', '.join(types)}: a copy in float32 is evaluated"] if types != [
        "float32"
    ] else []


@torch.no_grad()
def _run(network, x, model):
    try:
        with temporary_mode(network, training=False):
            return network(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code, which may raise anything
        wanted = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        cure = ""
        if wanted not in (None, x.shape[1]) and isinstance(model, nn.Module):
            cure = f" (its first convolution takes {wanted} channels)"
        shape, line = tuple(x.shape[1:]), one_line(error, 200)
        raise DataError(f"model: cannot take float32 images of shape {shape} on {x.device}{cure}: {line}") from None


def _checked(outputs, pixels):
    if not isinstance(outputs, torch.Tensor):
        fields = list(outputs) if isinstance(outputs, dict) else []
        fields += ["[0]"] if isinstance(outputs, (tuple, list)) else []
        cure = f"; take one of it in a function, lambda x: model(x) and {', '.join(map(str, fields))}" if fields else ""
        raise DataError(f"model: expected logits (N, K), got {type(outputs).__name__}{cure}")
    if not outputs.is_floating_point():
        raise DataError(f"model: expected logits, got {_name(outputs.dtype)} numbers, which have no gradient")
    if outputs.dim() != 2 or len(outputs) != len(pixels) or outputs.shape[1] < 2:
        raise DataError(
            f"model: expected logits ({len(pixels)}, K) with K >= 2 for {len(pixels)} images, "
            f"got shape {tuple(outputs.shape)}"
        )
    return outputs


def _name(dtype):
    return str(dtype).removeprefix("torch.")
