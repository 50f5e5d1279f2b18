"""Kills random processes of small evaluations and of grids that are judged, and compares with undisturbed ones.

    python benchmarks/evaluation_chaos.py                        # 5 evaluations, 5 grids, 20 kills
    python benchmarks/evaluation_chaos.py --each 1 --kills 4 --seed 7

All share a cluster of two nodes on this machine. Killed (SIGKILL) at random moments are a worker (of an evaluation,
or the process of a trial, which trains and judges it), the raylet of the second node (then a new node joins) and the
driver (which is then started again with --resume). Each command has to end with exit code 0, with the bytes of the
undisturbed records, models of the same bits, and without leaving an actor, a placement group, a lock or a temporary
file. Exit code 1 if any did not.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from chaos import ROOT, TwoNodes, command_of, descendants, kill_a_process, outcome, shared_memory
from common import machine, write_json
from tune_chaos import differences

WORKERS = {"evaluation": "ray::EvaluationWorker", "grid": "ray::ImplicitFunc"}
RUN = ["training.epochs=4", "data.test_examples=120", "base_learners.linf.attack.num_steps=3", "model.width=8"]
ASKED = ["--attacks", "pgd100,mim,aa", "--engine", "genray", "--norms", "linf", "--epsilon", "0.15", "--examples", "60",
         "--block-size", "5"]  # fmt: skip
PATIENT = ["--startup-timeout", "900"]
GRID = {
    "name": "judged", "runtime": "local", "seeds": [0, 1, 2], "max_failures": 9,
    "set": {"training.epochs": 6, "training.batch_size": 48, "data.train_examples": 300, "data.test_examples": 60,
            "data.validation_examples": 40, "model.width": 4, "base_learners.linf.attack.num_steps": 2,
            "evaluation.attack.num_steps": 2, "global_learner.warmup_epochs": 1, "runtime.startup_timeout_s": 900},
    "evaluate": {"attacks": ["pgd20", "mim", "apgd_ce"], "engine": "genray", "block_size": 5},
}  # fmt: skip
EPOCHS = GRID["set"]["training.epochs"]
LIMIT_S = 3600  # of one command, on a busy machine


class Command:
    """An evaluation or a grid as a user starts it, and started again after its driver was killed.

    Args:
        kind: "evaluation" or "grid".
        line: module and arguments of the first start.
        result: the folder that it writes.
        place: an empty folder, for its log and its temporary files.
    """

    def __init__(self, kind, line, result, place):
        self.kind, self.line, self.result = kind, [sys.executable, "-m", *map(str, line)], result
        self.log, self.temporary, self.process, self.starts = place / "log.txt", place / "tmp", None, 0
        self.temporary.mkdir(parents=True)

    def start(self):
        line = [*self.line, *(["--resume"] if self.starts else [])]
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.starts += 1

    def done(self) -> int:
        """Finished blocks and epochs."""
        epochs = sum(len(path.read_text().splitlines()) for path in self.result.glob("*/metrics.jsonl"))
        return epochs + len(list(self.result.glob("**/blocks/*.json")))

    def wrong(self, expected) -> list[str]:
        """In what it differs from an undisturbed one; empty where in nothing."""
        if self.process.returncode:
            return [f"exit code {self.process.returncode}: {self.log.read_text().splitlines()[-3:]}"]
        got, found = records(self.kind, self.result), []
        for name in expected["files"] | got["files"]:
            if expected["files"].get(name) != got["files"].get(name):
                found.append(f"{name} has other bytes")
        for trial, run in expected["runs"].items():
            found += differences(trial, got["runs"][trial], run, EPOCHS)
        left = [path for path in (*self.result.rglob("*"), *self.temporary.iterdir()) if is_left(path, self.temporary)]
        return found + [f"left {path}" for path in left]


def is_left(path, temporary) -> bool:
    return path.parent == temporary or path.name == ".lock" or ".tmp-" in path.name


def records(kind, folder) -> dict:
    """What an evaluation or a grid has to give whatever happened to it: bytes of records, and what chaos.py compares
    of each trial's run."""
    files = [path for name in ("results.json", "results.parquet") for path in folder.glob(f"**/{name}")]
    if kind == "grid":  # a run's own results have its wall time
        files = [path for path in files if path.parent.parent.name != folder.name]
    runs = sorted(path.parent for path in folder.glob("*/model.pt")) if kind == "grid" else []
    return {
        "files": {str(path.relative_to(folder)): path.read_bytes() for path in files},
        "runs": {run.name: outcome(run) for run in runs},
    }


