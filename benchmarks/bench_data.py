"""The same training from memory, from a mapped file and from JPEG files: bits, memory of all processes, steps a second.

    python benchmarks/bench_data.py --source data/cifar10 --images 200000     # 64 to 256 pixels, made from CIFAR-10
    python benchmarks/bench_data.py --source data/cifar10 --extra 1000000     # generated images in an .npz, share 0.7

`--source` is a folder of Parquet files, or torchvision's download folder. What is made lies under `--folder`, and
is not made again. Each way is a process of its own, and all take turns in windows of ten steps.
Memory is the proportional set size (PSS) of a process and all that it started, sampled while it works; a page that
processes share is counted once in all, and what only the page cache holds is not counted.
"""

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from common import machine, paired, text_of, write_json
from PIL import Image

from genray.config import load_config
from genray.data.datasets import load_image_data
from genray.learners.base_learner import BaseLearner
from genray.run.setup import prepare

WAYS = [("resident", 0), ("mapped", 0), ("files", 0), ("files", 1), ("files", 2)]
STEPS, WINDOW, KILLED_AT = 50, 10, 20
SMALLEST, LARGEST = 64, 256  # pixels
TEST_IMAGES, POLL_S = 200, 0.5  # asking for memory takes time of its own


def config_of(args) -> list[str]:
    """Overrides of a small run of two learners."""
    common = [
        "model={name: resnet18, width: 4}",
        "training={epochs: 1000, batch_size: 64}",
        "base_learners.linf.attack={norm: linf, epsilon: 8/255, step_size: 4/255, num_steps: 1}",
        "data.validation_examples=100",
        f"data.home={args.home}",
        f"data.cache={args.folder}/cache",
        f"data.decoding_workers={args.workers}",
    ]
    if args.extra:
        own = f"data.source={'parquet' if list(Path(args.source).glob('*.parquet')) else 'cifar10'}"
        extra = f"{{source: npz, path: {npz_of(args)}, batch_share: 0.7}}"
        return [*common, own, f"data.path={args.source}", f"data.extra={extra}"]
    return [*common, "data.source=image_folder", f"data.path={jpegs_of(args)}", "data.image_size=[64, 64]"]


# --- what is trained on -----------------------------------------------------------------------------------------------


def jpegs_of(args) -> Path:
    return args.folder / f"jpeg-{args.images}"


def npz_of(args) -> Path:
    return args.folder / f"generated-{args.extra}.npz"


def cifar10(args):
    source = "parquet" if list(Path(args.source).glob("*.parquet")) else "cifar10"
    return load_image_data(source, path=args.source, decode=("train",)).train


def make_jpegs(args):
    """CIFAR-10's images in sizes of their own, again and again until there are enough."""
    done, began = jpegs_of(args) / "done", time.perf_counter()
    if done.exists():
        return 0.0
    train = cifar10(args)
    for part, first, count in (("train", 0, args.images), ("test", args.images, TEST_IMAGES)):
        for label in range(10):
            (jpegs_of(args) / part / str(label)).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            image, label = train.images[i % len(train)], int(train.labels[i % len(train)])
            target = jpegs_of(args) / part / str(label) / f"{i:07d}.jpg"
            if not target.exists():
                sides = np.random.default_rng(i).integers(SMALLEST, LARGEST + 1, 2).tolist()
                larger = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(sides, Image.Resampling.BICUBIC)
                larger.save(target.with_suffix(".part"), "JPEG", quality=90)
                os.replace(target.with_suffix(".part"), target)
    done.touch()
    return time.perf_counter() - began


