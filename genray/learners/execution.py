"""How a learner's network is run: in which precision, compiled or not, and on which copy it is attacked."""

from functools import cached_property

import torch

from genray.models.attack_copy import AttackCopy
from genray.models.other_networks import OtherNetwork
from genray.models.tracing import overwriting


class Execution:
    """The two functions of one network that a training step calls. Both return float32 logits.

    Args:
        network: the learner's; its float32 weights are the only ones that are trained.
        compute: the run's `compute` section.
        device: where the network is.
        pack: whether the copy's weights are one tensor, to be sent to other processes (`AttackCopy`).
    """

    def __init__(self, network: torch.nn.Module, compute, device: torch.device, *, pack: bool = False):
        self.network, self.compute, self.device, self.pack = network, compute, device, pack
        self.dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
        if compute.compile:
            self._run = self._compiled(network)
        else:  # a trace would fix the choices that another library's code makes at each call
            self._run = network if isinstance(network, OtherNetwork) else overwriting(network)

    def training(self, x):
        """Logits of the network itself, in its own mode; gradients flow to the weights."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self._run(x)
        return logits.float()  # losses are computed in float32

    def attacked(self, mode: str):
        """What an attack runs on: in mode "eval" a copy that is cheaper to run, as of its last refresh."""
        return _TrainMode(self) if mode == "train" else self._copy[1]

    def refresh(self):
        """The copy takes over the network's weights of now: once a step, because all its attacks run on one network."""
        self._copy[0].refresh()

    def received(self):
        """To be called after `packed` was overwritten."""
        self._copy[0].prepare()

    @property
    def packed(self) -> torch.Tensor:
        """The copy's weights, (B,) uint8, to be read and overwritten."""
        return self._copy[0].packed

    @cached_property
    def _copy(self):
        # The compiler would have to leave its graph for each of them.
        lean = self.device.type == "cpu" and self.compute.channels_last and not self.compute.compile
        options = {"fold": self.compute.fold_batch_norm, "lean_gradients": lean, "packed": self.pack}
        copy = AttackCopy(self.network, in_place=True, dtype=self.dtype, **options)
        return copy, self._compiled(copy)

    def _compiled(self, module):
        if not self.compute.compile:
            return module
        # On a GPU launching a small network's kernels takes longer than running them: CUDA graphs launch them at once.
        # Dropout draws torch's own random numbers, so that compiled code differs by rounding only.
        options = {"triton.cudagraphs": self.device.type == "cuda", "fallback_random": True}
        return torch.compile(module, options=options)


class _TrainMode(torch.nn.Module):
    """The network itself, for attacks in train mode: its BatchNorm statistics move, as in the codes that do so."""

    def __init__(self, passes):
        super().__init__()
        self.network, self.passes = passes.network, passes

    def forward(self, x):
        return self.passes.training(x)
