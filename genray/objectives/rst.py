"""RST, robust self-training (Raghunathan et al., ICML 2020, arXiv 2002.10716)."""

import torch
import torch.nn.functional as F

from genray.objectives.adversarial import Adversarial


class Rst(Adversarial):
    """L = (1 - beta) L_nat + beta L_rob over labelled and pseudo-labelled examples together (methods C7).

    L_nat is cross-entropy on the images, L_rob on their adversarial images, each a weighted mean over the batch:
    sum_i w_i CE_i / sum_i w_i, with w_i = u on a pseudo-labelled and 1 - u on a labelled example. The weights are
    divided by their sum over the batch at hand, as in `p-lambda/robust_tradeoff`, so that a loss does not change its
    scale with how many of a batch happen to be labelled. In a batch of one kind alone the weights are equal, hence the
    plain mean; that holds for u = 0 and u = 1 too, where all of them would vanish (the authors' code does the same in a
    batch of labelled examples, and divides 0 by 0 in one of pseudo-labelled ones).
    """

    def _robust(self, logits, step):
        return weighted_cross_entropy(logits, step, self.options.robust_weight)

    def _natural(self, logits, step):
        return weighted_cross_entropy(logits, step, self.options.natural_weight)


def weighted_cross_entropy(logits, step, u: float):
    """Mean of the cross-entropies with weight u on pseudo-labelled and 1 - u on labelled examples.

    Args:
        logits: (N, K).
        step: their `TrainingStep`. Where N examples are a part of the batch, the mean over its parts (each counting by
            its weight) is the weighted mean over the batch.
        u: from 0 to 1.
    """
    if step.labelled is None:
        return F.cross_entropy(logits, step.y)
    weights = torch.where(step.labelled, 1 - u, u).to(logits.dtype)
    weights = torch.where(step.total(weights.sum()) > 0, weights, torch.ones_like(weights))
    losses = F.cross_entropy(logits, step.y, reduction="none")
    return (weights * losses).sum() / (step.weight * step.total(weights.sum()))
