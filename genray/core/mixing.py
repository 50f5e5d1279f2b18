"""The averages of Generalist on flat weights, updated in place.

The serial recursion (official code `main.py`; slides "Framework") is, for base learners k = 1..K,

    theta_g <- d_s theta_g + (1 - d_s) sum_k w_k(s) theta_k,        sum_k w_k(s) = 1.

It is linear and d_s, w_k(s) are known schedules, so learner k keeps a private share
`G_k <- d_s G_k + (1 - d_s) w_k(s) theta_k` and theta_g = sum_k G_k at every step (methods A1).
"""

import torch


def ema_update_(average: torch.Tensor, weights: torch.Tensor, decay: float) -> torch.Tensor:
    """average <- decay * average + (1 - decay) * weights, in place.

    Args:
        average: (P,) float32, changed.
        weights: (P,) float32.
        decay: in [0, 1).
    """
    return average.lerp_(weights, 1.0 - decay)


def accumulate_(share: torch.Tensor, weights: torch.Tensor, decay: float, mixing_weight: float) -> torch.Tensor:
    """G_k <- d G_k + (1 - d) w_k theta_k, in place.

    Args:
        share: (P,) float32, G_k, changed.
        weights: (P,) float32, theta_k (raw or averaged).
        decay: d_s, in [0, 1).
        mixing_weight: w_k(s), in [0, 1]; at 0 the weights are not read.
    """
    share.mul_(decay)
    if mixing_weight:
        share.add_(weights, alpha=(1.0 - decay) * mixing_weight)
    return share


BLOCK = 1 << 18  # elements


def sum_shares(shares) -> torch.Tensor:
    """theta_g = sum_k G_k, in the order given (so that both runtimes round alike).

    Args:
        shares: K >= 1 tensors of one shape; not changed.

    Returns:
        A new tensor.
    """
    first, *others = shares
    if not others:
        return first.clone()
    total = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    # Block by block, so that a block is still in the cache when the next share is added to it.
    blocks = zip(total.view(-1).split(BLOCK), *(share.reshape(-1).split(BLOCK) for share in shares))
    for part, one, two, *rest in blocks:
        torch.add(one, two, out=part)
        for share in rest:
            part.add_(share)
    return total


def weighted_sum(tensors, weights) -> torch.Tensor:
    """sum_k w_k theta_k, added up in float64 and rounded once.

    Args:
        tensors: K >= 1 tensors of one shape and floating-point type; not changed.
        weights: K numbers that sum to 1; a tensor of weight 0 is not read, so a single weight of
            1 returns its tensor bit for bit.

    Returns:
        A new tensor of their type.
    """
    tensors = list(tensors)
    parts = [tensor.double() * float(weight) for tensor, weight in zip(tensors, weights) if weight]
    return sum(parts[1:], start=parts[0]).to(tensors[0].dtype)