def disturb(command, plan, cluster, rng) -> tuple[list[dict], list[str]]:
    """Starts a command, kills as planned and waits for its end.

    Args:
        plan: (done, what) pairs: `what` is killed a random moment after so many blocks and epochs are finished.

    Returns:
        What was killed after how many blocks, and what it ended too early for.
    """
    queue, kills, deadline, due = sorted(plan), [], time.monotonic() + LIMIT_S, None
    command.start()
    while command.process.poll() is None:
        if time.monotonic() > deadline:
            command.process.kill()
            raise TimeoutError(f"{command.kind}: more than {LIMIT_S} s; see {command.log}")
        if queue and due is None and command.done() >= queue[0][0]:
            due = time.monotonic() + rng.random()
        if due is not None and time.monotonic() >= due:
            what = queue[0][1]
            if kill(command, what, cluster, rng):
                kills.append({"what": what, "done": command.done()})
                queue.pop(0)
                due = None
        time.sleep(0.02)
    return kills, [what for _, what in queue]


def kill(command, what, cluster, rng) -> bool:
    """Whether there was one to kill."""
    if what == "node":
        return bool(cluster.kill_second_node())
    if what == "driver":
        command.process.kill()
        command.process.wait()
        command.start()
        return True
    return bool(kill_a_process([pid for pid in descendants(os.getpid()) if is_worker(pid, command.kind)], rng))


def is_worker(pid, kind) -> bool:
    return command_of(pid).startswith(WORKERS[kind])


def make_plans(args, rng) -> list[tuple]:
    """(kind, what is to be killed) of each command; half of all are workers."""
    plans, bag = [(kind, []) for _ in range(args.each) for kind in WORKERS], []
    for number in range(args.kills):
        bag = bag or rng.sample(["worker", "worker", "driver", "node"], 4)
        plans[number % len(plans)][1].append(bag.pop())
    return plans


def prepare(folder) -> tuple[dict, dict]:
    """(lines, undisturbed records) of both kinds."""
    path = folder / "judged.yaml"
    path.write_text(yaml.safe_dump(GRID))
    train = [sys.executable, "-m", "genray.train", "--runtime", "local", "--storage", str(folder), *RUN]
    subprocess.run(train, cwd=ROOT, check=True, capture_output=True)
    lines = {
        "evaluation": ["genray.evaluate", folder / "digits", *ASKED],
        "grid": ["genray.tune", path],
    }
    places = {"evaluation": ["--output", folder / "whole"], "grid": ["--storage", folder / "grids"]}
    for kind, line in lines.items():
        alone = [sys.executable, "-m", *map(str, line), *map(str, places[kind])]
        subprocess.run(alone, cwd=ROOT, check=True, capture_output=True)
    expected = {kind: records(kind, where) for kind, where in
                (("evaluation", folder / "whole"), ("grid", folder / "grids" / "judged"))}  # fmt: skip
    return lines, expected


def one(number, kind, plan, lines, expected, cluster, rng, folder) -> tuple[dict, list]:
    place = folder / f"{number}"
    result = place / "out" if kind == "evaluation" else place / "runs" / "judged"
    line = [*lines[kind], "--address", cluster.cluster.address]
    line += ["--workers", 3, *PATIENT, "--output", result] if kind == "evaluation" else ["--storage", result.parent]
    command, began = Command(kind, line, result, place), time.monotonic()
    kills, missed = disturb(command, plan, cluster, rng)
    seconds = time.monotonic() - began
    wrong = command.wrong(expected[kind]) + cluster.leftovers(tuple(WORKERS.values()))
    said = [text for text in command.log.read_text().splitlines() if "another one is started" in text]
    killed = ", ".join(f"{kill['what']} after {kill['done']}" for kill in kills) or "nothing killed"
    print(f"{kind} {number + 1}: {killed}; {seconds:.0f} s: {'; '.join(wrong) or 'the same record'}", flush=True)
    if wrong:
        print(command.log.read_text())
    return {"kind": kind, "seconds": seconds, "kills": kills, "replaced": len(said), "wrong": wrong}, missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=5, help="evaluations, and grids")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    rng, memory = random.Random(args.seed), shared_memory()
    record = {"machine": machine(), "seed": args.seed, "runs": []}
    with tempfile.TemporaryDirectory(prefix="genray-evaluation-chaos-") as place:
        folder = Path(place)
        lines, expected = prepare(folder)
        whole = {"evaluation": len(list((folder / "whole" / "blocks").iterdir()))}
        whole["grid"] = Command("grid", [], folder / "grids" / "judged", folder / "none").done()
        cluster, missed = TwoNodes(), []
        try:
            for number, (kind, what) in enumerate(make_plans(args, rng)):
                plan = [(rng.randrange(int(0.7 * whole[kind])), each) for each in what + missed]
                run, missed = one(number, kind, plan, lines, expected, cluster, rng, folder)
                record["runs"].append(run)
                killed = Counter(kill["what"] for run in record["runs"] for kill in run["kills"])
                wrong = sum(bool(run["wrong"]) for run in record["runs"])
                record["summary"] = {"runs": len(record["runs"]), "wrong_runs": wrong, "killed": dict(killed)}
                write_json(args.output, record)
        finally:
            cluster.close()
    record["summary"]["shared_memory_left"] = sorted(shared_memory() - memory)
    write_json(args.output, record)
    print(json.dumps(record["summary"], indent=1))
    sys.exit(bool(record["summary"]["wrong_runs"]))


if __name__ == "__main__":
    main()
