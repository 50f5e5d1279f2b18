"""The members of AutoAttack, run one at a time through the authors' package (`pyautoattack`; methods D4).

Croce & Hein, 2003.01690 (AutoAttack, APGD), 1907.02044 (FAB), 2103.01208 (APGD in l1); Andriushchenko et al.,
1912.00049 (Square). The package is imported when a member is run, not before.
"""

import logging
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from genray.attacks.gradient import temporary_mode
from genray.core.geometry import BALLS
from genray.errors import ConfigError

PACKAGE_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Member:
    """One attack of AutoAttack.

    Attributes:
        loss: what it maximises, in words.
        least_classes: its loss is not defined for fewer.
        num_steps: iterations a run (for Square: queries).
    """

    loss: str
    least_classes: int = 2
    num_steps: int = 100


MEMBERS = {
    "apgd_ce": Member("cross-entropy"),
    "apgd_dlr": Member("DLR", least_classes=3),
    "apgd_t": Member("targeted DLR", least_classes=4),
    "fab_t": Member("distance to the boundary of each target class"),
    "square": Member("margin, without gradients", num_steps=5000),
}


def run_member(model, x, y, *, member, norm, epsilon, seed, num_classes):
    """Attacks a batch with one member as the `standard` version sets it for the norm.

    One restart; in l1 APGD runs in three stages of radius 3, 2 and 1 epsilon, and APGD-CE and APGD-DLR five times.
    Targets are the classes - 1 at most (of 9; 5 for APGD-T in l1). The package draws its numbers for the batch as a
    whole, so the result depends on which examples are in it.

    Args:
        model: module, float32 images (N, C, H, W) in [0, 1] -> logits (N, num_classes). Modes, parameters, their
            gradients and `requires_grad`, buffers and the global random state are as before on return.
        x: (N, C, H, W) float32 in [0, 1].
        y: (N,) int64.
        member: key of `MEMBERS`.
        norm: "linf", "l2" or "l1".
        epsilon: radius > 0 on the [0, 1] pixel scale.
        seed: of all the numbers the member draws, in [0, 2**63).
        num_classes: K >= 2.

    Returns:
        (N, C, H, W) with ||x' - x|| <= epsilon in [0, 1]; `x` itself for an example that was not broken.

    Raises:
        ConfigError: the member is not defined for so few classes, or Square not for the image size. It does not fall
            back on another attack: a result under a member's name is that member's. (`evaluation/suite.py` replaces.)
    """
    check(member, norm, num_classes, x.shape)
    if len(x) == 0:
        return x.clone()
    with ExitStack() as state:
        state.enter_context(torch.no_grad())
        state.enter_context(temporary_mode(model, training=False))
        for keep in (frozen(model), _global_randomness_kept(), _silence()):
            state.enter_context(keep)
        attack = _standard(member, model, x.device, norm, epsilon, seed, num_classes)
        found = attack.perturb(x.clone(), y)
        # The package's float32 projections leave points outside by a little (l1, 3 x 32 x 32: by 4e-5 of the radius);
        # a point that is inside does not move.
        return BALLS[norm].project(x, found.to(x.dtype), epsilon)


def targets(member, norm, num_classes) -> int:
    """Target classes that APGD-T or FAB-T really tries."""
    return min(5 if (member, norm) == ("apgd_t", "l1") else 9, num_classes - 1)


def runs(member, norm, num_classes) -> int:
    """How often the member starts on an example that resists: once a target or restart."""
    if member in ("apgd_t", "fab_t"):
        return targets(member, norm, num_classes)
    return 5 if norm == "l1" and member != "square" else 1


def passes(member, norm, num_classes) -> tuple[int, int]:
    """(forward and backward passes, forward-only passes) that an example costs which no run breaks."""
    number = runs(member, norm, num_classes)
    if member == "square":
        return 0, 5000 + 3  # the start, and a check before and after
    if member == "fab_t":
        return 100 * number, (100 + 3) * number + 1
    a_run = 103 if norm == "l1" else 101  # each stage begins with a gradient at its start
    return a_run * number, (number if member == "apgd_t" else 0) + 1


def _standard(member, model, device, norm, epsilon, seed, num_classes):
    from pyautoattack import AutoAttack

    suite = AutoAttack(
        model, norm=PACKAGE_NORMS[norm], eps=float(epsilon), seed=seed, device=device, version="standard"
    )
    if member == "square":
        return suite.square
    if member in ("apgd_ce", "apgd_dlr"):
        suite.apgd.loss = member.removeprefix("apgd_")
        return suite.apgd
    attack = suite.fab if member == "fab_t" else suite.apgd_targeted
    attack.targeted = True
    attack.n_target_classes = targets(member, norm, num_classes)
    return attack


def check(member, norm, num_classes, shape):
    """Raises ConfigError where a member is not defined, see `run_member`."""
    least = MEMBERS[member].least_classes
    if num_classes < least:
        loss = MEMBERS[member].loss
        raise ConfigError(f"{member}: expected at least {least} classes for the {loss} loss, got {num_classes}")
    if member == "square" and norm != "linf" and not _square_fits(*shape[2:]):
        raise ConfigError(
            f"square: expected images whose {norm} start (a 5 x 5 grid of patterns) the package can lay out, "
            f"got {shape[2]} x {shape[3]} pixels"
        )


def _square_fits(height, width):
    """Whether the package's loop over grid cells stays inside the image (it fails for 14 x 14 or 24 x 24)."""
    side = height // 5
    begin = (height - 5 * side) // 2
    # Cells of one pixel may hang over the edge: they broadcast to nothing.
    return side == 1 or (side > 1 and all(begin + n // side * side <= n for n in (height, width)))


@contextmanager
def frozen(model):
    """FAB calls backward(), which would add to every parameter's gradient."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@contextmanager
def _global_randomness_kept():
    """The package seeds torch's global generators, those of all CUDA devices among them."""
    started = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else ()):
        yield
    if not started:  # seeds wait until CUDA starts: put the one back that waited
        torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def _silence():
    logger = logging.getLogger("auto-attack")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
