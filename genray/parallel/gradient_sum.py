"""The gradient of a batch from several processes, summed while the backward pass still computes the rest of it."""

from functools import partial

import torch

from genray.core.flat import FlatWeights
from genray.parallel.process_group import ProcessGroup

BUCKET = 8 << 20  # bytes of the gradient in one sum: large enough for the network's bandwidth, and several a network


class GradientSum:
    """Computes the flat gradient of a loss, summed over the processes of a group.

    The layers' gradients become known from the last layer to the first, so the flat gradient is cut into buckets from
    its end on. Each bucket is summed once its parameters have their gradients and all buckets before it have begun:
    then every process begins the same sums in the same order.

    Args:
        flat: the network's `FlatWeights`.
        process_group: the processes, whose networks have the same layers.
        bucket: bytes of a bucket at least, except for the last one.
    """

    def __init__(self, flat: FlatWeights, process_group: ProcessGroup, bucket: int = BUCKET):
        self.flat, self.process_group = flat, process_group
        self.buckets: list[torch.Tensor] = []  # views of the gradient, in the order of their sums
        self.sizes: list[int] = []  # numbers of parameters
        self.missing: list[int] | None = None  # gradients that each bucket waits for; None outside a backward pass
        self.begun: list = []
        if process_group.size > 1:
            self._cut(bucket)

    def _cut(self, bucket):
        gradient, offsets = self.flat.parameter.grad, self.flat.trained_layout.offsets
        trained = [p for p in self.flat.module.parameters() if p.requires_grad]
        end, count = offsets[-1], 0
        for p, start in reversed(list(zip(trained, offsets))):
            p.register_post_accumulate_grad_hook(partial(self._has_gradient, len(self.buckets)))
            count += 1
            if (end - start) * gradient.itemsize >= bucket or start == 0:
                self.buckets.append(gradient[start:end])
                self.sizes.append(count)
                end, count = start, 0

    def backward(self, loss: torch.Tensor):
        """The flat gradient becomes the sum over the processes of the gradients of their losses, with the same bits in
        each process."""
        self.flat.zero_grad()
        self.missing, self.begun = list(self.sizes), []
        try:
            loss.backward()
            while len(self.begun) < len(self.buckets):  # those of parameters that the loss does not depend on
                self._begin_next()
            for wait in self.begun:
                wait()
        finally:
            self.missing = None

    def _has_gradient(self, bucket, _):
        if self.missing is None:
            return
        self.missing[bucket] -= 1
        while len(self.begun) < len(self.buckets) and not self.missing[len(self.begun)]:
            self._begin_next()

    def _begin_next(self):
        self.begun.append(self.process_group.begin_sum(self.buckets[len(self.begun)]))
