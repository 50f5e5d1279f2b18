"""Weights of genray's networks under the names and in the shapes that the classes of TRADES and RobustBench load.

`checkpoint_layouts.py` is the way back. A network that the other code has no class for is refused: a file that nobody
can load is no export.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from genray.errors import ConfigError
from genray.interop.checkpoint_layouts import ATTRIBUTE
from genray.models.normalize import Normalize

# What their classes fix. Their pooling windows fit one image size; a wide resnet's widen factor is an argument.
_RGB = {"in_channels": 3, "image_size": (32, 32)}
_RESNET = _RGB | {"width": 64}
_WIDE = {name: _RGB for name in ("wrn_28_10", "wrn_32_10", "wrn_34_10")}
_SMALL_CNN = {"in_channels": 1, "image_size": (28, 28), "num_classes": 10, "width": 32, "batch_norm": False}
_HELD = {
    "trades": {"small_cnn": _SMALL_CNN, "resnet18": _RESNET, **_WIDE},
    "robustbench": {"resnet18": _RESNET, "preact_resnet18": _RESNET, "preact_resnet18_no_bn": _RESNET, **_WIDE}
    | {"preact_resnet18_no_bn_raw_shortcut": _RESNET},
}


def published_state(model: nn.Module, metadata: Mapping, layout: str) -> OrderedDict[str, Tensor]:
    """The state dict that a class of another code loads strictly and that gives the same logits there.

    "trades": the classes of TRADES, which take images in [0, 1] and cannot normalise. Its wide resnet has a group
    `sub_block1` that its forward pass never uses; here it repeats `block1`.
    "robustbench": RobustBench's `WideResNet(sub_block1=False)`, `ResNet18` and
    `PreActResNet(PreActBlock, [2, 2, 2, 2], out_shortcut=True)`, with `bn_before_fc=True` for preact_resnet18, and
    without `out_shortcut` for preact_resnet18_no_bn_raw_shortcut. Its models normalise with buffers `mu` and `sigma`
    (1, 3, 1, 1), which are added where the network normalises.

    Args:
        model: from `build_model`, on any device; stays as it is.
        metadata: of its file; the arguments of `build_model` that gave it are its `architecture`.
        layout: "trades" or "robustbench".

    Returns:
        name -> tensor on the CPU, in their order of layers. The metadata are an attribute of it, which `torch.save`
        keeps and their loaders do not look at.

    Raises:
        ConfigError: the layout has no place for this network; every reason is listed.
    """
    problems = _problems(model, metadata["architecture"], layout)
    if problems:
        raise ConfigError(problems)
    state = OrderedDict((name, value.detach().cpu().contiguous()) for name, value in model.state_dict().items())
    if layout == "trades" and "block1.layer.0.conv1.weight" in state:
        first = {name: value for name, value in state.items() if name.startswith("block1.")}
        state |= {f"sub_{name}": value.clone() for name, value in first.items()}
    if isinstance(model.normalize, Normalize):
        state |= {"mu": model.normalize.mean.detach().cpu(), "sigma": model.normalize.std.detach().cpu()}
    setattr(state, ATTRIBUTE, json.dumps(metadata))
    return state


def _problems(model, architecture, layout) -> list[str]:
    name, held = architecture["name"], _HELD[layout]
    if name not in held:
        return [f"layout {layout}: it has no {name}, only {', '.join(held)}; layout onnx takes any model"]
    problems = []
    if "activation" in architecture:
        problems.append(
            f"layout {layout}: its {name} has ReLUs, got {architecture['activation']}; layout onnx takes it"
        )
    for field, wanted in held[name].items():
        got = architecture.get(field)
        got = tuple(got) if isinstance(got, list) else wanted if got is None else got
        if got != wanted:
            problems.append(f"layout {layout}: expected {field} {wanted} for {name}, got {got}; layout onnx takes it")
    if layout == "trades" and isinstance(model.normalize, Normalize):
        problems.append(
            f"layout trades: has no place for the model's normalisation ({model.normalize.extra_repr()}); "
            "layouts robustbench and onnx have"
        )
    return problems
