"""Standard output and standard error that may go away: what cannot be shown is dropped, and the work goes on."""

import errno
import os
import sys
from contextlib import contextmanager

from tqdm import tqdm


class Lasting:
    """A text stream whose `write` and `flush` never raise.

    Its reader may end (`| head`), its disk be full, its terminal or the stream itself be closed.

    Args:
        stream: the stream; None, as of a process that was started without it, drops all.

    Attributes:
        error: the last one, or None.
    """

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, text: str) -> int:
        try:
            self._attempt("write", text)
        except UnicodeEncodeError:
            self._attempt("write", text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self):
        self._attempt("flush")

    def isatty(self) -> bool:
        return bool(self._attempt("isatty"))

    def _attempt(self, name, *args):
        try:
            return getattr(self.stream, name)(*args) if self.stream is not None else None
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = error
            return None

    def __eq__(self, other):
        """Whether both write to the same place: tqdm moves a bar out of the way of lines to the same stream."""
        return _innermost(self) is _innermost(other)

    def __hash__(self):
        return id(_innermost(self))

    def __getattr__(self, name):
        if self.stream is None and name == "fileno":
            raise OSError("no such stream")
        return getattr(self.stream, name)


def _innermost(stream):
    return _innermost(stream.stream) if isinstance(stream, Lasting) else stream


def say(text: str):
    """Writes a line to standard error, above a progress bar where there is one."""
    tqdm.write(text, file=Lasting(sys.stderr))


@contextmanager
def lasting_output():
    """Inside, `sys.stdout` and `sys.stderr` are `Lasting`.

    They stay so where one of them failed, because Python writes what it still holds when the process ends.
    """
    for _ in range(3):  # of a closed one, the next file that is opened would get the number, and what is said to it
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = [Lasting(stream) for stream in before]
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        out, err = streams
        if out.error and getattr(out.error, "errno", None) != errno.EPIPE:  # a reader that went away wants no more
            say(f"warning: standard output: {out.error}")
        if not out.error and not err.error:
            sys.stdout, sys.stderr = before
