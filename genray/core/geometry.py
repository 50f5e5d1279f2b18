"""Norm balls: for each norm a random start, a steepest step and a projection on ball and box (methods D2 to D5).

All functions work on batches (N, ...) and treat each example on its own. Images live in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


def _per_example(values, like):
    return values.view(-1, *[1] * (like.dim() - 1))


def _l2(v):
    return v.flatten(1).norm(dim=1)


# --- Linf ---------------------------------------------------------------------------------------------------------


def linf_start(x, epsilon, draw):
    return draw.uniform(x) * (2 * epsilon) - epsilon


def linf_step(gradient, sparsity):
    return gradient.sign()


def linf_project(x, adversarial, epsilon):
    return torch.minimum(torch.maximum(adversarial, x - epsilon), x + epsilon).clamp_(0, 1)


# --- L2 -----------------------------------------------------------------------------------------------------------


def l2_start(x, epsilon, draw):
    """A random direction with a radius uniform in [0, epsilon]."""
    direction = draw.normal(x)
    radius = draw.uniform(x.flatten(1)[:, :1]).flatten() * epsilon
    return direction * _per_example(radius / _l2(direction).clamp_min(1e-12), x)


def l2_step(gradient, sparsity):
    # By the largest entry first: a confident network's gradients are so small that their squares vanish.
    largest = gradient.flatten(1).abs().amax(1)
    scaled = gradient / _per_example(largest.where(largest > 0, torch.ones_like(largest)), gradient)
    return scaled / _per_example(_l2(scaled).clamp_min(1e-12), gradient)


def l2_project(x, adversarial, epsilon):
    """Rescales to the ball, then clips to the box (as the authors' AutoAttack does; the clip only shortens)."""
    delta = adversarial - x
    factor = (epsilon / _l2(delta).clamp_min(1e-12)).clamp_max(1.0)
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
    """Exact projection on the intersection of the L1 ball and the box (methods D5; Croce & Hein, 2103.01208).

    The result is x + sign(delta) * clip(|delta| - lambda, 0, room) with the smallest lambda >= 0 that fits the ball.
    Its mass is piecewise linear in lambda with breakpoints |delta| and |delta| - room, so sorting them and one
    cumulative sum give lambda exactly.
    """
    delta = (adversarial - x).flatten(1).double()
    flat = x.flatten(1).double()
    magnitude = delta.abs()
    room = torch.where(delta >= 0, 1 - flat, flat)
    shrink = _l1_multiplier(magnitude, room, epsilon)
    moved = torch.minimum((magnitude - shrink[:, None]).clamp_min_(0), room)
    result = (flat + delta.sign() * moved).to(x.dtype).view_as(x)
    return result.clamp_(0, 1)


def _l1_multiplier(magnitude, room, epsilon):
    """Smallest lambda >= 0 with sum_i clip(magnitude_i - lambda, 0, room_i) <= epsilon, per row."""
    # Walking lambda up from 0: coordinate i shortens between magnitude - room (off the wall) and magnitude (gone).
    breaks = torch.cat([(magnitude - room).clamp_min(0), magnitude], dim=1)
    slopes = torch.cat([-torch.ones_like(magnitude), torch.ones_like(magnitude)], dim=1)
    breaks, order = breaks.sort(dim=1)
    slope = slopes.gather(1, order).cumsum(1)  # of the mass, right of each breakpoint
    mass = torch.minimum(magnitude, room).sum(1, keepdim=True)
    steps = torch.diff(breaks, dim=1, append=breaks[:, -1:]) * slope
    right = mass + steps.cumsum(1)  # mass at the next breakpoint
    left = torch.cat([mass, right[:, :-1]], dim=1)
    inside = (right <= epsilon).to(torch.int8).argmax(dim=1, keepdim=True)  # first stretch that ends within the ball
    gap, decline = left.gather(1, inside) - epsilon, -slope.gather(1, inside)
    shrink = breaks.gather(1, inside) + gap.clamp_min(0) / decline.clamp_min(1)
    return torch.where(mass[:, 0] <= epsilon, torch.zeros_like(shrink[:, 0]), shrink[:, 0])


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
