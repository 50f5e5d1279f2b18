"""What Ray costs: a run on Ray beside the same run in one process, and the hand-over of weights beside memcpy.

    python benchmarks/bench_runtime.py                                   # all parts, about ten minutes on two cores
    python benchmarks/bench_runtime.py --parts handover --sizes 45 --learners 3 --rounds 10

Runs are on embedded digits with one thread a learner. Their times are the recorder's: from the moment the actors stand
to the final table. Starting a private Ray (a few seconds, once a run) is given beside them.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import ray
import torch
from common import interleave, machine, paired, text_of, write_json

import genray
from genray.config import load_config, to_dict
from genray.learners.base_learner import BaseLearner
from genray.recording import RunRecorder
from genray.run.setup import prepare
from genray.runtime.ray.actor_group import ActorGroup
from genray.runtime.ray.cluster import connected
from genray.runtime.ray.placement import make_placement
from genray.storage import Storage

NATURAL, ROBUST = "base_learners.natural=null", "base_learners.linf=null"
ALONE = ["global_learner.gamma=null", "global_learner.sync_unit=never", "global_learner.warmup_epochs=null"]
REST_S = 0.2
NETWORKS = {1: ("small_cnn", 16), 45: ("resnet18", 64), 150: ("wrn_28_10", 10)}  # MB -> network of about that size


# --- hand-over ---------------------------------------------------------------------------------------------------


def handover(args):
    """Seconds of: all learners hand over, the global learner sums, all load the sum; with real actors, no training."""
    record = {}
    for size in args.sizes:
        for number in args.learners:
            record[f"{size} MB, {number} learners"] = _handover(size, number, args.rounds)
    return record


def _handover(size, number, rounds):
    setup = _many_learners(size, number)
    copy = _memcpy(setup.weight_bytes)
    with connected(None, num_cpus=number):
        placement = make_placement(setup.plan, setup.weight_bytes, ray.available_resources())
        with ActorGroup(setup, placement, {}) as group:
            variants = {"handover": lambda: _one_handover(group), "rest": lambda: _rest(copy), "memcpy": copy}
            times = interleave(variants, rounds, warm_up=2)
    seconds, copies = times["handover"], times["memcpy"]
    ratio = paired(seconds, copies)
    print(
        f"hand-over of {setup.weight_bytes / 1e6:6.1f} MB, {number} learners: {1e3 * statistics.median(seconds):7.1f} "
        f"ms, {text_of(ratio)} memcpys of {1e3 * statistics.median(copies):.2f} ms"
    )
    return {"bytes": setup.weight_bytes, "seconds": seconds, "memcpy_seconds": copies, "in_memcpys": ratio}


def _many_learners(size, number):
    """The digits run with many natural learners and a network of the wanted size."""
    network, width = NETWORKS[size]
    plain = load_config(None)
    names = [f"natural{i}" for i in range(number)]
    weights = "{" + ", ".join(f"{name}: {'rest' if name == names[0] else 1 / number}" for name in names) + "}"
    learners = ", ".join(f"{name}: {{objective: natural, lr: 0.01}}" for name in names)
    overrides = [f"model={{name: {network}, width: {width}}}", f"base_learners={{{learners}}}"]
    overrides += ["global_learner.gamma=null", f"global_learner.mixing_weights={weights}"]
    return prepare(load_config(to_dict(plain), overrides))


def _one_handover(group):
    contributions = [learner.run_window(0, 0, True)[1] for learner in group.learners.values()]
    theta_g = group.global_learner.combine.remote(*contributions)
    for learner in group.learners.values():
        learner.load_global(theta_g)
    ray.get([ref for learner in group.learners.values() for ref in learner.after])


def _rest(copy):
    """Lets the object store free what was handed over, and the cache forget it: memcpy is timed at its best."""
    time.sleep(REST_S)
    for _ in range(3):
        copy()


def _memcpy(nbytes):
    """Copies so much memory, on one core as `memcpy` does."""
    source, target = (torch.ones(nbytes // 4) for _ in range(2))
    return lambda: target.copy_(source)


# --- whole runs --------------------------------------------------------------------------------------------------


def timed_run(overrides, runtime):
    """(seconds by the recorder, seconds of the whole call)."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        results = genray.train(None, overrides, runtime=runtime, storage=folder)
        return results["wall_s"], time.perf_counter() - began


def epochs_for(seconds, overrides):
    """Epochs that take about so long in one process."""
    few, more = (timed_run([*overrides, f"training.epochs={n}"], "local")[0] for n in (2, 8))
    return max(4, round(seconds / max((more - few) / 6, 1e-3)))


