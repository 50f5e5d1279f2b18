"""Exact moves onto a hyperplane or an l1 ball inside the [0, 1] box, without sorting (methods D5 and FAB-T).

Each is one number a row (how far every coordinate goes) that solves an increasing or decreasing piecewise linear
equation. Newton's steps find the piece it lies on in a handful of passes over the row, where the authors sort the row.
Rows are (n, d) or (2, n, d) float32, in any order of the coordinates.
"""

import torch
from torch.linalg import vecdot

TOLERANCE = 1e-6  # of the equation that is solved, before the last step
ROUNDING = 2**-22  # a relative step this small is no step
MOST_STEPS = 60  # a handful suffices; rounding must not keep the loop going
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
    movable = _indicator(torch.gt, size, 0.0 if norm == "linf" else LEAST_WEIGHT)
    size = size * movable
    gap = _indicator(torch.lt, weight * residual.sign()[..., None], 0.0).sub_(points).mul_(movable)
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


def l1_shrinkage(x, move, epsilon):
    """What to add to a move so that x + move lies in l1 ball and box, by the shortest way (2103.01208, section 2).

    Args:
        x: (n, d) in [0, 1].
        move: (n, d) of any size.
        epsilon: radius of the ball round x.

    Returns:
        (n, d) of the opposite sign of `move`: min(max(multiplier, what is beyond the wall), |move|). It is exactly
        -move where nothing is left of the move.
    """
    size = move.abs()
    room = _indicator(torch.ge, move, 0.0).sub_(x).abs_()
    beyond = (size - room).clamp_min_(0)
    cut = torch.maximum(_shrink_multiplier(size, beyond, epsilon)[:, None], beyond)
    return -move.sign() * torch.minimum(cut, size)


def _shrink_multiplier(size, beyond, epsilon):
    """(n,) smallest t >= 0 with sum_i size_i - clip(t, beyond_i, size_i) <= epsilon.

    The sum falls but is neither convex nor concave (a coordinate starts to shrink at `beyond` and ends at `size`), so
    Newton's steps are kept in the bracket [low, high] and replaced by its middle.
    """
    t = low = torch.zeros_like(size[:, 0])
    high, work = size.amax(1), torch.empty_like(size)
    for _ in range(MOST_STEPS):
        torch.minimum(torch.maximum(t[:, None], beyond, out=work), size, out=work)
        excess = torch.sub(size, work, out=work).sum(1) - epsilon
        low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
        active = torch.gt(size, t[:, None], out=work).sum(1) - torch.gt(beyond, t[:, None], out=work).sum(1)
        newton = t + excess / active
        following = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        done = (excess.abs() <= TOLERANCE * epsilon) | ((following - t).abs() <= ROUNDING * t)
        if done.all():
            break
        t = torch.where(done, t, following)
    return t


def _indicator(compare, values, than):
    """The comparison as 0.0 and 1.0; on CPU many times faster than by way of bool."""
    return compare(values, than, out=torch.empty_like(values))
