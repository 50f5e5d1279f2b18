"""A copy of a network for attacking it: the same function in eval mode, with less to compute.

In eval mode a BatchNorm is a fixed affine map, so behind a convolution it can be folded into that convolution's
weights. An attack of ten steps then runs ten times through fewer layers, and only the folding is done anew each step.
"""

import copy

import torch
from torch import Tensor, nn

from genray.core.flat import take_over
from genray.models.lean_gradients import use_lean_gradients
from genray.models.normalize import Normalize
from genray.models.other_networks import classifier_name
from genray.models.tracing import foldable_pairs, overwrite_activations, pool_before_relu, trace


class AttackCopy(nn.Module):
    """The eval-mode function of a network, images (N, C, H, W) in [0, 1] -> logits (N, K), in float32 at least.

    It has no trainable parameter of its own. What is not folded or rounded is shared with the network, so it follows
    by itself; the rest follows at each `refresh`, in place.

    Args:
        network: eval-mode and train-mode alike; stays as it is.
        fold: fold each BatchNorm that directly follows a convolution (pre-activation blocks have some that do not).
        in_place: activations overwrite each other where they may; a little faster, for passes that end in a gradient.
        lean_gradients: some convolutions get a cheaper gradient to their input, the same up to rounding; for a CPU.
        dtype: of weights and activations; images are normalised, and logits computed by the classifier, in float32.
        packed: its weights are its own, all of them views of one tensor, `packed`, (B,) uint8: whoever overwrites that
            with the one of another copy of the same architecture and settings, and calls `prepare`, has its function.
    """

    body: nn.Module

    def __init__(
        self,
        network: nn.Module,
        *,
        fold: bool = True,
        in_place: bool = False,
        lean_gradients: bool = False,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
    ):
        super().__init__()
        pairs = foldable_pairs(trace(network)) if fold else []
        self.folded = len(pairs)
        self.body = _independent_copy(network).eval()
        self._folds = [self._fold(network, *names) for names in pairs]
        self.entry, self.exit = dtype, torch.promote_types(dtype, torch.float32)
        if isinstance(getattr(self.body, "normalize", None), (Normalize, nn.Identity)):
            # Normalisation stays in float32: pixels rounded to 8 bits of mantissa move by up to half a grey level.
            self.body.normalize = nn.Sequential(self.body.get_submodule("normalize"), _Cast(dtype))
            self.entry = self.exit
        self._keep_classifier_precise(dtype)
        folded = {name for pair in pairs for name in pair}
        self._copies = self._share_or_round(network, folded, dtype, share=not packed)
        self.packed = _pack(self.body) if packed else None
        traced = trace(self.body)
        if traced is not None:
            self.body = pool_before_relu(traced)
            if in_place:
                overwrite_activations(self.body)
        self._lean = [self.body.get_submodule(n) for n in (use_lean_gradients(self.body) if lean_gradients else ())]
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.entry)).to(self.exit)

    @torch.no_grad()
    def refresh(self):
        """Takes over the network's weights and running statistics of now. No host synchronisation."""
        if self._copies:
            mine, theirs = map(list, zip(*self._copies))
            torch._foreach_copy_(mine, theirs)
        if self._folds:
            self._refresh_folds(*map(list, zip(*self._folds)))
        self.prepare()

    def _refresh_folds(self, mine, convolutions, norms):
        # One launch for all tensors instead of one each, where a GPU's operations on lists allow it.
        scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
        torch._foreach_rsqrt_(scales)
        scales = torch._foreach_mul([norm.weight for norm in norms], scales)
        shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
        shifts = torch._foreach_sub([norm.bias for norm in norms], shifts)
        for convolution, scale, shift in zip(convolutions, scales, shifts):
            if convolution.bias is not None:
                shift.add_(convolution.bias * scale)
        for folded, convolution, scale in zip(mine, convolutions, scales):  # broadcast, which lists do not
            torch.mul(convolution.weight, scale.view(-1, 1, 1, 1), out=folded.weight)
        torch._foreach_copy_([folded.bias for folded in mine], shifts)

    @torch.no_grad()
    def prepare(self):
        """Makes anew what is derived from the copy's weights; to be called after `packed` was overwritten."""
        for convolution in self._lean:
            convolution.prepare()

    def _fold(self, network, convolution_name, norm_name):
        """Replaces one pair in the copy; returns (folded convolution, network's convolution, network's BatchNorm)."""
        mine = self.body.get_submodule(convolution_name)
        mine.bias = nn.Parameter(torch.zeros(mine.out_channels, device=mine.weight.device), requires_grad=False)
        self.body.set_submodule(norm_name, nn.Identity())
        return mine, network.get_submodule(convolution_name), network.get_submodule(norm_name)

    def _keep_classifier_precise(self, dtype):
        """The layer that computes the logits stays in float32: rounded logits tie, and ties pass for robustness."""
        name = classifier_name(self.body)
        if name is not None and dtype != self.exit:
            self.body.set_submodule(name, Classifier(self.body.get_submodule(name)))

    def _share_or_round(self, network, folded_names, dtype, share):
        """Gives every tensor of the copy its type; returns the (mine, theirs) pairs that a refresh has to copy."""
        # A tied parameter has several names.
        parameters = network.named_parameters(remove_duplicate=False)
        copies, theirs = [], dict(parameters) | dict(network.named_buffers(remove_duplicate=False))
        for module_name, module in self.body.named_modules():
            if isinstance(module, Normalize):  # its statistics are fixed
                continue
            kept = self.exit if isinstance(module, Classifier) else dtype
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                tensor.requires_grad_(False)
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(kept)
                if module_name in folded_names:
                    continue
                source = theirs[f"{module_name}.{name}" if module_name else name]
                if tensor.dtype == source.dtype and share:
                    tensor.data = source.data
                else:
                    copies.append((tensor, source))
        return copies


def _pack(body):
    """Makes all floating-point tensors but the normalisation's views of one (B,) uint8 tensor, and returns that."""
    modules = [module for module in body.modules() if not isinstance(module, Normalize)]
    owned = [[*module.parameters(recurse=False), *module.buffers(recurse=False)] for module in modules]
    tensors = [tensor for tensors in owned for tensor in tensors if tensor.is_floating_point()]
    rooms = [-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    packed = torch.zeros(sum(rooms), dtype=torch.uint8, device=tensors[0].device)
    for tensor, room in zip(tensors, packed.split(rooms)):
        tensor.data = take_over(tensor.data, room.view(tensor.dtype), 0)
    return packed


ALIGNMENT = 64  # bytes: of every type's size, and of a vector register's


class Classifier(nn.Linear):
    """A linear layer that computes in the precision of its weights, whatever its input has."""

    def __init__(self, linear: nn.Linear):
        # On "meta" no initial weights are drawn: that would move the generator that dropout draws from.
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


class _Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def _independent_copy(network):
    """A deep copy; tensors that are views of one flat buffer become tensors of their own, with their strides."""
    memo = {id(t): t.detach().clone() for t in network.buffers()}
    return copy.deepcopy(network, memo)
