"""Kills random processes of small digits runs at random moments and compares what they leave with an undisturbed run.

    python benchmarks/chaos.py                                   # 12 runs, 36 kills: about a quarter of an hour
    python benchmarks/chaos.py --runs 2 --kills 4 --seed 7

Every second run has a private Ray, the others share a cluster of two nodes on this machine. Killed (SIGKILL) are base
learners, the global learner, the evaluator, the driver (which is then started again with --resume) and the raylet of
the second node (then a new node joins). Each run has to end with exit code 0, with the bits of the undisturbed run in
`model.pt` and `model_last.pt`, the same accuracies and metrics, every epoch once, and without leaving a process, a
placement group, a lock or shared memory behind. Exit code 1 if any did not.

Recovery time: from the kill until the run, with its new processes, has finished one epoch more than before, or has
ended; for the driver that contains starting Python and Ray again. A run that ends without needing what was killed has
nothing to recover (null).
"""

import argparse
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
import torch
from common import machine, write_json
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

ROOT = Path(__file__).parents[1]
RUN = [
    "training.batch_size=48", "data.train_examples=400", "data.test_examples=60", "data.validation_examples=70",
    "base_learners.linf.attack.num_steps=2", "global_learner.gamma=[[0, 1], [1/3, 0.8], [1, 0.3]]",
    "global_learner.warmup_epochs=1", "global_learner.sync_unit=step", "global_learner.sync_every=3",
    "evaluation.attack.num_steps=3", "runtime.placement=spread", "runtime.max_failures=8",
]  # fmt: skip
TITLES = {"base learner": "ray::BaseLearner", "global learner": "ray::GlobalLearner", "evaluator": "ray::Evaluator"}
# A killed raylet refuses connections, so it is noticed after a few checks; a slow one on a busy machine is left alone.
FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 20_000,
        "health_check_failure_threshold": 5}  # fmt: skip
HEAD, WORKER = {"num_cpus": 3, "object_store_memory": 200 << 20}, {"num_cpus": 2, "object_store_memory": 200 << 20}
LIMIT_S = 900  # of one run, on a busy machine
GONE_S = 120  # Ray's helper processes may stay a minute after a killed driver


class Run:
    """One training run as a user starts it, and started again after its driver was killed."""

    def __init__(self, folder, epochs, address):
        self.folder, self.epochs, self.address = Path(folder), epochs, address
        self.seen, self.process, self.starts = set(), None, 0
        self.log = self.folder / "log.txt"
        self.folder.mkdir(parents=True)

    def start(self):
        line = [sys.executable, "-m", "genray.train", "--storage", str(self.folder), *RUN]
        line += [f"training.epochs={self.epochs}", *(["--resume"] if self.starts else [])]
        line += ["--address", self.address] if self.address else []
        self.process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=open(self.log, "a"))
        self.starts += 1

    def finished_epochs(self) -> int:
        path = self.folder / "digits" / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def losses(self) -> int:
        """How many the driver has noticed."""
        return self.log.read_text().count("going on from step")

    def processes(self, title, ours) -> list[int]:
        """Of this run, by the beginning of their command line."""
        found = descendants(self.process.pid if self.address is None else ours)
        self.seen |= found
        return sorted(pid for pid in found if command_of(pid).startswith(title))


