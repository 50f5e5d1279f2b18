"""Anchored adversarial training: regression on another network's logits at the clean images."""

from genray.attacks.losses import cross_entropy, kl_from_clean, squared_error
from genray.objectives.objective import Objective


class Anchor(Objective):
    """L = mean[ (1 - b) s D(z(x'), t(x)) + b CE(z(x'), y) ], t the target network in eval mode; x' maximises D.

    D is the squared error summed over the classes, as in "clean feature anchoring" (public draft `sgmath12/FAT`, whose
    ablation finds features and logits equally good; LBGAT, 2011.11164, takes the mean over the classes), or
    T^2 KL(softmax(t/T) || softmax(z/T)), as in ARD (1905.09747) and RSLAD (2108.07969).
    b = `cross_entropy`, s = `scale`, T = `temperature`; b = 1 is adversarial training, whose attack maximises CE.
    """

    def __init__(self, options):
        super().__init__(options)
        self.uses_target = options.cross_entropy < 1
        self.attack_loss = self._distance if self.uses_target else "cross_entropy"

    def __call__(self, step):
        weight, logits = self.options.cross_entropy, step.model(step.craft("attack"))
        if not self.uses_target:
            return cross_entropy(logits, step.y).mean(), logits
        losses = self.options.scale * self._distance(logits, step.target)
        if weight:
            losses = (1 - weight) * losses + weight * cross_entropy(logits, step.y)
        return losses.mean(), logits

    def _distance(self, logits, target):
        """(N,) distances of logits (N, K) from target logits (N, K)."""
        if self.options.loss == "squared_error":
            return squared_error(logits, target)
        temperature = self.options.temperature
        return temperature**2 * kl_from_clean(logits / temperature, target / temperature)
