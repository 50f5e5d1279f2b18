"""Our AutoAttack beside the authors' package, on one model and the same images: time, and every changed verdict.

    python benchmarks/bench_autoattack.py runs/cifar10_cpu --examples 256 --rounds 3
    python benchmarks/bench_autoattack.py runs/digits --norms linf l2 l1 --columns aa --engines genray

Both sides get the same seed, so both draw the same random numbers; the allocator is set for both alike. A verdict may
change through rounding only: "saved" counts examples that the package breaks and ours does not, "broken" the reverse.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import machine, paired, peak_mib, text_of, write_json

import genray
from genray.config.values import parse_fraction
from genray.core.allocator import keep_freed_memory
from genray.data.datasets import load_image_data
from genray.evaluation.engines import ENGINES
from genray.evaluation.inputs import RADII
from genray.evaluation.job import Request, run_here
from genray.evaluation.record import join
from genray.evaluation.sources import config_of, data_of
from genray.evaluation.todo import Todo
from genray.types import ThreatModel

REFERENCE = "pyautoattack"


def verdicts(engine, model, test, classes, threat, column):
    """(seconds, (N,) flags): one column on all images as one block."""
    request = Request((threat,), (column,), {}, block_size=len(test), engine=engine)
    todo, began = Todo(request, len(test)), time.perf_counter()
    for task, result in run_here(todo, model, test.images, test.labels, classes, "cpu"):
        todo.finish(task, result)
    return time.perf_counter() - began, join(todo.results)[threat.norm, column]


def compare(args, model, test, classes, threat, column):
    """The record of one column in one norm; the engines take turns."""
    engines = [REFERENCE, *args.engines]
    seconds, flags = {engine: [] for engine in engines}, {}
    for _ in range(args.rounds):
        for engine in engines:
            took, flags[engine] = verdicts(engine, model, test, classes, threat, column)
            seconds[engine].append(took)
    record = {"seconds": seconds, "standing": {e: int(f.sum()) for e, f in flags.items()}, "speedup": {}, "changed": {}}
    for engine in args.engines:
        record["speedup"][engine] = paired(seconds[REFERENCE], seconds[engine])
        saved = int((flags[engine] & ~flags[REFERENCE]).sum())
        broken = int((~flags[engine] & flags[REFERENCE]).sum())
        record["changed"][engine] = {"saved": saved, "broken": broken}
        print(
            f"{threat.norm:4} {column:8} {engine:11} {statistics.median(seconds[engine]):8.1f} s  "
            f"{text_of(record['speedup'][engine])} x faster, {record['standing'][engine]} of {len(test)} stand, "
            f"{saved} saved, {broken} broken",
            flush=True,
        )
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--norms", nargs="+", default=["linf"])
    parser.add_argument("--columns", nargs="+", default=["aa"], help="aa, apgd_ce, apgd_dlr, apgd_t, fab_t, square")
    parser.add_argument("--engines", nargs="+", default=[n for n in ENGINES if n != REFERENCE], choices=list(ENGINES))
    parser.add_argument("--epsilon", help="of a single norm; default: the run's, or papers'")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = config_of(args.run)
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
