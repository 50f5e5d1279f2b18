"""PGD adversarial training (Madry et al., arXiv 1706.06083), and its mixture with natural training."""

import torch.nn.functional as F


class Adversarial:
    """L = beta CE(z(x'), y) + (1 - beta) CE(z(x), y), x' by the learner's attack (methods C2).

    For 0 < beta < 1 the adversarial and then the clean batch go through the network, as in `p-lambda/robust_tradeoff`.
    """

    def __init__(self, options):
        self.beta, self.label_smoothing = options.beta, options.label_smoothing

    def __call__(self, model, x, y, craft):
        """Mean loss of a batch, and the logits it was computed on (the adversarial ones where there are any).

        Args:
            model: in train mode; images (N, C, H, W) in [0, 1] -> logits (N, K).
            x: (N, C, H, W) in [0, 1].
            y: (N,) int64.
            craft: (x, y) -> adversarial images (N, C, H, W) against the current model.
        """
        if self.beta == 0:
            logits = model(x)
            return self._cross_entropy(logits, y), logits
        logits = model(craft(x, y))
        loss = self._cross_entropy(logits, y)
        if self.beta < 1:
            loss = self.beta * loss + (1 - self.beta) * self._cross_entropy(model(x), y)
        return loss, logits

    def _cross_entropy(self, logits, y):
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
