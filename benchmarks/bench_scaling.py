"""How time falls with workers: the same work with 1, 2, ... of them on one machine, as ratios.

    python benchmarks/bench_scaling.py evaluation runs/digits --workers 1 2 --rounds 3 --examples 60 --block-size 10
    python benchmarks/bench_scaling.py learners --config configs/cifar10_cpu.yaml --set data.path=/data/cifar10
    python benchmarks/bench_scaling.py workers --workers 1 2 --config configs/cifar10_cpu.yaml --set data.path=/data/c10

`evaluation`: AutoAttack of a finished run's model. Ray runs before the clock starts; starting the workers and sending
them the model is inside the measured time. `learners`: windows of training steps of all learners, one after another in
this process, with an actor each, and with an actor each that share their attacks. `workers`: windows of one learner,
with more and more workers. Actors run before the clock starts. Every process computes with one thread. What is compared
takes turns; each figure is the median of paired ratios against the first, with the smallest and largest.
"""

import argparse
import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from common import interleave, machine, paired, peak_mib, text_of, write_json

from genray.config import load_config
from genray.core.allocator import keep_freed_memory
from genray.data.datasets import load_image_data
from genray.evaluation.engines import ENGINES
from genray.evaluation.job import Request
from genray.evaluation.record import join
from genray.evaluation.sources import config_of, data_of
from genray.evaluation.task_queue import TaskQueue
from genray.interop.load import load_model
from genray.learners.base_learner import BaseLearner
from genray.run.allocation import plan_lines
from genray.run.cost import step_passes
from genray.run.setup import prepare
from genray.runtime.ray.actor_group import ActorGroup
from genray.runtime.ray.evaluation import run_on_workers
from genray.runtime.ray.placement import make_placement
from genray.runtime.ray.worker_pool import PoolOptions
from genray.storage import Storage
from genray.types import ThreatModel

THREADS_CPUS = 0.5  # logical CPUs of an actor: one thread, and Ray starts few idle processes


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
    config = config_of(Storage(args.run))
    data, attack = load_image_data(**data_of(config)), config.evaluation.attack
    test, model = data.test.first(args.examples, "--examples"), load_model(args.run)
    threat, standing = ThreatModel(attack.norm, attack.epsilon), set()
    request = Request((threat,), ("aa",), {}, block_size=args.block_size, engine=args.engine)

    def attacked_by(workers):
        todo = TaskQueue(request, len(test))
        found = run_on_workers(
            todo.take(), todo, model, test.images, test.labels, data.num_classes, pool=PoolOptions(workers)
        )
        for task, result in found:
            todo.finish(task, result)
        standing.add(int(join(todo)[threat.norm, "aa"].sum()))

    print(f"AutoAttack ({args.engine}) {threat}, {len(test)} examples")
    record = compare(args, {workers: partial(attacked_by, workers) for workers in args.workers})
    if len(standing) > 1:
        raise SystemExit(f"worker counts disagree on how many examples stand: {sorted(standing)}")
    print(f"{min(standing)} of {len(test)} stand, whatever the number of workers")
    options = {"examples": len(test), "block_size": args.block_size, "engine": args.engine, "threat": str(threat)}
    return {**record, **options, "standing": min(standing)}


# --- training ----------------------------------------------------------------------------------------------------


class Windows:
    """Runs the next window of all learners at each call.

    Args:
        args: with `steps`, the length of a window.
        config: the run's.
    """

    def __init__(self, args, config):
        self.length, self.at, self.setup = args.steps, 0, prepare(config)

    def __call__(self):
        self.run(self.at, self.at + self.length)
        self.at += self.length


class Serial(Windows):
    """One learner after another in this process."""

    def __init__(self, args, config):
        super().__init__(args, config)
        setup = self.setup
        self.learners = {
            name: BaseLearner(name, setup.plan, setup.build_network(), setup.splits["train"], threads=1)
            for name in config.base_learners
        }

    def run(self, start, stop):
        for learner in self.learners.values():
            learner.run_window(start, stop)

    def weights(self):
        return {name: learner.state_dict()["weights"] for name, learner in self.learners.items()}


