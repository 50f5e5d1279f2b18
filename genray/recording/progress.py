"""What a user sees while a run works: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import threading
import time
import warnings
from contextlib import contextmanager

from tqdm import TqdmWarning

from genray.console import Lasting

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets has lines instead of a bar
    from tqdm.auto import tqdm

BAR = "{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total} {unit} [{elapsed}<{remaining}]"
SECONDS_BETWEEN_EPOCHS = 5.0  # epochs that follow faster than this are not all printed,
SECONDS_OF_SILENCE = 30.0  # and off a terminal something is printed at least this often
_IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class _Bar(tqdm):
    """A bar whose time left is told to it."""

    seconds_left = None

    @property
    def format_dict(self):
        ahead = max(self.total - self.n, 1e-9)
        rate = ahead / self.seconds_left if self.seconds_left else None
        return super().format_dict | ({"rate": rate} if rate else {})


@contextmanager
def repeated(call, seconds: float):
    """Inside, calls it again and again from a thread of its own."""
    over = threading.Event()

    def run():
        while not over.wait(seconds):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Progress:
    """Shows how far a phase of the work is, the newest accuracies and the time left.

    Args:
        stream: where to print, standard error by default; a terminal gets a bar, and what fails is not shown.
    """

    bar: _Bar | None
    left: float | None
    done: float

    def __init__(self, stream=None):
        self.stream = Lasting(stream or sys.stderr)
        self.bar = None
        self.phase("training", 0)

    def phase(self, name: str, total: int, done: int = 0, unit: str = "steps", later: float = 0.0):
        """Begins a phase of `total` units, `done` of which were finished before (a resumed run); after it comes work
        that takes as long as `later` units."""
        self.close()
        self.later, self.left = later, None
        self.name, self.total, self.initial, self.done, self.unit = name, total, done, done, unit
        self.began = self.last_line = time.perf_counter()
        if total and (_IN_NOTEBOOK or _columns(self.stream)):
            options = {"file": self.stream, "bar_format": BAR, "desc": name, "unit": unit}
            self.bar = _Bar(total=total, initial=done, **options)

    def steps(self, done: float, left: float | None = None):
        """A look at the work.

        Args:
            done: units finished by now; a fraction counts a learner that is further than another.
            left: seconds from now on; None: as the units were so far.
        """
        self.done, self.left = max(self.done, done), left
        if self.bar is not None:
            self.bar.seconds_left = self._seconds_left()
            self.bar.update(self.done - self.bar.n)
            if left is not None:  # told now and then, and the time left moves where the units do not
                self.bar.refresh()
        elif time.perf_counter() - self.last_line >= SECONDS_OF_SILENCE:
            self._line(f"{self.name} {self.done:.0f}/{self.total} {self.unit}")

    def epoch(self, text: str):
        """A finished epoch's newest figures."""
        if time.perf_counter() - self.last_line >= SECONDS_BETWEEN_EPOCHS or self.done >= self.total:
            self._line(text)

    def _line(self, text):
        self.last_line = time.perf_counter()
        self.say(text if self.bar is not None else f"{text}{self._remaining()}")

    def _remaining(self):
        seconds = self._seconds_left()
        return "" if seconds is None else f"  about {tqdm.format_interval(seconds)} left"

    def _seconds_left(self):
        """None where nothing is known, or nothing left."""
        finished, ahead = self.done - self.initial, self.total - self.done + self.later
        if self.left is not None:
            return self.left or None
        return (time.perf_counter() - self.began) / finished * ahead if finished > 0 and ahead > 0 else None

    def say(self, text: str):
        """A line of its own."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self):
        """Ends the phase; its bar stays on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _columns(stream) -> int:
    """Of a terminal; 0 where it is none or does not say, and a bar has no place."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return 0
