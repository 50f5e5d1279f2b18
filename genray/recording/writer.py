"""Writes files in another thread: a file that cannot be written delays neither the caller nor other files."""

import heapq
import itertools
import threading
import time

from genray.errors import StorageError, one_line

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
PAUSE_AT_THE_END_S = 0.5
LISTED = 10  # files that an error names


class Writer:
    """Writes files in a thread; retries each until it succeeds, with its own pauses.

    A newer write of the same key replaces a waiting one, so an outage keeps one of each key in memory.

    Args:
        say: callable that prints a line.
    """

    def __init__(self, say):
        self.say = say
        self.changed = threading.Condition()
        self.waiting = {}  # key -> newest callable
        self.errors = {}  # key -> error of its last attempt
        self.queue = []  # heap of (time of the next attempt, number, key, pause if it fails)
        self.numbers = itertools.count()
        self.running = self.hurry = False

    def put(self, key: str, write):
        """Has `write()` called soon; it must write a file whole or not at all."""
        with self.changed:
            if key not in self.waiting:  # a waiting key keeps its place, so that slow storage delays none forever
                self._queue(key, 0.0, FIRST_PAUSE_S)
            self.waiting[key] = write
            self.changed.notify_all()
            if not self.running:
                self.running = True
                threading.Thread(target=self._work, name="genray writer", daemon=True).start()

    def flush(self, timeout_s: float):
        """Waits until everything is written.

        Raises:
            StorageError: something is not after `timeout_s`; the message lists the files and why.
        """
        with self.changed:
            self.hurry = True
            self.queue = [(0.0, next(self.numbers), key, PAUSE_AT_THE_END_S) for _, _, key, _ in sorted(self.queue)]
            self.changed.notify_all()
            done = self.changed.wait_for(lambda: not self.running, timeout_s)
            self.hurry = False
            if not done:
                left = _with_reasons({key: self.errors.get(key, "storage does not answer") for key in self.waiting})
                for of_files in (self.waiting, self.queue, self.errors):
                    of_files.clear()
                raise StorageError(f"tried for {timeout_s:g} s; not written: {left}")

    def _queue(self, key, seconds, pause):
        heapq.heappush(self.queue, (time.monotonic() + seconds, next(self.numbers), key, pause))

    def _work(self):
        while True:
            with self.changed:
                if not self.waiting:  # all done or abandoned
                    self.running = False
                    self.changed.notify_all()
                    return
                rest = self.queue[0][0] - time.monotonic()
                if rest > 0:
                    self.changed.wait(rest)
                    continue
                *_, key, pause = heapq.heappop(self.queue)
                write = self.waiting[key]
            error = _attempt(write)
            with self.changed:
                if key in self.waiting:
                    self._book(key, write, error, PAUSE_AT_THE_END_S if self.hurry else pause)

    def _book(self, key, write, error, pause):
        """Records the result of an attempt: done, or queued again."""
        if error is not None:
            if _reason(error) not in map(_reason, self.errors.values()):
                self.say(f"warning: {error}; kept in memory and tried again")
            self.errors[key] = error
            self._queue(key, pause, min(2 * pause, LONGEST_PAUSE_S))
            return
        if self.errors.pop(key, None) and not self.errors:
            self.say("storage: writes again")
        if self.waiting[key] is write:
            del self.waiting[key]
        else:  # a newer write was added meanwhile
            self._queue(key, 0.0, FIRST_PAUSE_S)


def write_all(storage, files: dict[str, bytes]):
    """Writes files once, each even if others fail.

    Args:
        storage: a `Storage`.
        files: name -> content.

    Raises:
        StorageError: some could not be written; the message lists them and why.
    """
    errors = {}
    for name, content in files.items():
        error = _attempt(lambda name=name, content=content: storage.write(name, content))
        if error is not None:
            errors[name] = error
    if errors:
        raise StorageError(f"not written: {_with_reasons(errors)}")


def _attempt(write):
    try:
        write()
    except Exception as error:  # storage libraries raise many kinds
        return one_line(error, 1000)  # its name and cause have been shortened by themselves, each with a path in it
    return None


def _with_reasons(errors):
    """Names of unwritten files, grouped by reason, with the first error of each group."""
    groups = {}
    for name, error in errors.items():
        groups.setdefault(_reason(error), (error, []))[1].append(name)
    return "; ".join(f"{_listed(names)} ({error})" for error, names in groups.values())


def _listed(keys):
    more = [f"{len(keys) - LISTED} more"] * (len(keys) > LISTED)
    return ", ".join([*keys[:LISTED], *more])


def _reason(error):
    """An error without the name of the file."""
    return error.rpartition(": ")[2]