def make_npz(args):
    """CIFAR-10's images, shifted in brightness by the number of times that they came."""
    target, began = npz_of(args), time.perf_counter()
    if target.exists():
        return 0.0
    train = cifar10(args)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".part")
    with zipfile.ZipFile(aside, "w", allowZip64=True) as archive:
        with archive.open("image.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (args.extra, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for start in range(0, args.extra, 10_000):
                places = torch.arange(start, min(start + 10_000, args.extra))
                images = train.images[places % len(train)].permute(0, 2, 3, 1)
                member.write((images + (places // len(train)).to(torch.uint8).view(-1, 1, 1, 1)).numpy().tobytes())
        with archive.open("label.npy", "w") as member:
            np.lib.format.write_array(member, train.labels[torch.arange(args.extra) % len(train)].numpy())
    os.replace(aside, target)
    return time.perf_counter() - began


# --- one way, in a process of its own ---------------------------------------------------------------------------------


def work(args):
    """Trains a window for each line on standard input; answers with seconds and the weights' digest."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    setup = prepare(load_config(None, config_of(args)))
    learners = [BaseLearner(n, setup.plan, setup.build_network(), setup.splits["train"]) for n in ("natural", "linf")]
    if args.state and args.state.exists():
        for learner, state in zip(learners, pickle.loads(args.state.read_bytes())):
            learner.load_state_dict(state)
    answer(ready=time.perf_counter() - began, images=len(setup.splits["train"]))
    for line in sys.stdin:
        steps, began = int(line), time.perf_counter()
        for learner in learners:
            learner.run_window(learner.step, learner.step + steps)
        seconds = time.perf_counter() - began
        if args.state:
            args.state.write_bytes(pickle.dumps([learner.state_dict() for learner in learners]))
        weights = b"".join(learner.flat.snapshot(0).weights.tobytes() for learner in learners)
        answer(seconds=seconds, step=learners[0].step, weights=hashlib.sha256(weights).hexdigest()[:16])


def answer(**fields):
    print(json.dumps(fields), flush=True)


class Way:
    """The process of one way, and the memory that it takes."""

    def __init__(self, args, home, workers, state=None):
        self.name = f"{home}, {workers} processes" if home == "files" else home
        chosen = [f"--home={home}", f"--workers={workers}", *([f"--state={state}"] if state else [])]
        same = [f"--{key}={getattr(args, key)}" for key in ("source", "folder", "images", "extra")]
        line = [sys.executable, __file__, *same, *chosen]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start, self.peak = self.measured(lambda: None), 0.0
        self.start_peak, self.peak, self.seconds, self.last = self.peak_of_last, 0.0, [], {}

    def measured(self, ask):
        """The next answer; the peak PSS meanwhile is in `peak_of_last`."""
        self.peak_of_last, over = 0.0, threading.Event()

        def sample():
            while not over.wait(POLL_S):
                self.peak_of_last = max(self.peak_of_last, sum(map(pss_mib, family(self.process.pid))))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            ask()
            line = self.process.stdout.readline()
        finally:
            over.set()
            thread.join()
        if not line:
            raise SystemExit(f"{self.name}: ended with {self.process.wait()}")
        return json.loads(line)

    def window(self, steps=WINDOW):
        self.last = self.measured(lambda: print(steps, file=self.process.stdin, flush=True))
        self.peak = max(self.peak, self.peak_of_last)
        self.seconds.append(self.last["seconds"])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def family(pid) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    except OSError:  # ended meanwhile
        pass
    return found


def pss_mib(pid) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(args) -> dict:
    """All homes and numbers of decoding processes, and one that is killed and goes on."""
    made = make_jpegs(args)
    ways = [Way(args, home, workers) for home, workers in WAYS]
    for way in ways:
        way.window(WINDOW)  # not timed: processes start, caches fill
        way.seconds.clear()
    for _ in range(STEPS // WINDOW - 1):
        for way in ways:
            way.window()
    for way in ways:
        way.end()
    state = args.folder / "state"
    state.unlink(missing_ok=True)
    first = Way(args, "files", 2, state)
    first.window(KILLED_AT)
    first.kill()
    second = Way(args, "files", 2, state)
    second.window(STEPS - KILLED_AT)
    second.end()
    rows = {}
    for way in ways:
        rows[way.name] = {
            "weights": way.last["weights"],
            "seconds to prepare": way.start["ready"],
            "peak MiB at the start": way.start_peak,
            "peak MiB in training": way.peak,
            "steps a second, of resident": paired(ways[0].seconds, way.seconds),
        }
    resumed = {"killed after step": KILLED_AT, "weights": second.last["weights"], "step": second.last["step"]}
    return {"images": args.images, "seconds to make the files": made, "ways": rows, "resumed": resumed}


def compare_extra(args) -> dict:
    """A mapped home beside a resident one, if there is room; mapped twice, without and with its file."""
    made, rows = make_npz(args), {}
    for file in (args.folder / "cache").glob("npz-extra-*"):
        file.unlink()
    homes = {"mapped, first start": "mapped", "mapped again": "mapped"}
    for name, home in [*homes.items(), *[("resident", "resident")] * args.resident]:
        way = Way(args, home, 0)
        way.window(1)
        row = {"seconds until the first step": way.start["ready"] + way.last["seconds"], "peak MiB": way.start_peak}
        way.window(STEPS - 1)
        rows[name] = {**row, "peak MiB in training": way.peak, "weights": way.last["weights"]}
        way.end()
    return {"extra": args.extra, "seconds to make the file": made, "ways": rows}


def table(record) -> str:
    """Markdown."""
    what = f"{record['images']:,} JPEG files" if "images" in record else f"{record['extra']:,} extra images"
    columns = [name for name in next(iter(record["ways"].values())) if name != "weights"]
    same = {row["weights"] for row in record["ways"].values()} | {record.get("resumed", {}).get("weights")} - {None}
    lines = [f"| {what} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in record["ways"].items():
        cells = [text_of(row[c]) if isinstance(row[c], dict) else f"{row[c]:,.1f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nWeights after {STEPS} steps: {'the same bits' if len(same) == 1 else f'DIFFERENT: {same}'}.")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/genray-bench-data"))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--extra", type=int, default=0, help="so many generated images instead of JPEG files")
    parser.add_argument("--resident", action="store_true", help="with --extra: in memory too, which takes two copies")
    parser.add_argument("--output", type=Path, help="FILE.json; the table goes to FILE.md; others in them stay")
    parser.add_argument("--machine", default="this machine", help="words for the table's first line")
    parser.add_argument("--home", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.home:
        work(args)
        return
    record = compare_extra(args) if args.extra else compare(args)
    print(table(record))
    if args.output:
        before = json.loads(args.output.read_text())["runs"] if args.output.exists() else {}
        runs = before | {f"{'extra' if args.extra else 'images'} {args.extra or args.images}": record}
        write_json(args.output, {"machine": machine(), "runs": runs})
        title = f"# Where the images are: memory and speed\n\n`benchmarks/bench_data.py` on {args.machine}."
        args.output.with_suffix(".md").write_text("\n\n".join([title, *map(table, runs.values())]) + "\n")


if __name__ == "__main__":
    main()
