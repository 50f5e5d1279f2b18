"""TRADES (Zhang et al., ICML 2019, arXiv 1901.08573)."""

import torch.nn.functional as F

from genray.attacks.losses import kl_from_clean
from genray.objectives.objective import Objective


class Trades(Objective):
    """L = CE(z(x), y) + beta mean_i KL(p(x_i) || p(x'_i)), x' maximising the same KL (methods C3).

    The KL's first argument is not detached. The clean batch goes through the network once, for both terms: the authors'
    code does it twice, which gives the same gradient and moves BatchNorm's statistics once more.
    """

    attack_loss = "kl"

    def wanted(self, names, numbers):
        return names if self.options.beta else ()

    def __call__(self, step):
        # Crafted first: a training pass before the attack would move the BatchNorm statistics that it runs on.
        adversarial = step.craft("attack") if self.options.beta else None
        clean = step.model(step.x)
        loss = F.cross_entropy(clean, step.y, label_smoothing=self.options.label_smoothing)
        if adversarial is None:
            return loss, clean
        logits = step.model(adversarial)
        return loss + self.options.beta * kl_from_clean(logits, clean).mean(), logits
