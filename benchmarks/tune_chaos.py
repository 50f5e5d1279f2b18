"""Kills a learner, a node and the tuner of a grid on two nodes, and compares every trial with `genray.train`.

    python benchmarks/tune_chaos.py                              # 8 trials, 4 at once: some minutes
    python benchmarks/tune_chaos.py --trials 4 --epochs 12 --seed 3

Two raylets on this machine, each with 4 logical CPUs and 2 logical GPUs; a trial has two base learners of 1 CPU and
half a GPU each, a global learner and an evaluator, so that four trials fit at once. `python -m genray.tune` is started;
at random moments a base learner is killed (SIGKILL), then the raylet of the second node, then the tuner itself. A new
second node joins and `--resume` runs the grid to its end. Exit code 1 unless

- the tuner ends with exit code 0 and its table has every trial, finished;
- every trial's `model.pt`, `model_last.pt`, metrics and accuracies are those of `python -m genray.train` on its
  `config.yaml`, bit for bit, with every epoch once;
- no file of a trial that was finished when the tuner was killed has changed since;
- no actor, placement group, lock or half-written file is left.
"""

import argparse
import csv
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from chaos import ROOT, TITLES, TwoNodes, command_of, descendants, kill_a_process, outcome
from common import machine, write_json

NODE = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 200 << 20}
AT_ONCE = 4
LIMIT_S = 3600  # on a busy machine
SETTINGS = {
    "training.batch_size": 48, "data.train_examples": 600, "data.test_examples": 60, "data.validation_examples": 70,
    "base_learners.linf.attack.num_steps": 4, "evaluation.attack.num_steps": 3,
    "base_learners.natural.resources.num_gpus": 0.5, "base_learners.linf.resources.num_gpus": 0.5,
    "global_learner.sync_unit": "step", "global_learner.sync_every": 5, "runtime.startup_timeout_s": 900,
}  # fmt: skip
# A share of the grid's epochs, between which each of them is killed.
MOMENTS = {"base learner": (0.1, 0.25), "node": (0.3, 0.45), "tuner": (0.6, 0.75)}


