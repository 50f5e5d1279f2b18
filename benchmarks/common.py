"""What the benchmarks share: interleaved rounds, paired ratios, the machine, JSON."""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch


def interleave(variants: dict, rounds: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant in each round. All take turns, so that a machine that slows down slows all of them.

    Args:
        variants: name -> callable without arguments.
        rounds: how often each is timed.
        warm_up: untimed calls of each before that.
    """
    for _ in range(warm_up):
        for run in variants.values():
            run()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def paired(first: list[float], second: list[float]) -> dict:
    """How many times longer `first` took: median of the rounds' ratios, with the smallest and largest."""
    ratios = [a / b for a, b in zip(first, second)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def text_of(ratio: dict) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f} .. {ratio['high']:.2f}]"


def machine() -> dict:
    """What ran it."""
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, **gpu,
    }  # fmt: skip


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def peak_mib() -> float:
    """The largest resident size of this process so far (getrusage's would count the parent before exec)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def write_json(path, record: dict):
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
