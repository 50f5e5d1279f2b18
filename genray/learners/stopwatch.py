"""Where a learner's time goes, measured without making it wait."""

import time
from contextlib import contextmanager

import torch

SAMPLED_STEPS = 32


class Stopwatch:
    """Times named parts of the steps of a window.

    On a CPU a clock is read around each part. On a GPU, where work is only queued, events go into its queue and are
    read once the window is over, so no step waits; they are put into the first 32 steps of a window, which stand for
    the others.

    Args:
        device: where the parts compute.
    """

    def __init__(self, device: torch.device):
        self.queued = device.type == "cuda"
        self.begin(0)

    def begin(self, num_steps: int):
        """A window of so many steps begins."""
        self.num_steps, self.step = num_steps, 0
        self.spans = {}

    def next_step(self):
        self.step += 1

    @contextmanager
    def part(self, name: str):
        """Times what is done inside; parts do not nest."""
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
        """Of a part in the whole window. To be called when the device has done all of it."""
        spans = self.spans.get(name, ())
        if not self.queued:
            return sum(stop - start for start, stop in spans)
        measured = min(self.num_steps, SAMPLED_STEPS)
        return sum(start.elapsed_time(stop) for start, stop in spans) / 1000 * self.num_steps / max(1, measured)
