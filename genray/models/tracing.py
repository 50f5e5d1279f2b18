"""What a network's traced graph shows: which BatchNorm can be folded, and which results may be overwritten."""

import operator

import torch.nn.functional as F
from torch import fx, nn


class _Tracer(fx.Tracer):
    """Does not look into our own kinds of torch's layers, such as `WholeBatchNorm`."""

    def is_leaf_module(self, module, name):
        return isinstance(module, (nn.BatchNorm2d, nn.Dropout)) or super().is_leaf_module(module, name)


def trace(network: nn.Module) -> fx.GraphModule | None:
    """The network as a graph over its own modules; None where it cannot be traced (its forward looks at values)."""
    try:
        return fx.GraphModule(network, _Tracer().trace(network))
    except Exception:  # tracing runs the network's own code, which may raise anything
        return None


def foldable_pairs(traced: fx.GraphModule | None) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) names where the BatchNorm is the only reader of the convolution's output."""
    if traced is None:
        return []
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    once = {node.target for node in calls if sum(other.target == node.target for other in calls) == 1}
    pairs = []
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or not {node.target, before.target} <= once:
            continue
        names = str(before.target), str(node.target)
        convolution, norm = map(traced.get_submodule, names)
        if type(convolution) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d) and len(before.users) == 1:
            if norm.affine and norm.track_running_stats:
                pairs.append(names)
    return pairs


def pool_before_relu(traced: fx.GraphModule) -> fx.GraphModule:
    """Swaps each ReLU with the max-pooling that alone reads it: the same values and gradients from fewer numbers."""
    for pool in traced.graph.nodes:
        relu = pool.args[0] if pool.args else None
        if called(traced, pool) is nn.MaxPool2d and called(traced, relu) is nn.ReLU and len(relu.users) == 1:
            if not traced.get_submodule(pool.target).return_indices:
                pool.replace_all_uses_with(relu)
                pool.args, relu.args = relu.args, (pool,)
                pool.append(relu)
    traced.recompile()
    return traced


def called(traced: fx.GraphModule, node) -> type | None:
    """Type of the module that a node calls; None for other nodes."""
    return type(traced.get_submodule(node.target)) if getattr(node, "op", None) == "call_module" else None


def is_relu(traced: fx.GraphModule, node) -> bool:
    return called(traced, node) is nn.ReLU or (node.op == "call_function" and node.target is F.relu)


def overwriting(network: nn.Module) -> nn.Module:
    """The network's own layers in its own modes, with activations that overwrite each other; `network` stays as it is.

    It is the network itself that comes back where it cannot be traced.
    """
    traced = trace(network)
    return network if traced is None else overwrite_activations(traced)


def overwrite_activations(traced: fx.GraphModule) -> fx.GraphModule:
    """Lets ReLUs and residual sums write into their input where nobody else, not even a backward pass, reads it.

    That input has to come from a convolution, pooling or BatchNorm, whose gradients do not need their output, or from
    such a sum.
    """
    overwritable = set()
    for node in traced.graph.nodes:
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        kind, free = called(traced, node), node.args[0] in overwritable and len(node.args[0].users) == 1
        if kind in (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d) or (kind is nn.Identity and free):
            overwritable.add(node)
        elif node.target is operator.add and isinstance(node.args[1], fx.Node):
            overwritable.add(node)
            node.target = operator.iadd if free and node.args[0] is not node.args[1] else operator.add
        elif free and is_relu(traced, node):
            # Not the module's own flag: the module may be called elsewhere too.
            node.op, node.target, node.args, node.kwargs = "call_function", F.relu, node.args[:1], {"inplace": True}
    traced.recompile()
    return traced
