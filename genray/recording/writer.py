"""Writing while training goes on: a full disk or an unreachable store delays files, never the run."""

import threading
import time

from genray.errors import StorageError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
PAUSE_AT_THE_END_S = 0.5


class Writer:
    """Does writes one after another in a thread of its own, each again and again until it succeeds.

    A newer write under the same key takes the place of one that waits, so an outage keeps one of each kind in memory.

    Args:
        say: callable that shows the user a line.
    """

    def __init__(self, say):
        self.say = say
        self.changed = threading.Condition()
        self.waiting = {}  # key -> callable, in the order of writing
        self.running = self.hurry = False
        self.error = None  # of the last attempt

    def put(self, key: str, write):
        """Has `write()` called soon; it must write a file whole or not at all."""
        with self.changed:
            self.waiting[key] = write  # one that waits keeps its place: storage slower than the run starves none
            if not self.running:
                self.running = True
                threading.Thread(target=self._work, name="genray writer", daemon=True).start()

    def flush(self, timeout_s: float):
        """Waits until everything is written.

        Raises:
            StorageError: something is not after `timeout_s`; the message says what and why.
        """
        with self.changed:
            self.hurry = True
            self.changed.notify_all()
            done = self.changed.wait_for(lambda: not self.running, timeout_s)
            self.hurry = False
            if not done:
                names = ", ".join(self.waiting)
                reason = self.error or "storage does not answer"
                self.waiting.clear()
                raise StorageError(f"{reason} (tried for {timeout_s:g} s; not written: {names})")

    def _work(self):
        pause = FIRST_PAUSE_S
        while True:
            with self.changed:
                if not self.waiting:  # all done, or given up
                    self.running = False
                    self.changed.notify_all()
                    return
                key, write = next(iter(self.waiting.items()))
            error = _attempt(write)
            with self.changed:
                if error is None:
                    newer = self.waiting.pop(key, write)
                    if newer is not write:
                        self.waiting[key] = newer
                    if self.error is not None:
                        self.say("storage: writes again")
                    self.error, pause = None, FIRST_PAUSE_S
                    continue
                if self.error is None:
                    self.say(f"warning: {error}; the run goes on in memory and tries again")
                self.error = error
                self._rest(PAUSE_AT_THE_END_S if self.hurry else pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _rest(self, seconds):
        """Waits; somebody who begins to wait for the end cuts it short."""
        hurried, until = self.hurry, time.monotonic() + seconds
        self.changed.wait_for(lambda: self.hurry and not hurried, until - time.monotonic())


def _attempt(write):
    try:
        write()
    except Exception as error:  # storage libraries raise many kinds
        return " ".join(str(error).split()) or type(error).__name__
    return None
