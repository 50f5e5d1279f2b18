"""Everything that a few minutes on a GPU can tell about genray: one command, one JSON.

    python benchmarks/gpu_check.py --pack CIFAR_FOLDER --output parts          # here: the data as files of 55 MiB
    python benchmarks/gpu_check.py --output $OUT --data parts/part1of2.npz     # there: checks; keeps this part
    python benchmarks/gpu_check.py --output $OUT --data parts/part2of2.npz --only training   # trains on both
    python benchmarks/gpu_check.py --output $OUT --only training               # goes on from the newest checkpoint
    python benchmarks/gpu_check.py --device cpu --small --seconds 120 --output out --data ...   # the rehearsal

It needs no network and no ray: torch, torchvision, pytest and genray's other dependencies (pyarrow, pydantic, pyyaml,
pillow, scikit-learn, tensorboardX, tqdm, filelock). A section that fails is recorded with its error, and the next one
begins; training begins once all parts of the data are there. What a later command needs, these parts and the run, is
in --work, outside of --output: a checkpoint of a ResNet-18 is ten times as large as what is usually brought back. The
model itself is in --output, in pieces (`cat model.pt.* > model.pt`).
"""

import _thread
import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_h200  # noqa: E402
from bench_step import images, our_step  # noqa: E402
from common import machine, write_json  # noqa: E402

import genray  # noqa: E402
from genray.core.allocator import keep_freed_memory  # noqa: E402
from genray.data.datasets import load_image_data  # noqa: E402
from genray.evaluation.engines import ENGINES  # noqa: E402
from genray.types import ThreatModel  # noqa: E402

MIB = 2**20
PIECE = 15 * MIB
SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


# --- data ------------------------------------------------------------------------------------------------------------


def pack(args):
    """Writes images losslessly compressed, in files of at most --mib MiB: a part of both sets in each."""
    from PIL import Image

    source = {"source": "digits"} if args.pack == "digits" else {"source": "cifar10", "path": args.pack}
    data, order = load_image_data(**source), np.random.default_rng(0)
    rows = [(name, i) for name in ("train", "test") for i in order.permutation(len(getattr(data, name)))]
    rows = [rows[i] for i in order.permutation(len(rows))]  # so that each part has its share of both sets
    parts, size = [[]], 0
    for name, i in rows:
        pixels = getattr(data, name).images[int(i)].permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, "WEBP" if pixels.shape[2] == 3 else "PNG", lossless=True)
        size += len(file.getvalue()) + 32  # with its length and its label
        if size > args.mib * MIB or len(parts[-1]) == args.most:
            parts.append([])
            size = len(file.getvalue()) + 32
        parts[-1].append((name, int(i), file.getvalue()))
    args.output.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, 1):
        write_part(args.output / f"part{number}of{len(parts)}.npz", data, part)


def write_part(path, data, rows):
    labels = [int(getattr(data, name).labels[i]) for name, i, _ in rows]
    np.savez(
        path,
        content=np.frombuffer(b"".join(content for *_, content in rows), np.uint8),
        length=np.array([len(content) for *_, content in rows]),
        label=np.array(labels),
        test=np.array([name == "test" for name, *_ in rows]),
    )
    print(f"{path}: {len(rows)} images, {path.stat().st_size / MIB:.1f} MiB")


def unpack(paths):
    """{"train": (x, y), "test": (x, y)}: the images of all parts, in the order of the parts' names."""
    from PIL import Image

    x, y, test = [], [], []
    for path in paths:
        with np.load(path, allow_pickle=False) as part:
            content, ends = part["content"].tobytes(), part["length"].cumsum()
            for start, end in zip(ends - part["length"], ends):
                x.append(np.asarray(Image.open(io.BytesIO(content[start:end]))))
            y.append(part["label"])
            test.append(part["test"])
    x, y, test = np.stack(x), np.concatenate(y), np.concatenate(test)
    return {"train": (x[~test], y[~test]), "test": (x[test], y[test])}


# --- sections --------------------------------------------------------------------------------------------------------


