"""What an attack maximises: (logits (N, K), target) -> (N,) per-example losses.

The target is the labels (N,), or for the losses of `AGAINST_CLEAN` the logits (N, K) of the clean images.
"""

import math

import torch.nn.functional as F

from genray.core.mixed_labels import MixedLabels

CONFIDENCE = 50.0  # of the margin loss: large enough that the clamp does not bind on ordinary logits


def cross_entropy(logits, labels):
    """CE of each example; `labels` may be `MixedLabels`."""
    if isinstance(labels, MixedLabels):
        return labels.cross_entropy(logits)
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits, labels):
    """-max(z_y - max_{j != y} z_j + 50, 0) of each example: the loss of CW-inf (methods D3b), for K >= 2 classes.

    It stops rising once an example is misclassified by more than `CONFIDENCE`: its gradient is then zero.
    """
    return -(signed_margin(logits, labels) + CONFIDENCE).clamp_min(0)


def signed_margin(logits, labels):
    """(N,) z_y - max_{j != y} z_j of logits (N, K), K >= 2."""
    true = logits.gather(1, labels[:, None])[:, 0]
    return true - logits.scatter(1, labels[:, None], -math.inf).amax(1)


def kl_from_clean(logits, clean_logits):
    """KL(p(x) || p(x')) of each example: what TRADES attacks and penalises (Zhang et al., 1901.08573; methods C3)."""
    log_p, log_q = clean_logits.log_softmax(1), logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def squared_error(logits, target_logits):
    """Squared Euclidean distance of each example's logits from the target's."""
    return (logits - target_logits).square().sum(1)


LOSSES = {"cross_entropy": cross_entropy, "margin": margin, "kl": kl_from_clean}
AGAINST_CLEAN = {"kl"}


def loss_function(loss):
    """The loss of a name in `LOSSES`, or the function itself."""
    return LOSSES[loss] if isinstance(loss, str) else loss
