"""Measures the time of parts of a step without synchronising with the device."""

import time
from contextlib import contextmanager

import torch

SAMPLED_STEPS = 32


class Stopwatch:
    """Times named parts of the steps of a window.

    On a CPU it reads a clock before and after each part. On a GPU it records events, which are read at the end of the
    window; only the first 32 steps of a window are timed, and the result is scaled to all steps.

    Args:
        device: the device that computes the parts.
    """

    def __init__(self, device: torch.device):
        self.queued = device.type == "cuda"
        self.begin(0)

    def begin(self, num_steps: int):
        """Starts a window of `num_steps` steps."""
        self.num_steps, self.step = num_steps, 0
        self.spans = {}

    def next_step(self):
        self.step += 1

    @contextmanager
    def part(self, name: str):
        """Times the body of a `with` statement; parts do not nest."""
        if self.queued and self.step >= SAMPLED_STEPS:
            yield
            return
        start = self._now()
        try:
            yield
        finally:
            self.spans.setdefault(name, []).append((start, self._now()))

    def _now(self):
        if not self.queued:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, name: str) -> float:
        """Seconds of a part in the whole window; call it after the device has finished the window."""
        spans = self.spans.get(name, ())
        if not self.queued:
            return sum(stop - start for start, stop in spans)
        measured = min(self.num_steps, SAMPLED_STEPS)
        return sum(start.elapsed_time(stop) for start, stop in spans) / 1000 * self.num_steps / max(1, measured)
