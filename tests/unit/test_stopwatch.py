"""Where a learner's time goes: its parts are those of the clock, and lie inside the window."""

import json
import time

import torch

import genray
from genray.learners.stopwatch import SAMPLED_STEPS, Stopwatch

PARTS = ("attack_seconds", "averaging_seconds")


def test_parts_are_what_the_clock_says(monkeypatch):
    watch, clock = Stopwatch(torch.device("cpu")), [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    watch.begin(2)
    for _ in range(2):
        for name, lasts in (("attack", 3.0), ("averaging", 0.25)):
            with watch.part(name):
                clock[0] += lasts
        clock[0] += 50
        watch.next_step()
    assert (watch.seconds("attack"), watch.seconds("averaging"), watch.seconds("nothing")) == (6.0, 0.5, 0)
    watch.begin(1)
    assert watch.seconds("attack") == 0, "a window begins at nothing"


class Event:
    """As CUDA's: a place in a queue whose clock runs on its own."""

    queue_ms = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.queue_ms

    def elapsed_time(self, other):
        return other.at - self.at


def test_on_a_gpu_the_first_steps_stand_for_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for steps in (100, 5):
        watch.begin(steps)
        for step in range(steps):
            with watch.part("attack"):
                Event.queue_ms += 10 if step < SAMPLED_STEPS else 1e9
            watch.next_step()
        assert abs(watch.seconds("attack") - 0.01 * steps) < 1e-9


def test_a_run_says_where_each_learners_time_went(tmp_path, small_run, monkeypatch):
    """The natural learner attacks nothing; the robust one waits while the natural one has its turn."""
    genray.train(None, small_run, runtime="local", storage=str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "digits/metrics.jsonl").read_text().splitlines()]
    sums = {
        name: {key: sum(r["learners"][name][key] for r in records) for key in records[0]["learners"][name]}
        for name in ("natural", "linf")
    }
    for parts in sums.values():
        assert 0 < sum(parts[key] for key in PARTS) < parts["seconds"]
        assert parts["transfer_seconds"] > 0, "handed over at every redistribution"
    assert sums["natural"]["attack_seconds"] == 0 < sums["linf"]["attack_seconds"]
    busy = {name: parts["seconds"] + parts["transfer_seconds"] for name, parts in sums.items()}
    assert sums["natural"]["waiting_seconds"] > 0.5 * busy["linf"], "each waits while the other has its turn"
    for name, parts in sums.items():
        assert busy[name] + parts["waiting_seconds"] < records[-1]["wall_s"] + 0.01