def one_learner(args):
    """The robust learner alone, on Ray and in this process."""
    base = [NATURAL, *ALONE, "evaluation.every_epochs=1000", "checkpoint.every_epochs=1000"]
    return _compare("one learner, ray / local", args, base, {"ray": ([], "ray"), "local": ([], "local")})


def generalist(args):
    """Two learners at the same time, one core each, beside the slower of them alone."""
    base = ["evaluation.every_epochs=1000", "checkpoint.every_epochs=1000"]
    ways = {"both": ([], "ray"), "robust alone": ([NATURAL, *ALONE], "ray")}
    return _compare("Generalist / its slower learner alone", args, base, ways)


def checkpoints(args):
    """A checkpoint and an evaluation every epoch, beside none."""
    rare = ["evaluation.every_epochs=1000", "checkpoint.every_epochs=1000"]
    ways = {"every epoch": ([], "ray"), "none": (rare, "ray")}
    return _compare("checkpoint and evaluation every epoch / none", args, [], ways)


def recovery(args):
    """What it costs to be able to go on: the digits run with its checkpoints, beside the same with one at the end.

    In seconds on Ray; and as the share of the CPU time of a run in one process that goes into making and writing
    checkpoints, which a busy machine leaves as it is.
    """
    ways = {"every epoch": ([], "ray"), "at the end": (["checkpoint.every_epochs=1000"], "ray")}
    return {**_compare("checkpoint every epoch / at the end only", args, [], ways), "cpu": checkpoint_share(args)}


def checkpoint_share(args):
    """CPU seconds of all threads in checkpoints, and of the whole run; ten epochs of digits in one process."""
    rounds = [_cpu_of_checkpoints(["training.epochs=10"]) for _ in range(args.run_rounds)]
    shares = [inside / whole for inside, whole, _ in rounds]
    number, share = rounds[0][2], statistics.median(shares)
    each = 1e3 * statistics.median(inside for inside, _, _ in rounds) / number
    print(f"checkpoints: {100 * share:.2f} % of the CPU time of a digits run, {each:.1f} ms each")
    return {"rounds": [dict(zip(("checkpoints_s", "run_s", "number"), r)) for r in rounds], "share": share}


def _cpu_of_checkpoints(overrides):
    spent = []

    def timed(function, counts=lambda *args: True):
        def call(*args, **kwargs):
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                if counts(*args):
                    spent.append(time.thread_time() - began)

        return call

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        is_state = lambda storage, name, data: name.startswith("checkpoints/")  # noqa: E731
        for owner, name, counts in (
            (BaseLearner, "state_dict", lambda *args: True),
            (RunRecorder, "write_state", lambda *args: True),
            (Storage, "write", is_state),
        ):
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), counts)))
        began = time.process_time()
        genray.train(None, overrides, runtime="local", storage=folder)
        whole = time.process_time() - began
        number = len((Path(folder) / "digits" / "metrics.jsonl").read_text().splitlines())
    return sum(spent), whole, number


def _compare(title, args, base, ways):
    epochs = f"training.epochs={epochs_for(args.seconds, [*base, NATURAL, *ALONE])}"
    first, second = ways
    times = {name: [] for name in ways}
    for _ in range(args.run_rounds):
        for name, (overrides, runtime) in ways.items():
            times[name].append(timed_run([*base, epochs, *overrides], runtime))
    seconds = {name: [inner for inner, _ in pairs] for name, pairs in times.items()}
    whole = {name: [outer for _, outer in pairs] for name, pairs in times.items()}
    ratio, ratio_whole = paired(seconds[first], seconds[second]), paired(whole[first], whole[second])
    print(
        f"{title}: {text_of(ratio)} ({statistics.median(seconds[first]):.1f} and "
        f"{statistics.median(seconds[second]):.1f} s a run; with start and end of Ray {text_of(ratio_whole)})"
    )
    return {"seconds": seconds, "whole_seconds": whole, "ratio": ratio, "ratio_whole": ratio_whole, "epochs": epochs}


PARTS = {
    "handover": handover,
    "one_learner": one_learner,
    "generalist": generalist,
    "checkpoints": checkpoints,
    "recovery": recovery,
    "checkpoint_share": checkpoint_share,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="MB")
    parser.add_argument("--learners", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--rounds", type=int, default=10, help="of hand-overs")
    parser.add_argument("--run-rounds", type=int, default=1, help="of whole runs")
    parser.add_argument("--seconds", type=float, default=60, help="how long a run is to take, about")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of this process, which copies memory and runs what is local
    record = {"machine": {**machine(), "ray": ray.__version__}}
    print(record["machine"])
    for part in args.parts:
        record[part] = PARTS[part](args)
        write_json(args.output, record)


if __name__ == "__main__":
    main()
