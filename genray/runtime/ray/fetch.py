"""Answers of actors, with failures turned into errors that say who failed and whether the run can go on."""

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from genray.errors import GenrayError, LearnerError, LostError, one_line
from genray.runtime.ray.worker_logs import death_of


def fetch(ref, who: str, *, timeout_s: float, names: dict | None = None, field: str = "runtime.stall_timeout_s"):
    """The value of a reference.

    Args:
        ref: the reference.
        who: whom it comes from, for messages.
        timeout_s: how long the answer may take.
        names: actor id -> who that is, for failures that came from another actor.
        field: where `timeout_s` is set.

    Raises:
        LostError: a process or a node died, or there was no answer in time.
        GenrayError: the actor's own error; LearnerError for one that genray did not raise.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):  # what a call depended on had failed
            cause = cause.cause
        if isinstance(cause, GenrayError):
            raise cause from None
        if isinstance(cause, RayError):
            raise _lost(cause, who, names or {}) from None
        raise LearnerError(f"{who}: {type(cause).__name__}: {cause}") from error
    except GetTimeoutError:
        raise LostError(who, f"no answer within {field} ({timeout_s:g} s)") from None
    except RayError as error:
        raise _lost(error, who, names or {}) from None


def _lost(error, who, names) -> LearnerError:
    if isinstance(error, RuntimeEnvSetupError):  # the same wherever it is tried
        return LearnerError(f"{who}: {one_line(error, 600)}")
    if not isinstance(error, RayActorError):
        return LostError(who, f"what it made was lost: {type(error).__name__}: {one_line(error)}")
    who = names.get(error.actor_id, who)
    if error.actor_init_failed:
        last = str(error).strip().splitlines()[-1].strip()
        failed = f"it could not start: {one_line(last)}"
        return LostError(who, failed) if "ray.exceptions." in last else LearnerError(f"{who}: {failed}")
    death = death_of(error)
    return LostError(who, f"its process died: {death.why}", death.signal)
