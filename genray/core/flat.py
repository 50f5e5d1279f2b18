"""All of a network's floating-point state as named views into one flat buffer.

Averaging, accumulating, hand-over, EMA and checkpoints are then single operations on one array, and the optimiser
sees one parameter.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from genray.types import WeightSnapshot

# Bytes, of views into flat tensors on accelerators: CUDA graphs are given up for inputs that do not begin at a multiple
# of 16, and cuDNN chooses its kernels by the alignment of pointers. On a CPU nothing depends on it but the last bits:
# the fused optimiser rounds the elements of a vector otherwise than those that are left over after the last one.
ALIGNMENT = 256


@dataclass(frozen=True)
class Layout:
    """Where tensors are in a flat one: each begins at a multiple of some number of elements, with zeros between them.

    Without the zeros, "packed", they travel and are stored.

    Attributes:
        sizes: number of elements of each tensor.
        unit: of whose multiples each begins at one.
    """

    sizes: tuple[int, ...]
    unit: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], dtype: torch.dtype, alignment: int) -> "Layout":
        return cls(tuple(tensor.numel() for tensor in tensors), max(1, alignment // dtype.itemsize))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins, and after the last one the number of elements with all padding."""
        return tuple(accumulate((math.ceil(size / self.unit) * self.unit for size in self.sizes), initial=0))

    @property
    def packed_size(self) -> int:
        return sum(self.sizes)

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """(size,) views of the tensors in (offsets[-1],) `flat`."""
        return [flat[start : start + size] for start, size in zip(self.offsets, self.sizes)]

    def pack(self, flat: torch.Tensor, *, copy: bool = True) -> torch.Tensor:
        """The tensors without the padding, (packed_size,); without `copy`, `flat` itself where it has no padding."""
        if self.packed_size < self.offsets[-1]:
            return torch.cat(self.parts(flat))
        return flat.clone() if copy else flat

    @torch.no_grad()
    def unpack_(self, flat: torch.Tensor, packed: torch.Tensor):
        """Overwrites the tensors in `flat` with those of (packed_size,) `packed`; the padding stays as it is."""
        if self.packed_size < self.offsets[-1]:
            torch._foreach_copy_(self.parts(flat), list(packed.to(flat.device).split(self.sizes)))
        else:
            flat.copy_(packed)


class FlatWeights:
    """Replaces a module's parameters and buffers by views of two flat tensors.

    Attributes:
        module: the network, whose behaviour does not change.
        weights: float32, all trained parameters in order, then all floating-point buffers, in the order of `layout`.
        parameter: the leading part of `weights` that is trained, as one `torch.nn.Parameter` with a flat gradient.
        counters: int64, the integer buffers, in the order of `counter_layout`.
        layout, trained_layout, counter_layout: of `weights`, `parameter` and `counters`.

    Args:
        alignment: of the views, in bytes; None: as the module's device needs it.
    """

    def __init__(self, module: torch.nn.Module, alignment: int | None = None):
        self.module = module
        parameters = [p for p in module.parameters() if p.requires_grad]
        owners = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
        owners = [o for o in owners if o[1] not in o[0]._non_persistent_buffers_set]
        # Buffers of other types are constants, such as masks; so are parameters that are not trained.
        floating = [o for o in owners if o[2].dtype == torch.float32]
        integer = [o for o in owners if o[2].dtype == torch.int64]
        device = parameters[0].device
        alignment = alignment_on(device) if alignment is None else alignment
        self.layout = Layout.of([*parameters, *(b for _, _, b in floating)], torch.float32, alignment)
        self.trained_layout = Layout.of(parameters, torch.float32, alignment)
        self.counter_layout = Layout.of([b for _, _, b in integer], torch.int64, alignment)
        self.weights = torch.zeros(self.layout.offsets[-1], device=device)
        self.counters = torch.zeros(self.counter_layout.offsets[-1], dtype=torch.int64, device=device)
        self.parameter = torch.nn.Parameter(self.weights[: self.trained_layout.offsets[-1]])
        self.parameter.grad = torch.zeros_like(self.parameter)
        self._pinned: torch.Tensor | None = None
        for p, offset in zip(parameters, self.layout.offsets):
            view = take_over(p.data, self.weights, offset)
            p.grad = _view_like(p, self.parameter.grad, offset)
            p.data = view
        for (owner, name, buffer), offset in zip(floating, self.layout.offsets[len(parameters) :]):
            owner._buffers[name] = take_over(buffer, self.weights, offset)
        for (owner, name, buffer), offset in zip(integer, self.counter_layout.offsets):
            owner._buffers[name] = take_over(buffer, self.counters, offset)

    def zero_grad(self):
        """Sets all gradients to zero in one operation."""
        self.parameter.grad.zero_()

    def load(self, snapshot: WeightSnapshot):
        """Overwrites parameters and buffers.

        Raises:
            ValueError: the snapshot is of another architecture.
        """
        expected = self.layout.packed_size, self.counter_layout.packed_size
        if (snapshot.weights.size, snapshot.counters.size) != expected:
            raise ValueError(
                f"expected {expected[0]} weights and {expected[1]} counters, got "
                f"{snapshot.weights.size} and {snapshot.counters.size}"
            )
        self.layout.unpack_(self.weights, from_array(snapshot.weights))
        self.counter_layout.unpack_(self.counters, from_array(snapshot.counters))

    def snapshot(self, step: int, weights: torch.Tensor | None = None, *, private: bool = True) -> WeightSnapshot:
        """`weights` (by default the live ones) with the counters, in host memory and without padding.

        Args:
            private: copy the weights; False if the receiver copies them itself before the next snapshot, as the object
                store does.
        """
        packed = self.layout.pack(self.weights if weights is None else weights, copy=private)
        array = self._in_pinned_memory(packed) if packed.is_cuda and not private else to_array(packed, copy=False)
        return WeightSnapshot(step, array, self.packed_counters())

    def _in_pinned_memory(self, packed):
        """Copies into one buffer of page-locked memory, which a GPU writes without the driver's own copy in between."""
        if self._pinned is None:
            self._pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        self._pinned.copy_(packed, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        copied.synchronize()
        return self._pinned.numpy()

    def packed_counters(self) -> np.ndarray:
        """The counters in host memory, without padding."""
        return to_array(self.counter_layout.pack(self.counters), copy=False)


def alignment_on(device: torch.device) -> int:
    """Bytes of whose multiples each view begins at one."""
    return 1 if device.type == "cpu" else ALIGNMENT


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
