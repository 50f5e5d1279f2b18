"""How evaluation scales with workers: the time of AutoAttack on a fixed model with 1, 2, ... workers, as ratios.

    python benchmarks/bench_evaluation_workers.py runs/digits --workers 1 2 --rounds 3 --examples 360

The rounds interleave the worker counts, so that a machine that slows down slows all of them; each figure is the median
of paired ratios against the first count, with the smallest and largest. Ray runs before the clock starts; starting the
workers and sending them the model is inside the measured time.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import ray
import torch

from genray.data.datasets import load_image_data
from genray.evaluation.job import Request, Todo
from genray.evaluation.record import join
from genray.evaluation.sources import config_of, data_of
from genray.models.load import load_model
from genray.runtime.evaluation_run import run_on_workers
from genray.types import ThreatModel


def loaded(folder: Path, examples: int):
    """Model, images, labels, class count and threat model of a run."""
    config = config_of(folder)
    data = load_image_data(**data_of(config))
    test = data.test.first(min(examples, len(data.test)))
    attack = config.evaluation.attack
    return load_model(folder), test.images, test.labels, data.num_classes, ThreatModel(attack.norm, attack.epsilon)


def timed(workers, request, model, images, labels, num_classes):
    """Seconds of one evaluation, and the number of examples that stand."""
    todo, began = Todo(request, len(labels)), time.perf_counter()
    for task, result in run_on_workers(todo.take(), todo, model, images, labels, num_classes, workers=workers):
        todo.results[task] = result
    seconds = time.perf_counter() - began
    return seconds, int(join(todo.results)[request.threats[0].norm, "aa"].sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=360)
    parser.add_argument("--block-size", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    model, images, labels, num_classes, threat = loaded(args.run, args.examples)
    request = Request((threat,), ("aa",), {}, block_size=args.block_size)
    ray.init("local", num_cpus=max(args.workers), include_dashboard=False, log_to_driver=False)
    times, standing = {workers: [] for workers in args.workers}, set()
    for _ in range(args.rounds):
        for workers in args.workers:
            seconds, count = timed(workers, request, model, images, labels, num_classes)
            times[workers].append(seconds)
            standing.add(count)
    assert len(standing) == 1, f"worker counts disagree: {standing}"
    machine = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }
    base, record = times[args.workers[0]], {"machine": machine, "examples": len(labels), "seconds": times, "ratios": {}}
    print(f"AutoAttack {threat}, {len(labels)} examples, {standing.pop()} stand; {machine}")
    for workers, seconds in times.items():
        ratios = [mine / first for mine, first in zip(seconds, base)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        record["ratios"][workers] = {"median": middle, "low": low, "high": high}
        print(
            f"{workers} workers: {statistics.median(seconds):7.2f} s  {middle:.3f} [{low:.3f} .. {high:.3f}] of first"
        )
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
