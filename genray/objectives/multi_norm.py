"""Training against several norms at once.

MAX, AVG (Tramer & Boneh, 1904.13000), SAT (Madaan et al., 2003.06064), MSD (Maini et al., 1909.04068).
"""

import torch.nn.functional as F

from genray.attacks.msd import MsdAttack
from genray.attacks.worst import WorstAttack
from genray.objectives.objective import Objective


class SeveralNorms(Objective):
    """Has the learner's `attacks`, in their order."""

    def build_attacks(self, configs):
        self.names = tuple(configs)
        return super().build_attacks(configs)


class Max(Objective):
    """CE on the adversarial image of the norm with the largest CE, example by example (methods C10)."""

    def build_attacks(self, configs):
        return {"worst": self.combine(tuple(super().build_attacks(configs).values()))}

    def combine(self, attacks):
        return WorstAttack(attacks)

    def __call__(self, step):
        logits = step.model(step.craft("worst"))
        return F.cross_entropy(logits, step.y), logits


class Msd(Max):
    """CE on the images of one attack that chooses the norm at every step (methods C10)."""

    def combine(self, attacks):
        return MsdAttack(attacks, self.options.l1_pixels)


class Average(SeveralNorms):
    """Mean over the norms of CE on their adversarial images, one update for all (methods C10)."""

    def __call__(self, step):
        images = [step.craft(name) for name in self.names]  # all against the network of before the training passes
        logits = [step.model(one) for one in images]
        loss = sum(F.cross_entropy(one, step.y) for one in logits) / len(logits)
        return loss, logits[0]


class Stochastic(SeveralNorms):
    """SAT: the norm of each batch is drawn uniformly (methods C10)."""

    def wanted(self, names, numbers):
        return (names[int(numbers.integers(len(names)))],)

    def __call__(self, step):
        (name,) = self.wanted(self.names, step.numbers)
        logits = step.model(step.craft(name))
        return F.cross_entropy(logits, step.y), logits
