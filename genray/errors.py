"""Every error genray raises on purpose.

An *input* error (exit code 2) is one that the user corrects: the message is one line a problem and names the field or
file, what was expected and what came. Every other error (exit code 1) means that the run itself failed.
All of them survive pickling, because Ray sends them from actors to the driver.
"""

from collections.abc import Iterable
from typing import Any


def one_line(error: Any, length: int = 300) -> str:
    """An error's message, or a text, without line breaks.

    A text longer than `length` characters loses its middle: the cause is at the end.
    """
    text = " ".join(str(error).split()) or (type(error).__name__ if isinstance(error, Exception) else "")
    if len(text) <= length:
        return text
    start = length // 4
    return f"{text[:start].rstrip()} ... {text[start + 5 - length :].lstrip()}"


class GenrayError(Exception):
    """Base of all genray errors: the run failed."""

    exit_code = 1


class InputError(GenrayError):
    """The input was wrong: nothing was started and nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """One or more configuration values are wrong; `problems` holds one line for each."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> Any:
        return type(self), (self.problems,)


class DataError(InputError):
    """A data set is absent, unreadable or does not fit the configuration."""


class CheckpointError(InputError):
    """A checkpoint or model file is absent, corrupt or of another architecture."""


class RunFolderError(InputError):
    """The run folder exists already, belongs to another configuration or cannot be written."""


class StorageError(RunFolderError):
    """A file could not be written or read during a run; the input was right."""

    exit_code = 1


class PlacementError(InputError):
    """The machine or cluster lacks resources for the run; the message names them."""


class LearnerError(GenrayError):
    """A learner died or hung; the message names it and the time-out field where one ran out."""


class LostError(LearnerError):
    """A process of the run died, hangs or is out of reach; the run can go on from its last state.

    Attributes:
        who: name of the process, as in the configuration.
        why: the reason, as far as known.
        signal: of a process that crashed by itself, such as "SIGSEGV"; empty where it was killed, hangs or is away.
    """

    def __init__(self, who: str, why: str, signal: str = "") -> None:
        self.who, self.why, self.signal = who, why, signal
        super().__init__(f"{who}: {why}")

    def __reduce__(self) -> Any:
        return type(self), (self.who, self.why, self.signal)


class NonFiniteError(GenrayError):
    """A learner's loss or weights became NaN or infinite."""
