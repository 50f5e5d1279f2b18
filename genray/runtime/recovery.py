"""Restarts a run from its newest state after a process is lost, as often as the configuration allows."""

import time
from collections import Counter
from collections.abc import Callable

from genray.errors import LearnerError, LostError
from genray.runtime.protocols import Progress, Recorder

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0


def run_with_recovery(attempt: Callable[[dict | None], dict], recorder: Recorder, progress: Progress) -> dict:
    """Calls `attempt(state)` until it returns; every call continues from the newest state.

    Windows are pure functions of the state before them, so a replayed one gives the same bits.

    Args:
        attempt: trains from a state (None: from the beginning) to the end; raises LostError if a process is lost.
        recorder: holds the newest state.
        progress: the display.

    Returns:
        The result of `attempt`.

    Raises:
        LearnerError: more than runtime.max_failures processes were lost in a row, or the same process crashed twice
            with the same signal after the same state.
    """
    losses: list[LostError] = []
    since = recorder.newest_step
    while True:
        try:
            return attempt(recorder.go_back())
        except LostError as error:
            if recorder.newest_step != since:
                losses, since = [], recorder.newest_step
            # A copy: the error itself holds its traceback, whose frames keep objects in the object store alive.
            losses.append(LostError(error.who, error.why, error.signal))
            _pause(losses, recorder, progress)


def _pause(losses, recorder, progress):
    """Waits before the next attempt, longer each time; raises LearnerError when no attempt is left."""
    limit, last = recorder.setup.config.runtime.max_failures, losses[-1]
    if len(losses) > limit:
        raise LearnerError(_summary(losses, recorder)) from None
    if last.signal and [(e.who, e.signal) for e in losses[-2:]] == 2 * [(last.who, last.signal)]:
        raise LearnerError(
            f"{last}; for the second time after step {recorder.newest_step}, from which every attempt computes the "
            "same: not tried again"
        ) from None
    progress.say(f"{last}; going on from step {recorder.newest_step} (loss {len(losses)} of {limit} in a row)")
    if len(losses) > 1:
        time.sleep(min(FIRST_PAUSE_S * 2 ** len(losses), LONGEST_PAUSE_S))


def _summary(losses, recorder):
    how_often = ", ".join(f"{who} {n} times" if n > 1 else who for who, n in Counter(e.who for e in losses).items())
    if recorder.newest:
        left = f"the checkpoint of step {recorder.newest_step}; --resume goes on from it"
    else:
        left = "the start, before any checkpoint"
    return (
        f"lost since {left}: {how_often} (runtime.max_failures: {recorder.setup.config.runtime.max_failures}); "
        f"the last was {losses[-1]}"
    )