def write_grid(folder, trials, epochs) -> Path:
    """A grid of so many trials, over a rate, t' and the seed."""
    grid = {"base_learners.linf.lr": [0.1, 0.03], "global_learner.warmup_epochs": [1, 3]}
    content = {"name": "killed", "set": {**SETTINGS, "training.epochs": epochs}, "grid": grid}
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump({**content, "seeds": list(range(trials // 4)), "max_failures": 6}))
    return path


class Tuner:
    """The command, started once and, after it was killed, again."""

    def __init__(self, grid, storage, address):
        self.line = [sys.executable, "-m", "genray.tune", str(grid), "--storage", str(storage), "--address", address]
        self.folder, self.log, self.process = storage / "killed", storage.parent / "log.txt", None

    def start(self, *more):
        with open(self.log, "a") as log:
            self.process = subprocess.Popen([*self.line, *more], cwd=ROOT, stdout=log, stderr=log)

    def epochs(self) -> int:
        """Finished ones of all trials."""
        return sum(len(path.read_text().splitlines()) for path in self.folder.glob("*/metrics.jsonl"))

    def finished(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/results.json"))

    def under_way(self) -> list[str]:
        begun = {path.parent.name for path in self.folder.glob("*/metrics.jsonl")}
        return sorted(begun - set(self.finished()))


def fingerprints(folder, trials) -> dict:
    """Content and time of every file of some trials' folders."""
    files = [path for trial in trials for path in sorted((folder / trial).rglob("*")) if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def kill(what, tuner, cluster, rng) -> bool:
    """Whether there was one to kill."""
    if what == "node":
        cluster.kill_second_node(replace=False)
        return True
    if what == "tuner":
        tuner.process.kill()
        tuner.process.wait()
        return True
    return bool(kill_a_process([p for p in descendants(os.getpid()) if command_of(p).startswith(TITLES[what])], rng))


def disturb(tuner, cluster, whole, rng) -> tuple[list[dict], dict]:
    """Runs the tuner until it is killed; returns what was killed when, and the files of the trials finished by then."""
    began, kills = time.monotonic(), []
    for what, (low, high) in MOMENTS.items():
        moment = (low + (high - low) * rng.random()) * whole
        while tuner.epochs() < moment or not tuner.under_way() or not kill(what, tuner, cluster, rng):
            if tuner.process.poll() is not None or time.monotonic() - began > LIMIT_S:
                print(tuner.log.read_text())
                raise RuntimeError(f"the tuner ended, or took too long, before the {what} was killed")
            time.sleep(0.05)
        state = {"epochs": tuner.epochs(), "finished": tuner.finished(), "under_way": tuner.under_way()}
        kills.append({"what": what, "after_s": time.monotonic() - began, **state})
        print(f"{what:13s} killed after {kills[-1]['after_s']:.0f} s, {state['epochs']} of {whole} epochs, "
              f"{len(state['finished'])} trials finished, {len(state['under_way'])} under way", flush=True)  # fmt: skip
    return kills, fingerprints(tuner.folder, tuner.finished())


def wrong_with(tuner, before, trials, epochs, storage) -> list[str]:
    """In what the grid differs from what it should be; empty where in nothing."""
    if tuner.process.returncode:
        return [f"exit code {tuner.process.returncode}: {tuner.log.read_text().splitlines()[-1:]}"]
    with open(tuner.folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [f"{row['trial']} is {row['status']}" for row in rows if row["status"] != "finished"]
    found += [f"{len(rows)} rows"] * (len(rows) != trials)
    after = fingerprints(tuner.folder, {Path(path).relative_to(tuner.folder).parts[0] for path in before})
    found += [f"{path} was written again" for path in before if before[path] != after.get(path)]
    for row in rows:
        line = [sys.executable, "-m", "genray.train", "--runtime", "local", "--storage", str(storage)]
        config = tuner.folder / row["trial"] / "config.yaml"
        subprocess.run([*line, "--config", str(config)], cwd=ROOT, check=True, capture_output=True)
        found += differences(
            row["trial"], outcome(tuner.folder / row["trial"]), outcome(storage / row["trial"]), epochs
        )
    stray = [str(p) for p in tuner.folder.glob("*/**/*") if p.name == ".lock" or ".tmp-" in p.name]
    return found + [f"left {path}" for path in stray]


def differences(name, got, expected, epochs) -> list[str]:
    found = []
    for file, weights in expected["weights"].items():
        ours = got["weights"][file]
        if list(ours) != list(weights) or not all(ours[key].equal(weights[key]) for key in weights):
            found.append(f"{name}: {file} has other bits")
    counted = [record["epoch"] for record in got["records"]]
    if counted != list(range(1, epochs + 1)):
        found.append(f"{name}: epochs {counted}")
    return found + [f"{name}: other {what}" for what in ("records", "models") if got[what] != expected[what]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="a multiple of 4")
    parser.add_argument("--epochs", type=int, default=8, help="of a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="genray-tune-chaos-") as place:
        folder = Path(place)
        (folder / "runs").mkdir()
        grid, cluster = write_grid(folder, args.trials, args.epochs), TwoNodes(NODE, NODE)
        try:
            tuner, began = Tuner(grid, folder / "runs", cluster.cluster.address), time.monotonic()
            tuner.start()
            kills, before = disturb(tuner, cluster, args.trials * args.epochs, rng)
            wrong = [f"after the tuner's end: {left}" for left in cluster.leftovers()]
            cluster.replace_second_node()
            tuner.start("--resume")
            tuner.process.wait(LIMIT_S)
            seconds = time.monotonic() - began
            wrong += cluster.leftovers()
        finally:
            cluster.close()
        wrong += wrong_with(tuner, before, args.trials, args.epochs, folder / "alone")
        if wrong:
            print(tuner.log.read_text())
    print(f"{args.trials} trials, {AT_ONCE} at once, {seconds:.0f} s: {'; '.join(wrong) or 'the same bits'}")
    write_json(args.output, {
        "machine": machine(), "seed": args.seed, "trials": args.trials, "at_once": AT_ONCE, "epochs": args.epochs,
        "seconds": seconds, "kills": kills, "files_of_finished_trials": len(before), "wrong": wrong,
    })  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
