"""Where the random numbers of an attack come from."""

import torch

from genray.core.rng import generator


class StreamDraw:
    """Draws from one generator: for training, where the generator is keyed by (seed, learner, step)."""

    def __init__(self, stream: torch.Generator):
        self.stream = stream

    def uniform(self, like):
        return torch.rand(like.shape, generator=self.stream, device=like.device, dtype=like.dtype)

    def normal(self, like):
        return torch.randn(like.shape, generator=self.stream, device=like.device, dtype=like.dtype)

    def permutation(self, like):
        """(N,) int64, a random order of N examples."""
        return torch.randperm(len(like), generator=self.stream, device=like.device)


class ExampleDraw:
    """Draws for each example from its own generator: for evaluation, where a number must not change with the batch
    size, the sharding or the device.

    Args:
        seed: of the evaluation.
        attack: name of the attack (and restart).
        indices: index of each example of the batch in its data set.
    """

    def __init__(self, seed: int, attack: str, indices):
        self.streams = [generator("cpu", seed, "attack", attack, int(i)) for i in indices]

    def uniform(self, like):
        return self._stack(torch.rand, like)

    def normal(self, like):
        return self._stack(torch.randn, like)

    def _stack(self, draw, like):
        rows = [draw(like.shape[1:], generator=stream, dtype=like.dtype) for stream in self.streams]
        return torch.stack(rows).to(like.device)
