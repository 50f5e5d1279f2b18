"""Exact moves onto a hyperplane inside the [0, 1] box, without sorting (methods FAB-T).

Each is one number a row (how far every coordinate goes) that solves an increasing or decreasing piecewise linear
equation. Newton's steps find the piece it lies on in a handful of passes over the row, where the authors sort the row.
Rows are (n, d) or (2, n, d) float32, in any order of the coordinates.
"""

import torch
from torch.linalg import vecdot

from genray.core.geometry import MOST_STEPS, indicator

TOLERANCE = 1e-6  # of the equation that is solved, before the last step
LARGE, TINY = torch.finfo(torch.float32).max, 1e-30
LEAST_WEIGHT = 1e-8  # as in the authors' code, l2 and l1 do not move a coordinate of smaller weight
FIRST_LARGEST = 64  # coordinates that l1's greedy walk looks at before it looks at more


def hyperplane_move(norm, points, weight, residual):
    """Shortest moves of points onto a hyperplane, staying in the box (Croce & Hein, 1907.02044, section 3).

    Args:
        norm: "linf", "l2" or "l1": the length that is least.
        points: (m, n, d) in [0, 1]: m points for each of n hyperplanes.
        weight: (n, d) normals w.
        residual: (m, n) values w . point - b.

    Returns:
        (m, n, d) moves v with w . (point + v) = b; where the box does not reach the hyperplane, the move to the corner
        nearest to it. Coordinates of weight 0 (l2 and l1: to within 1e-8) stay.
    """
    size = weight.abs()
    movable = indicator(torch.gt, size, 0.0 if norm == "linf" else LEAST_WEIGHT)
    size = size * movable
    gap = indicator(torch.lt, weight * residual.sign()[..., None], 0.0).sub_(points).mul_(movable)
    if norm == "l1":
        return _greedy_move(gap, size, residual.abs())
    speed = movable if norm == "linf" else size  # of each coordinate as the multiplier grows
    reach = _multiplier(gap.abs(), size, speed, residual.abs())[..., None] * speed
    return torch.minimum(torch.maximum(gap, -reach), reach)


def _multiplier(room, size, speed, wanted):
    """(m, n) smallest t >= 0 with sum_i size_i min(t speed_i, room_i) = wanted; `LARGE` where there is none.

    The sum is concave in t: Newton's steps from the left never pass the solution.
    """
    t = (wanted / vecdot(size, speed).clamp_min(TINY)).clamp_max(LARGE)
    moved, active = torch.empty_like(room), torch.empty_like(room)
    for _ in range(MOST_STEPS):
        torch.mul(t[..., None], speed, out=moved)
        torch.gt(room, moved, out=active)
        slope = vecdot(active.mul_(speed), size)
        missing = wanted - vecdot(torch.minimum(moved, room, out=moved), size)
        t = torch.where(slope > 0, (t + missing.clamp_min(0) / slope).clamp_max(LARGE), LARGE)
        if not ((missing > TOLERANCE * wanted) & (slope > 0)).any():
            break
    return t


def _greedy_move(gap, size, wanted, number=FIRST_LARGEST):
    """l1: coordinates go to their wall in the order of falling weight until `wanted` is used up."""
    number = min(number, size.shape[-1])
    largest, at = size.topk(number, dim=-1)
    gaps = gap.gather(-1, at.expand(*gap.shape[:-1], number))
    # In float64: what is left for the last coordinate is a difference of sums.
    gain = (largest * gaps.abs()).double()
    total = gain.cumsum(-1)
    used = torch.minimum((wanted[..., None] - (total - gain)).clamp_min_(0), gain)
    steps = gaps.sign() * (used / largest.clamp_min(TINY)).to(gap.dtype)
    move = torch.zeros_like(gap).scatter_(-1, at.expand_as(steps), steps)
    if number < size.shape[-1]:
        short = (total[..., -1] < wanted).any(0).nonzero().flatten()
        if len(short):
            move[:, short] = _greedy_move(gap[:, short], size[short], wanted[:, short], 8 * number)
    return move
