"""All of a network's floating-point state as named views into one flat buffer.

Averaging, accumulating, hand-over, EMA and checkpoints are then single operations on one array, and the optimiser
sees one parameter.
"""

import warnings

import numpy as np
import torch

from genray.types import WeightSnapshot


class FlatWeights:
    """Replaces a module's parameters and buffers by views of two flat tensors.

    Attributes:
        module: the network, whose behaviour does not change.
        weights: (P,) float32, all trained parameters in order, then all floating-point buffers.
        parameter: the leading part of `weights` that is trained, as one `torch.nn.Parameter` with a flat gradient.
        counters: (Q,) int64, the integer buffers.
    """

    def __init__(self, module: torch.nn.Module):
        self.module = module
        parameters = [p for p in module.parameters() if p.requires_grad]
        owners = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
        owners = [o for o in owners if o[1] not in o[0]._non_persistent_buffers_set]
        # Buffers of other types are constants, such as masks; so are parameters that are not trained.
        floating = [o for o in owners if o[2].dtype == torch.float32]
        integer = [o for o in owners if o[2].dtype == torch.int64]
        device = parameters[0].device
        num_trained = sum(p.numel() for p in parameters)
        num_weights = num_trained + sum(b.numel() for _, _, b in floating)
        self.weights = torch.empty(num_weights, device=device)
        self.counters = torch.empty(sum(b.numel() for _, _, b in integer), dtype=torch.int64, device=device)
        self.parameter = torch.nn.Parameter(self.weights[:num_trained])
        self.parameter.grad = torch.zeros_like(self.parameter)
        offset = 0
        for p in parameters:
            view = take_over(p.data, self.weights, offset)
            p.grad = _view_like(p, self.parameter.grad, offset)
            p.data = view
            offset += p.numel()
        for owner, name, buffer in floating:
            owner._buffers[name] = take_over(buffer, self.weights, offset)
            offset += buffer.numel()
        offset = 0
        for owner, name, buffer in integer:
            owner._buffers[name] = take_over(buffer, self.counters, offset)
            offset += buffer.numel()

    def zero_grad(self):
        """Sets all gradients to zero in one operation."""
        self.parameter.grad.zero_()

    def load(self, snapshot: WeightSnapshot):
        """Overwrites parameters and buffers.

        Raises:
            ValueError: the snapshot is of another architecture.
        """
        if snapshot.weights.size != self.weights.numel() or snapshot.counters.size != self.counters.numel():
            raise ValueError(
                f"expected {self.weights.numel()} weights and {self.counters.numel()} counters, got "
                f"{snapshot.weights.size} and {snapshot.counters.size}"
            )
        self.weights.copy_(from_array(snapshot.weights))
        self.counters.copy_(from_array(snapshot.counters))

    def snapshot(self, step: int, weights: torch.Tensor | None = None, *, private: bool = True) -> WeightSnapshot:
        """`weights` (by default the live ones) with the counters, in host memory.

        Args:
            private: copy the weights; False if the receiver copies them itself, as the object store does.
        """
        values = self.weights if weights is None else weights
        return WeightSnapshot(step, to_array(values, copy=private), to_array(self.counters))


def _view_like(tensor, flat, offset):
    """A view of `flat` with the shape and the (dense) strides of `tensor`, so that channels_last stays what it is."""
    if tensor.is_contiguous():
        return flat[offset : offset + tensor.numel()].view(tensor.shape)
    return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + offset)


def take_over(tensor, flat, offset):
    """Copies `tensor` into `flat` at `offset`, in its memory order, and returns the view."""
    view = _view_like(tensor, flat, offset)
    view.copy_(tensor)
    return view


def to_array(tensor: torch.Tensor, *, copy: bool = True) -> np.ndarray:
    """A tensor as a NumPy array; without `copy`, a tensor on the CPU shares its memory with the array."""
    return tensor.detach().to("cpu", copy=copy).numpy()


def from_array(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares memory with an array, which may be read-only (object store): never write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
