"""Norm balls: for each norm a random start, a steepest step and a projection on ball and box (methods D2 to D5).

All functions work on batches (N, ...) and treat each example on its own. Images live in [0, 1]. `epsilon` is a number,
or one an example: a tensor (N, 1, ..., 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from genray.core import waiting

MOST_STEPS = 60  # of Newton's method: a handful suffices; rounding must not keep the loop going
FIXED_STEPS = 20  # where asking whether it is done would wait; for noise, and for steps from points of the ball, 9 do


def _per_example(values, like):
    return values.view(-1, *[1] * (like.dim() - 1))


def _l2(v):
    return v.flatten(1).norm(dim=1) if v.device.type == "cpu" else _reduced(torch.linalg.vector_norm, v)


def _largest(v):
    return v.flatten(1).abs().amax(1) if v.device.type == "cpu" else _reduced(torch.amax, v.abs())


def _reduced(reduce, v):
    """(N,) over all other axes, which a GPU does without the copy that `flatten` makes of channels_last tensors.

    Not on a CPU, which it costs more, and where it rounds otherwise.
    """
    return reduce(v, dim=tuple(range(1, v.dim())))


def _as(epsilon, like):
    """One radius an example in the type of `like`; a number as it is."""
    return epsilon.to(like.dtype) if isinstance(epsilon, torch.Tensor) else epsilon


def _flat(epsilon, like):
    """The same as (N,)."""
    return _as(epsilon, like).flatten() if isinstance(epsilon, torch.Tensor) else epsilon


# --- Linf ---------------------------------------------------------------------------------------------------------


def linf_start(x, epsilon, draw):
    epsilon = _as(epsilon, x)
    return draw.uniform(x) * (2 * epsilon) - epsilon


def linf_step(gradient, sparsity):
    return gradient.sign()


def linf_project(x, adversarial, epsilon):
    epsilon = _as(epsilon, x)
    return torch.minimum(torch.maximum(adversarial, x - epsilon), x + epsilon).clamp_(0, 1)


# --- L2 -----------------------------------------------------------------------------------------------------------


def l2_start(x, epsilon, draw):
    """A random direction with a radius uniform in [0, epsilon]."""
    direction = draw.normal(x)
    radius = draw.uniform(x.flatten(1)[:, :1]).flatten() * _flat(epsilon, x)
    return direction * _per_example(radius / _l2(direction).clamp_min(1e-12), x)


def l2_step(gradient, sparsity):
    # By the largest entry first: a confident network's gradients are so small that their squares vanish.
    largest = _largest(gradient)
    scaled = gradient / _per_example(largest.where(largest > 0, torch.ones_like(largest)), gradient)
    return scaled / _per_example(_l2(scaled).clamp_min(1e-12), gradient)


def l2_project(x, adversarial, epsilon):
    """Rescales to the ball, then clips to the box (as the authors' AutoAttack does; the clip only shortens)."""
    delta = adversarial - x
    # By the reciprocal, which is how torch divides a number by a tensor: equal radii give the bits of one number.
    factor = (_l2(delta).clamp_min(1e-12).reciprocal() * _flat(epsilon, x)).clamp_max(1.0)
    return (x + delta * _per_example(factor, x)).clamp_(0, 1)


# --- L1 -----------------------------------------------------------------------------------------------------------


def l1_start(x, epsilon, draw):
    """Normal noise projected on the ball."""
    return l1_project(x, x + draw.normal(x), epsilon) - x


def l1_step(gradient, sparsity):
    """Signs of the `sparsity` share of coordinates with the largest gradients, of L1 norm 1 (methods D4.7)."""
    flat = gradient.flatten(1)
    k = max(1, math.ceil(sparsity * flat.shape[1] - 1e-9))
    _, largest = flat.abs().topk(k, dim=1)
    step = torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign())
    return (step / step.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)


