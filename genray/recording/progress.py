"""What a user sees while a run works: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time

from tqdm import tqdm

from genray.console import Lasting

BAR = "{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total} {unit} [{elapsed}<{remaining}]"
SECONDS_BETWEEN_EPOCHS = 5.0  # epochs that follow faster than this are not all printed,
SECONDS_OF_SILENCE = 30.0  # and off a terminal something is printed at least this often


class Progress:
    """Shows how far a phase of the work is, the newest accuracies and the time left.

    Args:
        stream: where to print, standard error by default; a terminal gets a bar, and what fails is not shown.
    """

    def __init__(self, stream=None):
        self.stream = Lasting(stream or sys.stderr)
        self.bar = None
        self.phase("training", 0)

    def phase(self, name: str, total: int, done: int = 0, unit: str = "steps"):
        """Begins a phase of `total` units, `done` of which were finished before (a resumed run)."""
        self.close()
        self.name, self.total, self.initial, self.done, self.unit = name, total, done, done, unit
        self.began = self.last_line = time.perf_counter()
        if total and _columns(self.stream):
            options = {"file": self.stream, "bar_format": BAR, "desc": name, "unit": unit}
            self.bar = tqdm(total=total, initial=done, **options)

    def steps(self, done: float):
        """`done`: units finished by now; a fraction counts a learner that is further than another."""
        self.done = max(self.done, done)
        if self.bar is not None:
            self.bar.update(self.done - self.bar.n)
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
        finished = self.done - self.initial
        if finished <= 0 or self.done >= self.total:
            return ""
        seconds = (time.perf_counter() - self.began) / finished * (self.total - self.done)
        return f"  about {tqdm.format_interval(seconds)} left"

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
