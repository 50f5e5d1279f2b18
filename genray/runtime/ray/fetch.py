"""Answers of actors, with failures turned into errors that name the actor and say whether the run can continue."""

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from genray.errors import GenrayError, LearnerError, LostError, one_line
from genray.runtime.ray.worker_logs import death_of


def fetch(ref, who: str, *, timeout_s: float, names: dict | None = None, field: str = "runtime.stall_timeout_s"):
    """The value of a reference.

    Args:
        ref: the reference.
        who: name of the actor, for messages.
        timeout_s: limit of the wait.
        names: actor id -> name, for failures of another actor.
        field: name of the field that sets `timeout_s`.

    Raises:
        LostError: a process or a node died, or there was no answer in time.
        GenrayError: the actor's own error; LearnerError for one that genray did not raise.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):  # an argument of the call had failed
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
