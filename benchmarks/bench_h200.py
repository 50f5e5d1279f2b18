"""What a GPU does with genray's training step and AutoAttack: rates, and shares of its measured matrix rate.

    python benchmarks/bench_h200.py --output h200.json            # one GPU, within eight minutes, no data, no ray
    python benchmarks/bench_h200.py --device cpu --width 4 --batch 8 --steps 2 --window 1 --attacked 8 --seconds 60

ResNet-18 at 32 x 32 on random images (time does not depend on what is on them). A step is one of both learners of
Generalist with PGD-10, one after another on this device; steps are timed in windows, as the trainer takes them, since a
window ends by waiting for the device. AutoAttack is measured at a radius so small that no image
falls, so its figure is the cost of an image that resists. Parts that come after --seconds are left out and named.
"""

import argparse
import gc
import importlib.util
import statistics
import time

import torch
from bench_step import images, our_step
from common import machine, write_json

from genray.core.allocator import keep_freed_memory
from genray.evaluation.engines import ENGINES
from genray.models import build_model
from genray.types import ThreatModel

PASSES, AT_PASSES, NT_PASSES = 26, 23, 3
PAPER_IMAGES, PAPER_EPOCHS = 50_000, 120
WAYS = {
    "bf16": ["compute.precision=bf16"],
    "fp32": [],
    "tf32": ["compute.precision=tf32"],
    "fp32 compiled": ["compute.compile=true"],
    "bf16 compiled": ["compute.precision=bf16", "compute.compile=true"],
}


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run, device, repeats):
    """Median seconds of a call, after one that is not timed."""
    run()
    found = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def matrix_rate(device, size):
    """FLOP/s of a square matrix product in bfloat16: what the device really gives."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def ten():
        for _ in range(10):
            a @ b

    return 10 * 2 * size**3 / seconds_of(ten, device, 5)


def forward_flops(network, batch):
    """FLOPs of a forward pass, counted on its convolutions and linear layers."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.rand(batch, 3, 32, 32))
    return counter.get_total_flops()


def training(args, rate):
    record = {}
    flops = PASSES * forward_flops(network_of(args), args.batch)
    for name in args.ways:
        if out_of_time(args, f"training {name}"):
            continue
        release(args.device)  # what the way before left, compiled graphs and their memory among it
        first, seconds, peak = one_way(args, WAYS[name])
        schedule = seconds * -(-PAPER_IMAGES // args.batch) * PAPER_EPOCHS
        record[name] = {
            "step_s": seconds, "first_window_s": first, "images_per_s": args.batch / seconds,
            "share_of_matrix_rate": flops / seconds / rate, "paper_schedule_min": schedule / 60, "peak_gib": peak,
        }  # fmt: skip
        print(
            f"training {name:14} {1e3 * seconds:8.2f} ms a step, {args.batch / seconds:8.0f} images/s, "
            f"{100 * flops / seconds / rate:5.1f} % of the matrix rate, paper's schedule in {schedule / 60:.1f} min",
            flush=True,
        )
    return record


def one_way(args, overrides):
    """Seconds of the first window, which compiles where it does; seconds of a step; GiB of the device, or None."""
    windows = -(-args.steps // args.window)
    # `images` has two steps' for each round and two more, and there are two windows besides the timed ones.
    split = images(argparse.Namespace(batch=args.batch, rounds=(windows + 2) * args.window))
    device = ["device=cuda"] if args.device == "cuda" else []
    run = our_step(args, split, [*overrides, *device], args.window)
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    seconds = seconds_of(run, args.device, windows) / args.window
    return first, seconds, torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None


def release(device):
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def autoattack(args):
    """Images a second that resist each member, at a radius at which all do."""
    record, network = {}, network_of(args).to(args.device).eval()
    x = torch.rand(args.attacked, 3, 32, 32, device=args.device)
    y = network(x).argmax(1)
    for engine in args.engines:
        if engine == "pyautoattack" and not importlib.util.find_spec(engine):
            print(f"{engine}: left out, it is not installed")
            continue
        for member in ("apgd_ce", "apgd_t", "fab_t", "square"):
            if out_of_time(args, f"{engine} {member}"):
                continue
            how = {"threat": ThreatModel("linf", 1e-7), "seed": 0, "num_classes": 10}
            synchronise(args.device)
            began = time.perf_counter()
            found = ENGINES[engine](network, x, y, member=member, **how)
            synchronise(args.device)
            seconds = time.perf_counter() - began
            with torch.no_grad():
                standing = int((network(found).argmax(1) == y).sum())
            record[f"{engine} {member}"] = {"seconds": seconds, "images": len(x), "standing": standing}
            print(f"{engine:12} {member:8} {seconds:7.1f} s for {len(x)} images ({standing} stand)", flush=True)
    return record


def network_of(args):
    return build_model("resnet18", num_classes=10, in_channels=3, image_size=(32, 32), width=args.width, seed=0)


def out_of_time(args, what):
    late = time.monotonic() > args.deadline
    if late:
        print(f"{what}: left out, --seconds are over")
    return late


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each way")
    parser.add_argument("--window", type=int, default=10, help="steps of a window")
    parser.add_argument("--attacked", type=int, default=512, help="images of the AutoAttack part")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices of the matrix rate")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES)[::-1], choices=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=420, help="no new part begins after these")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here; --device cpu tries the script itself")
    args.deadline, args.net, args.threads = time.monotonic() + args.seconds, "resnet18", torch.get_num_threads()
    keep_freed_memory()
    rate = matrix_rate(args.device, args.matrix if args.device == "cuda" else 512)
    record = {"machine": machine(), "width": args.width, "batch": args.batch, "matrix_rate_flops": rate}
    print(f"{record['machine']}; matrix rate {rate / 1e12:.2f} TFLOP/s in bf16")
    record["training"] = training(args, rate)
    write_json(args.output, record)
    record["autoattack"] = autoattack(args)
    write_json(args.output, record)


if __name__ == "__main__":
    main()
