"""A radius per example: small where the loss is steep, large where it is flat (the published draft of clean feature
anchoring, `sgmath12/FAT`, with clip [0.5, 1.5])."""

from dataclasses import replace

import torch

from genray.attacks.gradient import input_gradient, temporary_mode
from genray.attacks.losses import cross_entropy


def steepness(model, x, y, training: bool):
    """(N,) float64 L2 norms of the gradient of each example's cross-entropy at the clean image. Cost: one pass.

    The L2 norm is the draft's, whatever the attack's norm. The cross-entropy is taken even where the attack maximises
    another loss: the losses that compare with the clean image (TRADES's KL) have no gradient there.

    Args:
        training: the mode in which the model is attacked.
    """
    if not len(x) and not training:  # an empty shard; in train mode its process takes part in BatchNorm's sums
        return x.new_zeros(0, dtype=torch.float64)
    with temporary_mode(model, training=training):
        gradient = input_gradient(model, x, y, cross_entropy)
    return gradient.flatten(1).double().norm(dim=1)  # float64: the squares of a confident network's gradients vanish


def radius_factors(steepness, clip: tuple[float, float]):
    """(N,) clip(mean(g) / g_i, *clip), divided by their mean: epsilon times these has the batch mean epsilon.

    Args:
        steepness: g, (N,) float64 of the whole batch, >= 0.
        clip: smallest and largest factor before that division.
    """
    tiny = torch.finfo(steepness.dtype).tiny  # where all gradients vanish, all radii are equal
    factors = (steepness.mean().clamp_min(tiny) / steepness.clamp_min(tiny)).clamp(*clip)
    return factors / factors.mean()


def with_radii(attack, factors):
    """The attack with epsilon and step size multiplied by (N,) `factors`.

    The step size too, as in the draft: every example crosses its ball in equally many steps. (APGD's step is a multiple
    of epsilon anyway.)
    """
    changes = {"epsilon": attack.epsilon * factors[:, None, None, None]}
    if hasattr(attack, "step_size"):
        changes["step_size"] = (attack.step_size * factors[:, None, None, None]).float()
    return replace(attack, **changes)