class Actors(Windows):
    """All learners at once in actors, which live as long as `stack`."""

    def __init__(self, args, config, stack):
        super().__init__(args, config)
        placement = make_placement(self.setup.plan, self.setup.weight_bytes, {})
        self.group = stack.enter_context(ActorGroup(self.setup, placement, {}))

    def run(self, start, stop):
        stats = [ref for lr in self.group.learners.values() for ref in lr.run_window(start, stop, False)[0]]
        ray.get(stats)

    def weights(self):
        return {name: ray.get(learner.state_dict())["weights"] for name, learner in self.group.learners.items()}


def _config(args, *more):
    base = load_config(args.config, args.overrides)
    each = [f"base_learners.{name}.resources.num_cpus={THREADS_CPUS}" for name in base.base_learners]
    return load_config(base, [*each, *more, "device=cpu"])


def learners(args):
    """Training windows of all learners: serial, an actor each, attacks shared by all actors."""
    torch.set_num_threads(1)
    config = _config(args)
    shared = _config(args, "runtime.share_attack=true")
    with ExitStack() as stack:
        variants = {
            "serial": Serial(args, config),
            "an actor each": Actors(args, config, stack),
            "attacks shared": Actors(args, shared, stack),
        }
        seconds = interleave(variants, args.rounds)
        weights = {name: variant.weights() for name, variant in variants.items()}
    estimate = plan_lines(variants["attacks shared"].setup.plan)
    record = _described(config, args) | {"seconds": seconds, "estimate": estimate}
    record["serial_over"] = {name: paired(seconds["serial"], found) for name, found in seconds.items()}
    record["largest_difference_to_serial"] = {
        name: max(float(np.abs(found[key] - weights["serial"][key]).max()) for key in found)
        for name, found in weights.items()
    }
    for name, ratio in record["serial_over"].items():
        step = statistics.median(seconds[name]) / args.steps
        far = record["largest_difference_to_serial"][name]
        text = f"{name:<15} {1000 * step:8.1f} ms a step, {text_of(ratio)} times faster than serial"
        print(f"{text}; weights differ by {far:.1g}")
    return record


def workers(args):
    """Training windows of one learner, by its number of workers."""
    torch.set_num_threads(1)
    config = _config(args)
    name = args.learner or max(config.base_learners, key=lambda n: step_passes(config.base_learners[n]).units)
    alone = [f"base_learners.{other}=null" for other in config.base_learners if other != name]
    alone += ["global_learner.gamma=null", "global_learner.mixing_weights=null"]
    with ExitStack() as stack:
        variants = {
            n: Actors(args, _config(args, *alone, f"base_learners.{name}.workers={n}"), stack) for n in args.workers
        }
        record = compare(args, variants, warm_up=1)
        weights = {n: variant.weights()[name] for n, variant in variants.items()}
    first = weights[args.workers[0]]
    record["largest_difference_to_first"] = {n: float(np.abs(w - first).max()) for n, w in weights.items()}
    print(f"weights differ by {max(record['largest_difference_to_first'].values()):.1g}")
    return {**_described(config, args), "learner": name, **record}


def _described(config, args):
    return {
        "name": config.name, "overrides": args.overrides, "model": config.model.name, "width": config.model.width,
        "batch_size": config.training.batch_size, "precision": config.compute.precision, "steps": args.steps,
    }  # fmt: skip


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
    part.add_argument("--engine", default="pyautoattack", choices=list(ENGINES), help="who runs AutoAttack")
    _shared_options(part)
    for measure in (learners, workers):
        part = parts.add_parser(
            measure.__name__, help=measure.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        part.set_defaults(measure=measure)
        part.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value", help="override")
        part.add_argument("--config", help="a YAML file; without it, the embedded digits run")
        part.add_argument("--steps", type=int, default=4, help="in a window")
        if measure is workers:
            part.add_argument("--learner", help="its name; without it, the one whose step costs most")
        _shared_options(part, measure is workers)
    return parser


def _shared_options(part, counts=True):
    if counts:
        part.add_argument(
            "--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers, the first to compare"
        )
    part.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    part.add_argument("--output", help="JSON file")


def main():
    args = command_line().parse_args()
    keep_freed_memory()
    cpus = max(args.workers) if args.part == "evaluation" else 8
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    record = {"machine": {**machine(), "ray": ray.__version__}}
    print(record["machine"])
    record[args.part] = args.measure(args)
    write_json(args.output, record | {"driver_peak_mib": peak_mib()})


if __name__ == "__main__":
    main()