def tests(args):
    """tests/gpu: numbers of each outcome, what failed, and what the tests report."""
    file = args.output / "tests.xml"
    line = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={file}", "tests/gpu"]
    environment = {**os.environ, "GENRAY_TEST_DEVICE": args.device, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=args.left())
    cases = list(ElementTree.parse(file).iter("testcase"))
    failed = [(case, bad) for case in cases for bad in (*case.iter("failure"), *case.iter("error"))]
    return {
        "ran": len(cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "failed": {case.get("name"): bad.get("message", "")[:600] for case, bad in failed},
        "reported": {c.get("name"): {p.get("name"): p.get("value") for p in c.iter("property")} for c in cases},
        "last": done.stdout.splitlines()[-1:],
    }


def profiled(args, overrides, steps=2):
    """torch's profile of some steps of both learners, after some that are not watched; and their number."""
    from torch.profiler import ProfilerActivity, profile

    device = ["device=cuda"] if args.device == "cuda" else []
    split = images(argparse.Namespace(batch=args.batch, rounds=6 * steps))
    run = our_step(args, split, [*overrides, *device], steps)
    run()
    run()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with profile(activities=activities) as watched:
        run()
        bench_h200.synchronise(args.device)
    return watched.key_averages(), steps


def launches(args):
    """Launches and waits a step of both learners; on a CPU, operations."""
    found = {}
    for name, overrides in bench_h200.WAYS.items():
        if args.device == "cpu" and "compiled" in name:
            continue
        bench_h200.release(args.device)
        events, steps = profiled(args, overrides)
        counts = Counter({event.key: event.count for event in events})
        found[name] = {
            "launches": sum(counts[key] for key in LAUNCHES) / steps,
            "graph_launches": counts["cudaGraphLaunch"] / steps,
            "waits": {key: counts[key] / steps for key in SYNCHRONISING if counts[key]},
            "operations": sum(number for key, number in counts.items() if key.startswith("aten::")) / steps,
        }
    return found


def rates(args):
    """Step rates of all ways, against the device's rate of matrix products."""
    rate = bench_h200.matrix_rate(args.device, 8192 if args.device == "cuda" else 256)
    ways = [name for name in bench_h200.WAYS if args.device == "cuda" or "compiled" not in name]
    options = argparse.Namespace(**vars(args) | {"ways": ways, "deadline": time.monotonic() + args.left()})
    return {"matrix_rate_flops": rate, "ways": bench_h200.training(options, rate)}


def kernels(args):
    """What takes the time of a step in bfloat16."""
    events, steps = profiled(args, bench_h200.WAYS["bf16"])
    key = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    total = sum(getattr(event, key) for event in events)
    longest = sorted(events, key=lambda event: -getattr(event, key))[:20]
    rows = [
        {
            "name": event.key[:120],
            "ms_a_step": getattr(event, key) / 1000 / steps,
            "share": getattr(event, key) / total,
            "calls_a_step": event.count / steps,
        }
        for event in longest
    ]
    return {"ms_a_step": total / 1000 / steps, "longest": rows}


def autoattack(args):
    """Images a second that resist each member, by block size."""
    network, found = bench_h200.network_of(args).to(args.device).eval(), {}
    members = ("apgd_ce",) if args.small else ("apgd_ce", "apgd_t", "square")
    for size in args.blocks:
        x = torch.rand(size, 3, 32, 32, device=args.device)
        with torch.no_grad():
            y = network(x).argmax(1)
        for member in members:
            if args.left() < 20:
                return found
            how = {"threat": ThreatModel("linf", 1e-7), "seed": 0, "num_classes": 10, "member": member}
            bench_h200.synchronise(args.device)
            began = time.perf_counter()
            ENGINES["genray"](network, x, y, **how)
            bench_h200.synchronise(args.device)
            found[f"{member} {size}"] = size / (time.perf_counter() - began)
    return found


def training(args):
    """As many epochs as fit; goes on from the newest checkpoint of an earlier command's run."""
    paths = sorted((args.work / "data").glob("part*.npz"))
    wanted = int(paths[0].stem.partition("of")[2]) if paths else 1
    if len(paths) < wanted:
        return {"left_out": f"{len(paths)} of the {wanted} parts of the data are in {args.work / 'data'} (--data)"}
    parts, runs = unpack(paths), args.work / "runs"
    began, rows, seconds = time.monotonic(), [], max(5.0, args.left() - 15)
    resumes = (runs / "check" / "config.yaml").exists()
    if not args.epochs:
        threading.Timer(seconds, _thread.interrupt_main).start()
    ended = False
    try:
        config, overrides = (None, SMALL) if args.small else (args.preset, [])
        epochs = [f"training.epochs={args.epochs}"] if args.epochs else []
        genray.train(
            config, [*overrides, *epochs, f"device={args.device}"], runtime="local", name="check", storage=runs,
            resume=resumes, on_epoch=lambda record: rows.append((time.monotonic() - began, record)), **parts,
        )  # fmt: skip
        ended = True
    except KeyboardInterrupt:
        print("training: the time is up", flush=True)
    give_model(runs / "check", args.output)
    return {
        "parts": [path.name for path in paths],
        "images": [len(y) for _, y in parts.values()],
        "resumed": resumes,
        "ended": ended,
        "epochs": [{"seconds": at, **json.loads(json.dumps(record, default=str))} for at, record in rows],
    }


SMALL = ["data.validation_examples=50", "training.epochs=400", "evaluation.attack.num_steps=2"]


def give_model(run, output):
    """The newest model of the run, in pieces that are small enough to be brought back."""
    models = sorted(run.glob("*.pt"), key=lambda path: path.stat().st_mtime)
    for path in models[-1:]:
        content = path.read_bytes()
        for number, start in enumerate(range(0, len(content), PIECE)):
            (output / f"model.pt.{number}").write_bytes(content[start : start + PIECE])


SECTIONS = {
    "tests": (tests, 0.4),
    "launches": (launches, 0.1),
    "rates": (rates, 0.2),
    "kernels": (kernels, 0.05),
    "autoattack": (autoattack, 0.15),
    "training": (training, 1.0),  # what is left
}


# --- the command -----------------------------------------------------------------------------------------------------


def store(args):
    """Keeps the parts of the data that this command brought."""
    (args.work / "data").mkdir(parents=True, exist_ok=True)
    for path in args.data:
        if not path.is_file():
            sys.exit(f"--data: expected a file that --pack wrote, there is no {path}")
        shutil.copy(path, args.work / "data" / path.name)


def versions(args):
    found = {"genray": genray.__version__, "torch_cuda": torch.version.cuda, "python": sys.version.split()[0]}
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"cudnn": torch.backends.cudnn.version(), "capability": [properties.major, properties.minor]}
        found |= {"memory_gib": properties.total_memory / 2**30}
    return machine() | found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON and of the model's pieces")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="sizes for a rehearsal on a CPU")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="parts that --pack wrote, to be stored")
    parser.add_argument("--work", type=Path, default=Path("/tmp/genray_gpu_check"), help="data and run of all commands")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--preset", default=str(ROOT / "genray/presets/cifar10_resnet18_anchored.yaml"))
    parser.add_argument("--epochs", type=int, help="train that many instead of as many as fit")
    parser.add_argument("--seconds", type=float, default=530, help="of the whole command")
    parser.add_argument("--pack", help="CIFAR-10 folder, or digits: write its parts and stop")
    parser.add_argument("--mib", type=float, default=55, help="with --pack: the size of a part")
    parser.add_argument("--most", type=int, help="with --pack: the most images of a part")
    args = parser.parse_args()
    began = time.monotonic()
    if args.pack:
        return pack(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here; --device cpu --small is the rehearsal")
    args.output.mkdir(parents=True, exist_ok=True)
    args.net, args.threads = "resnet18", torch.get_num_threads()
    args.width, args.batch, args.steps, args.window = (4, 8, 2, 1) if args.small else (64, 128, 30, 10)
    args.blocks = (4, 8) if args.small else (100, 500, 1000, 2000)
    keep_freed_memory()
    store(args)
    record = {"versions": versions(args), "seconds": {}, "errors": {}}
    for name in args.only:
        section, share = SECTIONS[name]
        start = time.monotonic()
        until = min(began + args.seconds, start + share * args.seconds)
        args.left = lambda until=until: until - time.monotonic()
        print(f"--- {name}: up to {args.left():.0f} s", flush=True)
        try:
            record[name] = section(args)
        except Exception as error:  # the next section may still say something
            traceback.print_exc()
            record["errors"][name] = f"{type(error).__name__}: {error}"[:600]
        record["seconds"][name] = time.monotonic() - start
        write_json(args.output / "gpu_check.json", record)
    print(json.dumps({"seconds": record["seconds"], "errors": record["errors"]}, indent=1))
    os._exit(1 if record["errors"] else 0)  # the timer of a training that ended early is still waiting


if __name__ == "__main__":
    main()