def l1_project(x, adversarial, epsilon):
    """Exact projection on the intersection of the L1 ball and the box (methods D5; Croce & Hein, 2103.01208)."""
    flat, move = x.flatten(1).double(), (adversarial - x).flatten(1).double()
    return (flat + move + l1_shrinkage(flat, move, epsilon)).to(x.dtype).view_as(x).clamp_(0, 1)


def l1_shrinkage(x, move, epsilon):
    """What to add to a move so that x + move lies in l1 ball and box, by the shortest way (2103.01208, section 2).

    Args:
        x: (n, d) in [0, 1].
        move: (n, d) of any size.
        epsilon: radius of the ball round x, or one an example.

    Returns:
        (n, d) of the opposite sign of `move`: min(max(multiplier, what is beyond the wall), |move|). It is exactly
        -move where nothing is left of the move.
    """
    size, epsilon = move.abs(), _flat(epsilon, move)
    room = indicator(torch.ge, move, 0.0).sub_(x).abs_()
    beyond = (size - room).clamp_min_(0)
    cut = torch.maximum(_shrink_multiplier(size, beyond, epsilon)[:, None], beyond)
    cut = torch.minimum(cut, size)
    if not waiting.reads_are_free(move):
        # Too few steps for sizes of many orders of magnitude: into the ball all the same.
        left = size - cut
        share = (epsilon / left.sum(1).clamp_min(torch.finfo(left.dtype).tiny)).clamp_max(1.0)
        cut = torch.where(share[:, None] < 1, size - left * share[:, None], cut)
    return -move.sign() * cut


def _shrink_multiplier(size, beyond, epsilon):
    """(n,) smallest t >= 0 with sum_i size_i - clip(t, beyond_i, size_i) <= epsilon.

    The sum falls but is neither convex nor concave (a coordinate starts to shrink at `beyond` and ends at `size`), so
    Newton's steps are kept in the bracket [low, high] and replaced by its middle.
    """
    t = low = torch.zeros_like(size[:, 0])
    high, work = size.amax(1), torch.empty_like(size)
    tolerance, rounding = (1e-6, 2**-22) if size.dtype == torch.float32 else (1e-14, 2**-51)
    asks = waiting.reads_are_free(size)
    for _ in range(MOST_STEPS if asks else FIXED_STEPS):
        torch.minimum(torch.maximum(t[:, None], beyond, out=work), size, out=work)
        excess = torch.sub(size, work, out=work).sum(1) - epsilon
        low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
        active = torch.gt(size, t[:, None], out=work).sum(1) - torch.gt(beyond, t[:, None], out=work).sum(1)
        newton = t + excess / active
        following = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        done = (excess.abs() <= tolerance * epsilon) | ((following - t).abs() <= rounding * t)
        if asks and done.all():
            break
        t = torch.where(done, t, following)
    return t


def indicator(compare, values, than):
    """The comparison as 0.0 and 1.0; on CPU many times faster than by way of bool."""
    return compare(values, than, out=torch.empty_like(values))


@dataclass(frozen=True)
class Ball:
    """One norm's geometry.

    Attributes:
        start: (x (N, ...), epsilon, draw) -> perturbation (N, ...) in the ball; `draw` has `uniform(like)` in [0, 1)
            and `normal(like)`.
        step: (gradient (N, ...), sparsity) -> the steepest ascent direction of norm 1; 0 where the gradient is 0.
        project: (x, adversarial, epsilon) -> an image in ball and [0, 1] box: the nearest for linf and l1; for l2 the
            ball's nearest, then clipped.
        length: (N, ...) -> (N,) norm of each example.
    """

    start: Callable
    step: Callable
    project: Callable
    length: Callable


BALLS = {
    "linf": Ball(linf_start, linf_step, linf_project, lambda v: v.flatten(1).abs().amax(1)),
    "l2": Ball(l2_start, l2_step, l2_project, _l2),
    "l1": Ball(l1_start, l1_step, l1_project, lambda v: v.flatten(1).abs().sum(1)),
}
