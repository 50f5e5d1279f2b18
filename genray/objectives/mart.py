"""MART, misclassification-aware adversarial training (Wang et al., ICLR 2020)."""

import torch

from genray.attacks.losses import cross_entropy, kl_from_clean
from genray.objectives.objective import Objective

MARGIN = 1.0001  # in the logarithm, as in the authors' code, so that it stays finite


class Mart(Objective):
    """L = mean[ CE(z(x'), y) - log(1.0001 - max_{j != y} q_j) + beta KL(p || q) (1 - p_y) ] (methods C4).

    p = p(x), q = p(x'), x' maximises CE; no factor is detached.
    """

    def __call__(self, step):
        adversarial = step.craft("attack")
        clean, logits = step.model(step.x), step.model(adversarial)  # in this order, as in the authors' code
        q, p = logits.softmax(1), clean.softmax(1)
        other = q.scatter(1, step.y[:, None], 0.0).amax(1)
        boosted = cross_entropy(logits, step.y) - torch.log(MARGIN - other)
        unsure = 1 - p.gather(1, step.y[:, None])[:, 0]
        return (boosted + self.options.beta * kl_from_clean(logits, clean) * unsure).mean(), logits