def descendants(pid) -> set[int]:
    """A process and all that it and its children started."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in task.read_text().split()]
        except OSError:
            pass
    return {pid, *(d for child in children for d in descendants(child))}


def command_of(pid) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


# --- one run and its kills ---------------------------------------------------------------------------------------


def disturb(run, plan, cluster, rng) -> list[dict]:
    """Starts a run, kills as planned and waits for its end; returns what was killed, and how long recovery took.

    Args:
        plan: (epoch, what) pairs: `what` is killed a random moment after that many epochs are finished.
    """
    kills, pending, deadline = [], [], time.monotonic() + LIMIT_S
    queue = sorted(plan)
    due = None
    run.start()
    while run.process.poll() is None or pending and pending[-1]["what"] == "driver" and run.process.returncode == -9:
        if time.monotonic() > deadline:
            run.process.kill()
            raise TimeoutError(f"a run took more than {LIMIT_S} s; see {run.log}")
        if run.process.poll() is not None:
            run.start()
        epochs = run.finished_epochs()
        for kill in list(pending):
            if kill["noticed"] is None and run.losses() > kill["losses"]:
                kill["noticed"] = epochs
            if kill["noticed"] is not None and epochs > kill["noticed"]:
                kill["recovery_s"] = time.monotonic() - kill["at"]
                pending.remove(kill)
        if queue and due is None and epochs >= queue[0][0]:
            due = time.monotonic() + rng.random() * 1.5
        if due is not None and time.monotonic() >= due:
            (_, what), losses = queue[0], run.losses()
            pid = kill_one(run, what, cluster, rng)
            if pid:
                kill = {"what": what, "epochs": epochs, "at": time.monotonic(), "in_recovery": bool(pending)}
                kill |= {"losses": losses, "noticed": epochs if what == "driver" else None, "recovery_s": None}
                kills.append(kill)
                pending.append(kill)
                queue.pop(0)
                due = None
                if what == "driver":
                    run.process.wait()
        time.sleep(0.05)
    for kill in pending:
        if kill["noticed"] is not None:
            kill["recovery_s"] = time.monotonic() - kill["at"]
    return [{k: kill[k] for k in ("what", "epochs", "in_recovery", "recovery_s")} for kill in kills]


def kill_one(run, what, cluster, rng) -> int:
    """The id of the killed process; 0 where there is none of the kind at the moment."""
    if what == "driver":
        run.processes("", os.getpid())  # remember what it started
        run.process.kill()
        return run.process.pid
    if what == "raylet":
        return cluster.kill_second_node()
    return kill_a_process(run.processes(TITLES[what], os.getpid()), rng)


def kill_a_process(found, rng) -> int:
    """Kills one of some processes; its id, or 0 where there is none any more."""
    victim = rng.choice(sorted(found)) if found else 0
    try:
        if victim:
            os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return victim


class TwoNodes:
    """A cluster of two nodes on this machine; the second can be killed and is replaced."""

    def __init__(self, head=HEAD, worker=WORKER):
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": FAST})
        self.worker = worker
        self.second = self.cluster.add_node(**worker)
        self.dead = []
        ray.init(address=self.cluster.address, namespace="observer", log_to_driver=False, logging_level="ERROR")
        self.cluster.wait_for_nodes()

    def kill_second_node(self, replace=True) -> int:
        raylet = self.second.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()  # as long as it is a zombie, its workers take it for alive
        self.dead.append(self.second)
        if replace:
            self.replace_second_node()
        return raylet.pid

    def replace_second_node(self):
        self.second = self.cluster.add_node(wait=False, **self.worker)

    def leftovers(self, titles=None) -> list[str]:
        """What a finished run left in the cluster; `titles`: how the command lines of its actors begin."""
        titles, deadline = titles or tuple(TITLES.values()), time.monotonic() + 60
        while True:
            groups = [g["placement_group_id"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
            free, total = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
            actors = [p for p in descendants(os.getpid()) if command_of(p).startswith(titles)]
            if not groups and free == total and not actors:
                return []
            if time.monotonic() > deadline:
                return [f"placement groups {groups}", f"{total - free:g} CPUs in use", f"actors {actors}"]
            time.sleep(0.5)

    def close(self):
        ray.shutdown()
        for node in self.dead:
            self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.shutdown()


# --- comparison --------------------------------------------------------------------------------------------------


def outcome(run: Path) -> dict:
    """What a run has to give whatever happened to it.

    Args:
        run: its folder.
    """
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["wall_s"]
        for name, learner in record["learners"].items():
            record["learners"][name] = {key: value for key, value in learner.items() if not key.endswith("seconds")}
    weights = {n: torch.load(run / n, weights_only=True)["state_dict"] for n in ("model.pt", "model_last.pt")}
    return {"weights": weights, "records": records, "models": json.loads((run / "results.json").read_text())["models"]}


def differences(run, expected) -> list[str]:
    """In what a run differs from the undisturbed one; empty where in nothing."""
    if run.process.returncode:
        return [f"exit code {run.process.returncode}: {run.log.read_text().splitlines()[-1:]}"]
    got, found = outcome(run.folder / "digits"), []
    for name, weights in expected["weights"].items():
        ours = got["weights"][name]
        if list(ours) != list(weights) or not all(torch.equal(ours[key], weights[key]) for key in weights):
            found.append(f"{name} has other bits")
    epochs = [record["epoch"] for record in got["records"]]
    if epochs != list(range(1, run.epochs + 1)):
        found.append(f"epochs {epochs}")
    found += [f"other {what}" for what in ("records", "models") if got[what] != expected[what]]
    stray = [str(p) for p in run.folder.rglob("*") if p.name == ".lock" or ".tmp-" in p.name]
    return found + [f"left {path}" for path in stray]


def processes_left(run) -> list[str]:
    """What a run with a private Ray started and that is still there."""
    deadline = time.monotonic() + GONE_S
    while left := [f"process {pid}: {command_of(pid)[:80]}" for pid in run.seen if command_of(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(1)
    return []


# --- all runs ----------------------------------------------------------------------------------------------------


def make_plans(args, rng) -> list[list]:
    """For each run its kills; every kind comes as often as every other."""
    plans = [[] for _ in range(args.runs)]
    kinds = {True: [*TITLES, "base learner", "driver"], False: [*TITLES, "base learner", "driver", "raylet"]}
    bags = {private: [] for private in kinds}
    for number in range(args.kills):
        index = number % args.runs
        private = index % 2 == 0
        if not bags[private]:
            bags[private] = rng.sample(kinds[private], len(kinds[private]))
        plans[index].append((rng.randrange(args.epochs - 2), bags[private].pop()))
    return plans


def one(index, plan, args, cluster, expected, rng, folder) -> dict:
    private = index % 2 == 0
    memory = shared_memory()
    run = Run(folder / f"run{index}", args.epochs, None if private else cluster.cluster.address)
    began = time.monotonic()
    kills = disturb(run, plan, cluster, rng)
    whole = time.monotonic() - began
    wrong = differences(run, expected)
    wrong += processes_left(run) if private else cluster.leftovers()
    if private:
        wrong += [f"/dev/shm/{name}" for name in shared_memory() - memory]
    for kill in kills:
        during = " during a recovery" if kill["in_recovery"] else ""
        seconds = "nothing to recover" if kill["recovery_s"] is None else f"{kill['recovery_s']:5.1f} s"
        print(f"  {kill['what']:15s} after epoch {kill['epochs']:2d}: {seconds}{during}")
    where = "private Ray" if private else "two nodes"
    print(
        f"run {index + 1}, {where}: {len(kills)} kills, {whole:.0f} s: {'; '.join(wrong) or 'the same bits'}",
        flush=True,
    )
    said = [line for line in run.log.read_text().splitlines() if "going on from" in line]
    return {"where": where, "seconds": whole, "kills": kills, "wrong": wrong, "said": said}


def summary(runs) -> dict:
    kills, times = [kill for run in runs for kill in run["kills"]], {}
    for what in ["any", *sorted({kill["what"] for kill in kills})]:
        those = [kill for kill in kills if what in ("any", kill["what"])]
        seconds = [kill["recovery_s"] for kill in those if kill["recovery_s"] is not None]
        times[what] = {"kills": len(those), "recovered": len(seconds)}
        if seconds:
            times[what] |= {"median_s": statistics.median(seconds), "max_s": max(seconds)}
    noticed = Counter(line.partition(":")[0] for run in runs for line in run["said"])
    bad = sum(bool(run["wrong"]) for run in runs)
    return {"runs": len(runs), "wrong_runs": bad, "killed": times, "noticed_by_the_driver": dict(noticed)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--kills", type=int, default=36)
    parser.add_argument("--epochs", type=int, default=25, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    record = {"machine": machine(), "seed": args.seed, "epochs": args.epochs, "runs": []}
    with tempfile.TemporaryDirectory(prefix="genray-chaos-") as place:
        folder = Path(place)
        line = [sys.executable, "-m", "genray.train", "--runtime", "local", "--storage", str(folder / "undisturbed")]
        subprocess.run([*line, *RUN, f"training.epochs={args.epochs}"], cwd=ROOT, check=True, capture_output=True)
        expected, cluster = outcome(folder / "undisturbed" / "digits"), TwoNodes()
        try:
            for index, plan in enumerate(make_plans(args, rng)):
                record["runs"].append(one(index, plan, args, cluster, expected, rng, folder))
                record["summary"] = summary(record["runs"])
                write_json(args.output, record)
        finally:
            cluster.close()
    print(json.dumps(record["summary"], indent=1))
    sys.exit(bool(record["summary"]["wrong_runs"]))


if __name__ == "__main__":
    main()
