"""E-AT: adversarial training in the extreme norms (Croce & Hein, ICML 2022, 2105.12508)."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from genray.objectives.multi_norm import SeveralNorms


class Eat(SeveralNorms):
    """CE on one norm's adversarial images; the norm is drawn for each batch (methods C10).

    The probability of a norm is proportional to 1 - its running training robust accuracy: the fraction of all images
    trained on under it so far that the network classified correctly in its training pass (the authors' code
    counts examples that withstand all points of the attack, in eval mode). While one of the norms has no images yet,
    and when all accuracies are 1, the draw is uniform.

    A step uses the counts up to the step before the last: those have left the device by then, so the host can queue a
    step while the device computes the previous one.
    """

    def build_attacks(self, configs):
        attacks = super().build_attacks(configs)
        self.correct, self.seen = np.zeros((2, len(attacks)), np.int64)
        self.newest = None
        return attacks

    @property
    def probabilities(self) -> np.ndarray:
        """(P,) of the norms, in the order of `attacks`."""
        wrong = self.seen - self.correct
        errors = wrong / self.seen.clip(1)
        if (self.seen == 0).any() or not wrong.any():
            errors = np.ones(len(errors))
        return errors / errors.sum()

    chooses = True

    def wanted(self, names, numbers):
        return (names[int(numbers.choice(len(names), p=self.probabilities))],)

    def __call__(self, step):
        (name,) = self.wanted(self.names, step.numbers)
        logits = step.model(step.craft(name))
        self._settle()
        correct = step.total((logits.detach().argmax(1) == step.y).sum())
        self.newest = Count.of(self.names.index(name), correct, step.size)
        return F.cross_entropy(logits, step.y), logits

    def _settle(self):
        if self.newest is not None:
            self.correct[self.newest.norm] += self.newest.read()
            self.seen[self.newest.norm] += self.newest.size

    def state_dict(self):
        newest = None if self.newest is None else np.array([self.newest.norm, self.newest.read(), self.newest.size])
        return {"correct": self.correct.copy(), "seen": self.seen.copy(), "newest": newest}

    def load_state_dict(self, state):
        self.correct, self.seen = state["correct"].copy(), state["seen"].copy()
        self.newest = None if state["newest"] is None else Count(*(int(number) for number in state["newest"]))


@dataclass(frozen=True)
class Count:
    """How many of one batch were classified correctly: on its way from the device to the host.

    Attributes:
        norm: number of its norm.
        correct: a number, or a host tensor of one that holds it once `arrived`.
        size: images of the batch.
        arrived: CUDA event; None: it is there.
    """

    norm: int
    correct: torch.Tensor | int
    size: int
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, norm, correct, size):
        """Args:
        correct: a number on the device.
        """
        arrived, at_host = None, correct.to("cpu", non_blocking=True)
        if correct.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(correct.device))
        return cls(norm, at_host, size, arrived)

    def read(self) -> int:
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.correct)
