"""Piecewise linear schedules, the decay of averages, and the windows of a run."""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction


def piecewise_linear(knots, position: float) -> float:
    """Value at `position` of the piecewise linear function through `knots`.

    Args:
        knots: (position, value) pairs of floats, positions not decreasing; where two share one, the later value holds.
        position: fraction of the run, in [0, 1].
    """
    i = bisect_right(knots, position, key=lambda knot: knot[0])
    if i == 0 or i == len(knots):
        return knots[max(i - 1, 0)][1]
    (at, value), (next_at, next_value) = knots[i - 1], knots[i]
    return value + (position - at) / (next_at - at) * (next_value - value)


def ema_decay(step: int, limit: float) -> float:
    """d_s = min(alpha, (1 + s) / (10 + s)), the warmed-up decay of all averages (official code `ema_update`).

    Args:
        step: s, 0 for the first step.
        limit: alpha, in [0, 1).
    """
    return min(limit, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Window:
    """Steps [start, stop) without communication between learners, and the actions at their end."""

    index: int
    start: int
    stop: int
    epoch: int  # 1-based, of the last step
    redistribute: bool
    evaluate: bool
    checkpoint: bool

    @property
    def hands_over(self) -> bool:
        """Whether theta_g is computed at the end of this window."""
        return self.redistribute or self.evaluate or self.checkpoint


@dataclass(frozen=True)
class RedistributionRule:
    """When the base learners load theta_g (architecture section 2; methods A3).

    Attributes:
        warmup_epochs: t'; nothing is redistributed before this many epochs are over. For the two epoch units the
            1-based epoch number has to reach it, as in the official code.
        every: c.
        unit: "step", "epoch_end", "every_step_of_epoch" or "never".
    """

    warmup_epochs: float
    every: int
    unit: str

    def due(self, finished: int, steps_per_epoch: int) -> bool:
        """Whether theta_g is loaded into the base learners after `finished` steps."""
        if self.unit == "never":
            return False
        if self.unit == "step":
            return finished % self.every == 0 and finished >= Fraction(self.warmup_epochs) * steps_per_epoch
        epoch = (finished - 1) // steps_per_epoch + 1
        if epoch < self.warmup_epochs or epoch % self.every:
            return False
        return self.unit == "every_step_of_epoch" or finished % steps_per_epoch == 0


def plan_windows(
    *,
    epochs,
    steps_per_epoch,
    rule,
    evaluate_every=1,
    checkpoint_every=1,
    checkpoint_steps=None,
    boundaries=frozenset(),
) -> list[Window]:
    """Divides a run into windows, with a boundary at every redistribution, evaluation and checkpoint.

    Args:
        epochs: E, at least 1.
        steps_per_epoch: at least 1.
        rule: the `RedistributionRule`.
        evaluate_every, checkpoint_every: in epochs; the last step of the run is always both.
        checkpoint_steps: additional checkpoints every so many steps, or None.
        boundaries: numbers of finished steps at which a window ends in any case.

    Returns:
        Windows in order; they tile [0, epochs * steps_per_epoch).
    """
    windows, start, total = [], 0, epochs * steps_per_epoch
    for finished in range(1, total + 1):
        at_epoch_end = finished % steps_per_epoch == 0
        epoch = (finished - 1) // steps_per_epoch + 1
        redistribute = rule.due(finished, steps_per_epoch)
        evaluate = at_epoch_end and (epoch % evaluate_every == 0 or finished == total)
        checkpoint = at_epoch_end and (epoch % checkpoint_every == 0 or finished == total)
        checkpoint = checkpoint or bool(checkpoint_steps and finished % checkpoint_steps == 0)
        if redistribute or evaluate or checkpoint or finished in boundaries:
            windows.append(Window(len(windows), start, finished, epoch, redistribute, evaluate, checkpoint))
            start = finished
    return windows
