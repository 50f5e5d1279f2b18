"""How time falls with workers: the same work with 1, 2, ... of them on one machine, as ratios.

    python benchmarks/bench_scaling.py evaluation runs/digits --workers 1 2 --rounds 3 --examples 60 --block-size 10

`evaluation`: AutoAttack of a finished run's model. Ray runs before the clock starts; starting the workers and sending
them the model is inside the measured time. The worker counts take turns; each figure is the median of paired ratios
against the first count, with the smallest and largest.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import ray
from common import interleave, machine, paired, peak_mib, text_of, write_json

from genray.core.allocator import keep_freed_memory
from genray.data.datasets import load_image_data
from genray.evaluation.engines import DEFAULT_ENGINE, ENGINES
from genray.evaluation.job import Request, Todo
from genray.evaluation.record import join
from genray.evaluation.sources import config_of, data_of
from genray.models.load import load_model
from genray.runtime.evaluation_run import run_on_workers
from genray.types import ThreatModel


def compare(args, variants, warm_up=0):
    """The record of callables that do the same work, keyed by their number of workers."""
    seconds = interleave(variants, args.rounds, warm_up=warm_up)
    first = args.workers[0]
    record = {"seconds": seconds, "of_first": {n: paired(seconds[n], seconds[first]) for n in variants}}
    for workers, ratio in record["of_first"].items():
        middle, ideal = statistics.median(seconds[workers]), first / workers
        print(f"{workers} workers: {middle:8.2f} s  {text_of(ratio)} of {first}'s time ({ideal:.3f} would be perfect)")
    return record


# --- evaluation --------------------------------------------------------------------------------------------------


def evaluation(args):
    """AutoAttack on the first test images of a run."""
    config = config_of(args.run)
    data, attack = load_image_data(**data_of(config)), config.evaluation.attack
    test, model = data.test.first(args.examples, "--examples"), load_model(args.run)
    threat, standing = ThreatModel(attack.norm, attack.epsilon), set()
    request = Request((threat,), ("aa",), {}, block_size=args.block_size, engine=args.engine)

    def attacked_by(workers):
        todo = Todo(request, len(test))
        found = run_on_workers(todo.take(), todo, model, test.images, test.labels, data.num_classes, workers=workers)
        for task, result in found:
            todo.results[task] = result
        standing.add(int(join(todo.results)[threat.norm, "aa"].sum()))

    print(f"AutoAttack ({args.engine}) {threat}, {len(test)} examples")
    record = compare(args, {workers: partial(attacked_by, workers) for workers in args.workers})
    if len(standing) > 1:
        raise SystemExit(f"worker counts disagree on how many examples stand: {sorted(standing)}")
    print(f"{min(standing)} of {len(test)} stand, whatever the number of workers")
    options = {"examples": len(test), "block_size": args.block_size, "engine": args.engine, "threat": str(threat)}
    return {**record, **options, "standing": min(standing)}


# --- command line ------------------------------------------------------------------------------------------------


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    part = parts.add_parser(
        "evaluation", help=evaluation.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    part.set_defaults(measure=evaluation)
    part.add_argument("run", type=Path, help="folder of a finished run")
    part.add_argument("--examples", type=int, default=360, help="test images")
    part.add_argument("--block-size", type=int, default=20, help="examples a task")
    part.add_argument("--engine", default=DEFAULT_ENGINE, choices=list(ENGINES), help="who runs AutoAttack")
    _shared_options(part)
    return parser


def _shared_options(part):
    part.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers, the first to compare")
    part.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    part.add_argument("--output", help="JSON file")


def main():
    args = command_line().parse_args()
    keep_freed_memory()
    ray.init("local", num_cpus=max(args.workers), include_dashboard=False, log_to_driver=False)
    record = {"machine": {**machine(), "ray": ray.__version__}}
    print(record["machine"])
    record[args.part] = args.measure(args)
    write_json(args.output, record | {"driver_peak_mib": peak_mib()})


if __name__ == "__main__":
    main()
