"""PGD adversarial training (Madry et al., arXiv 1706.06083), and its mixture with natural training."""

from genray.objectives.objective import Objective


class Adversarial(Objective):
    """L = beta CE(z(x'), y) + (1 - beta) CE(z(x), y), x' by the learner's attack (methods C2).

    For 0 < beta < 1 the adversarial and then the clean batch go through the network, as in `p-lambda/robust_tradeoff`.
    With an attack that has `tau` this is FAT (methods C5).
    """

    def __call__(self, step):
        beta = self.options.beta
        if beta == 0:
            logits = step.model(step.x)
            return self._natural(logits, step), logits
        logits = step.model(step.craft("attack"))
        loss = self._robust(logits, step)
        if beta < 1:
            loss = beta * loss + (1 - beta) * self._natural(step.model(step.x), step)
        return loss, logits

    def wanted(self, names, numbers):
        return names if self.options.beta else ()

    def _robust(self, logits, step):
        return step.cross_entropy(logits, self.options.label_smoothing)

    _natural = _robust
