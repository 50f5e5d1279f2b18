"""Our AutoAttack beside the authors' package, on one model and the same images: time, and every changed verdict.

    python benchmarks/bench_autoattack.py runs/cifar10_cpu --examples 256 --rounds 3
    python benchmarks/bench_autoattack.py runs/digits --norms linf l2 l1 --columns aa --ways pyautoattack genray
    python benchmarks/bench_autoattack.py runs/digits --examples 360 --rounds 3 \
        --ways pyautoattack:100:2 pyautoattack:100 genray:100 genray:256

A way is ENGINE[:BLOCK[:THREADS]]: by default all images are one block and threads follow the work; the first way is
what the others are compared with. All get the same seed, so with equal blocks they draw the same random numbers; the
allocator is set for all alike. A verdict may change through rounding only: "saved" counts examples that the first way
breaks and another does not, "broken" the reverse. On a machine that others use, compare CPU seconds. "estimate" is the
time left as it was told, from a minute on, over the true one: the lowest and the highest ratio.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import machine, paired, peak_mib, text_of, write_json

import genray
from genray.config.values import parse_fraction
from genray.core.allocator import keep_freed_memory
from genray.core.threads import threads_kept
from genray.data.datasets import load_image_data
from genray.evaluation.estimate import TimeLeft
from genray.evaluation.inputs import RADII
from genray.evaluation.job import Request, run_here
from genray.evaluation.record import join
from genray.evaluation.sources import config_of, data_of
from genray.evaluation.task_queue import TaskQueue
from genray.recording.progress import repeated
from genray.storage import Storage
from genray.types import ThreatModel


@dataclass
class Run:
    """One column on all images: time taken, (N,) flags, and told over true seconds left at moments after a minute."""

    seconds: float
    cpu_seconds: float
    flags: np.ndarray
    told: list


def run(way, model, test, classes, threat, column):
    engine, _, rest = way.partition(":")
    block, _, threads = rest.partition(":")
    request = Request((threat,), (column,), {}, block_size=int(block or len(test)), engine=engine)
    fixed = mock.patch("genray.evaluation.job.work_threads", lambda *_: int(threads)) if threads else nullcontext()
    with fixed, threads_kept() as most:
        torch.set_num_threads(int(threads or most))
        todo, left, told = TaskQueue(request, len(test)), TimeLeft(request, len(test), classes), []
        began, cpu = time.perf_counter(), time.process_time()
        with repeated(lambda: told.append((time.perf_counter() - began, left.left())), 1.0):
            for task, result in run_here(todo, model, test.images, test.labels, classes, "cpu"):
                todo.finish(task, result)
                left.finished(task, result)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    told = [after / (seconds - at) for at, after in told if 60 <= at < 0.95 * seconds]
    return Run(seconds, cpu, join(todo)[threat.norm, column], told)


def compare(args, model, test, classes, threat, column):
    """The record of one column in one norm; the ways take turns."""
    runs = {way: [] for way in args.ways}
    for _ in range(args.rounds):
        for way in args.ways:
            runs[way].append(run(way, model, test, classes, threat, column))
    record, first = {}, runs[args.ways[0]]
    for way, of in runs.items():
        flags, told = of[0].flags, [ratio for each in of for ratio in each.told]
        record[way] = {
            "seconds": [each.seconds for each in of],
            "cpu_seconds": [each.cpu_seconds for each in of],
            "standing": int(flags.sum()),
            "speedup": paired([each.seconds for each in first], [each.seconds for each in of]),
            "cpu_speedup": paired([each.cpu_seconds for each in first], [each.cpu_seconds for each in of]),
            "saved": int((flags & ~first[0].flags).sum()),
            "broken": int((~flags & first[0].flags).sum()),
            "estimate": [min(told), max(told)] if told else None,
        }
        found = record[way]
        print(
            f"{threat.norm:4} {column:8} {way:18} {statistics.median(found['cpu_seconds']):8.1f} CPU s "
            f"({text_of(found['cpu_speedup'])} x fewer), {statistics.median(found['seconds']):8.1f} s "
            f"({text_of(found['speedup'])} x faster), {found['standing']} of {len(test)} stand, "
            f"{found['saved']} saved, {found['broken']} broken, estimate {found['estimate']}",
            flush=True,
        )
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--norms", nargs="+", default=["linf"])
    parser.add_argument("--columns", nargs="+", default=["aa"], help="aa, apgd_ce, apgd_dlr, apgd_t, fab_t, square")
    parser.add_argument("--ways", nargs="+", default=["pyautoattack", "genray", "genray-bf16"])
    parser.add_argument("--epsilon", help="of a single norm; default: the run's, or papers'")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = config_of(Storage(args.run))
    data, attack = load_image_data(**data_of(config)), config.evaluation.attack
    test, model = data.test.first(args.examples, "--examples"), genray.load_model(args.run)
    radii = RADII | {attack.norm: attack.epsilon} | ({args.norms[0]: args.epsilon} if args.epsilon else {})
    record = {"machine": machine(), "model": config.model.name, "width": config.model.width, "examples": len(test)}
    print(record["machine"])
    for norm in args.norms:
        threat = ThreatModel(norm, parse_fraction(radii[norm]))
        record[str(threat)] = {c: compare(args, model, test, data.num_classes, threat, c) for c in args.columns}
        write_json(args.output, record | {"peak_mib": peak_mib()})


if __name__ == "__main__":
    main()
