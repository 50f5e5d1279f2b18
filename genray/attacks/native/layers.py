"""The layers of a traced network, and which of them can be computed on a window of their output."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

Window = tuple[tuple[int, int], ...]  # ((top, bottom), (left, right)), the second of each excluded

ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div}
FUNCTIONS = ARITHMETIC | {
    F.relu,
    torch.relu,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.softplus,
    torch.tanh,
    torch.sigmoid,
}
METHODS = {"add", "sub", "mul", "div", "relu", "tanh", "sigmoid", "to", "float"}
MODULES = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Identity)
WITHOUT_EFFECT_IN_EVAL = (nn.Dropout, nn.Dropout2d)
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass
class Step:
    """One node of the graph.

    Attributes:
        node: of the traced graph.
        sources: the nodes it reads, each once, without constants.
        constants: {node: tensor} of what else it reads.
        call: computes it from the traced arguments.
        slide: how a convolution or pooling works on windows; None for other layers.
        sliced: it can be computed on a window, from sources that are.
        kept: its values are needed outside the window that changes.
        border: zeros that its readers want around its values.
        finished: nodes that nobody reads after this step, and that are not kept.
    """

    node: fx.Node
    sources: tuple
    constants: dict
    call: Callable
    slide: "Slide | None" = None
    sliced: bool = False
    kept: bool = False
    border: int = 0
    finished: tuple = ()


class Slide:
    """A convolution or max-pooling on windows.

    Args:
        module: `Conv2d` padded with zeros, or unpadded `MaxPool2d`.
    """

    def __init__(self, module):
        self.module = module
        kernel, self.stride, self.padding, dilation = (
            _pair(size) for size in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        self.extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation))

    @classmethod
    def of(cls, module) -> "Slide | None":
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            return cls(module)
        if type(module) is nn.MaxPool2d and not module.ceil_mode and not module.return_indices:
            return cls(module) if _pair(module.padding) == (0, 0) else None
        return None

    def __call__(self, values):
        """Output for values that already have their padding."""
        m = self.module
        if isinstance(m, nn.MaxPool2d):
            return F.max_pool2d(values, m.kernel_size, m.stride, 0, m.dilation)
        return F.conv2d(values, m.weight, m.bias, m.stride, 0, m.dilation, m.groups)

    def outputs(self, window: Window, size) -> Window:
        """Outputs of a layer of this size that see a window of inputs; where none does, one that does not."""
        return tuple(
            self._outputs(*span, *how) for span, *how in zip(window, self.extent, self.stride, self.padding, size)
        )

    @staticmethod
    def _outputs(start, stop, extent, stride, padding, size):
        first = min(max(0, -((extent - 1 - padding - start) // stride)), size - 1)
        last = min((stop - 1 + padding) // stride, size - 1)
        return first, max(first, last) + 1

    def inputs(self, window: Window) -> Window:
        """Inputs that a window of outputs sees; negative or above the size in the padding."""
        return tuple(
            (start * stride - padding, (stop - 1) * stride - padding + extent)
            for (start, stop), extent, stride, padding in zip(window, self.extent, self.stride, self.padding)
        )


def steps_of(traced: fx.GraphModule) -> list[Step] | None:
    """The steps from images to logits; None where slices cannot work or would not help."""
    nodes, modules = list(traced.graph.nodes), dict(traced.named_modules())
    inputs, output = [node for node in nodes if node.op == "placeholder"], nodes[-1].args[0]
    if len(inputs) != 1 or not isinstance(output, fx.Node) or any(_in_place(node, modules) for node in nodes):
        return None
    constants = {node: _attribute(traced, node.target) for node in nodes if node.op == "get_attr"}
    steps = {}
    for node in nodes[: nodes.index(output) + 1]:
        if node not in constants:
            steps[node] = _step(node, steps, constants, modules)
    _plan_memory(list(steps.values()))
    helps = any(step.slide for step in steps.values()) and not steps[output].sliced
    return list(steps.values()) if helps else None


def union(windows) -> Window:
    """The smallest window around all."""
    return tuple((min(start for start, _ in spans), max(stop for _, stop in spans)) for spans in zip(*windows))


def _step(node, steps, constants, modules):
    sources = tuple(source for source in node.all_input_nodes if source not in constants)
    fixed = {source: constants[source] for source in node.all_input_nodes if source in constants}
    step = Step(node, sources, fixed, _call(node, modules))
    if node.op == "placeholder":
        step.sliced = step.kept = True
    elif sources and all(steps[source].sliced for source in sources):
        step.slide = Slide.of(modules[node.target]) if node.op == "call_module" else None
        step.sliced = step.slide is not None or _elementwise(step, modules)
    return step


def _call(node, modules):
    if node.op == "call_method":
        return lambda owner, *args, **kwargs: getattr(owner, node.target)(*args, **kwargs)
    return modules[node.target] if node.op == "call_module" else node.target


def _plan_memory(steps):
    by_node = {step.node: step for step in steps}
    last_reader = {source: step for step in steps for source in step.sources}
    for step in steps:
        # A layer with one source that is not a slide changes just where its source does.
        around = step.slide is not None or not step.sliced or len(step.sources) > 1
        for source in (by_node[node] for node in step.sources):
            source.kept |= around and source.sliced
            source.border = max(source.border, *(step.slide.padding if step.slide else (0,)))
    for node, step in last_reader.items():
        if not by_node[node].kept:
            step.finished += (node,)


def _elementwise(step, modules):
    """Whether each output depends on the same place of each source alone."""
    node = step.node
    if not all(c.numel() == 1 or c.shape[-2:] == (1, 1) for c in step.constants.values()):
        return False
    if node.op == "call_module":
        module = modules[node.target]
        if isinstance(module, nn.BatchNorm2d):
            return not module.training and module.running_mean is not None
        return type(module) in MODULES or (type(module) in WITHOUT_EFFECT_IN_EVAL and not module.training)
    return node.target in (FUNCTIONS if node.op == "call_function" else METHODS)


def _in_place(node, modules):
    """Whether a node changes a tensor that another may read, or keep."""
    if node.op == "call_module":
        return getattr(modules[node.target], "inplace", False)
    name = getattr(node.target, "__name__", str(node.target))
    marked = name.endswith("_") and not name.endswith("__")
    return node.target in IN_PLACE or marked or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _attribute(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _pair(value):
    return tuple(value) if isinstance(value, tuple) else (value, value)
