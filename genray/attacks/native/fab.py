"""FAB-T, the fast adaptive boundary attack against target classes: our own, faster than the authors' package.

Croce & Hein, 1907.02044 (methods D, FAB-T). Same steps as `pyautoattack`. It is faster because an example leaves once
it is broken within epsilon, the clean logits rank all targets, few examples walk to several targets at once, and
projecting on a hyperplane needs no sort.
"""

import torch

from genray.attacks.auto import targets
from genray.attacks.native.outcome import AttackState
from genray.attacks.native.projections import hyperplane_move

NUM_STEPS = 100
OVERSHOOT = 1.05  # eta
LARGEST_PULL = 0.1  # alpha_max: weight of the move from the clean image
PULL_BACK = 0.9  # beta: what is kept of the way from the clean image once a point is misclassified
SHORTEST = 1e-8  # lengths of moves that are compared


def fab_t(model, x, y, *, norm, epsilon, seed, num_classes):
    """Attacks a batch with FAB-T as AutoAttack's `standard` version sets it: one run a target class, no random start.

    In float32 each example's iterates are the package's up to rounding. The state of the model is not touched.

    Args:
        model: images (N, C, H, W) in [0, 1] -> float32 logits (N, num_classes), in eval mode.
        x: (N, C, H, W) float32 in [0, 1]; its memory format is the one the model gets.
        y: (N,) int64.
        norm: "linf", "l2" or "l1".
        epsilon: radius >= 0 on the [0, 1] pixel scale; a closer point is not sought.
        seed: not used, nothing is drawn; here so that all members are called alike.
        num_classes: K >= 2.

    Returns:
        (N, C, H, W) with ||x' - x|| <= epsilon in [0, 1], misclassified by `model`; `x` itself for the other examples.
    """
    if len(x) == 0:
        return x.clone()
    with torch.no_grad():
        outcome = AttackState(model, x, y, norm, epsilon)
        ranking = outcome.logits.sort(dim=1).indices
        ranks = list(range(2, targets("fab_t", norm, num_classes) + 2))
        while ranks and len(at := outcome.unbroken()):
            together = outcome.runs_at_once(len(at))
            target = torch.cat([ranking[at, -rank] for rank in ranks[:together]])
            _walk(outcome, norm, at.repeat(len(target) // len(at)), target)
            del ranks[:together]
        return outcome.images()


def _walk(outcome, norm, at, target):
    """100 steps of the examples `at` (n,), some perhaps twice, towards the boundary of `target` (n,) and along it."""
    x, y = outcome.x[at], outcome.y[at]
    point = x
    for _ in range(NUM_STEPS):
        difference, weight = _difference(outcome, point, y, target)
        point = _step(outcome.ball, norm, x, point, difference, weight)
        wrong = outcome.predict(point).argmax(1) != y
        settled = outcome.settle(at, point, wrong & (outcome.ball.length(point - x) <= outcome.epsilon))
        if settled is not None:
            staying, _ = settled
            at, x, y, target, point, wrong = (v[staying] for v in (at, x, y, target, point, wrong))
            if len(at) == 0:
                return
        point = torch.where(wrong[:, None], x + (point - x) * PULL_BACK, point)


def _difference(outcome, point, y, target):
    """z_target - z_y (n,) and its gradient (n, d): one pass back, whatever the number of classes."""
    with torch.enable_grad():
        point = point.detach().requires_grad_(True)
        logits = outcome.predict(point)
        difference = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
        (gradient,) = torch.autograd.grad(difference.sum(), point)
    return difference.detach(), gradient


def _step(ball, norm, x, point, difference, weight):
    """Onto the linearised boundary and past it, from the point and a little from the clean image."""
    # The residual at x from the one at the point, not w . x - b: near the boundary that would be mostly rounding.
    residual = torch.stack([difference, difference + torch.linalg.vecdot(weight, x - point)])
    here, there = hyperplane_move(norm, torch.stack([point, x]), weight, residual)
    from_here, from_there = (ball.length(move).clamp_min_(SHORTEST)[:, None] for move in (here, there))
    pull = (from_here / (from_here + from_there)).clamp_(max=LARGEST_PULL)
    ahead = here.mul_(OVERSHOOT).add_(point).mul_(1 - pull)
    return ahead.add_(there.mul_(OVERSHOOT).add_(x).mul_(pull)).clamp_(0, 1)
