"""The target network of a learner: its logits at the clean images are what objective `anchor` regresses on."""

import torch

from genray.core.flat import FlatWeights
from genray.learners.execution import Execution
from genray.types import WeightSnapshot


class TargetNetwork:
    """A network in eval mode that is not trained.

    Args:
        network: images (N, C, H, W) in [0, 1] -> logits (N, K).
        compute: the run's `compute` section.
        device: torch device.
    """

    def __init__(self, network: torch.nn.Module, compute, device: torch.device):
        self.flat = FlatWeights(network.to(device).eval())
        self.passes = Execution(network, compute, device)
        self.passes.refresh()

    def load(self, snapshot: WeightSnapshot):
        """Overwrites its weights."""
        self.flat.load(snapshot)
        self.passes.refresh()

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K) float32 logits."""
        return self.passes.attacked("eval")(x).float().clone()  # the next pass may overwrite what this one gave
