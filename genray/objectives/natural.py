"""Natural training (NT): cross-entropy on clean images."""

import torch.nn.functional as F


class Natural:
    """L = CE(z(x), y)."""

    def __init__(self, options):
        self.label_smoothing = options.label_smoothing

    def __call__(self, model, x, y, craft):
        """Mean loss of a batch, and the logits it was computed on.

        Args:
            model: in train mode; images (N, C, H, W) in [0, 1] -> logits (N, K).
            x: (N, C, H, W) in [0, 1].
            y: (N,) int64.
            craft: not used; (x, y) -> adversarial images.
        """
        logits = model(x)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing), logits
