"""One training step of Generalist (both learners) beside the published code's, in time, passes and memory.

    python benchmarks/bench_step.py                                   # narrow ResNet-18, batch 128, random images
    python benchmarks/bench_step.py --width 64 --batch 32 --rounds 3
    python benchmarks/bench_step.py --run runs/cifar10_cpu            # and whether the attack is as strong

Ours are two `BaseLearner`s of the real trainer, one after another in this process, so that both sides do the same work
on the same cores. A *unit* is one forward pass of the batch through the folded network, in the same precision; 26 are
needed. It is measured twice: as any forward pass is made, and with activations that overwrite each other, as ours does
inside the attack.
The C library's allocator is set for all sides alike (core/allocator.py), which already makes the published loop faster.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import interleave, machine, paired, peak_mib, text_of, write_json
from official_step import EPSILON, NUM_STEPS, STEP_SIZE, OfficialStep, pgd

import genray
from genray.attacks import GradientAttack, StreamDraw
from genray.config import load_config
from genray.core.allocator import keep_freed_memory
from genray.data.splits import Split
from genray.learners.base_learner import BaseLearner
from genray.models import build_model
from genray.models.attack_copy import AttackCopy
from genray.run.plan import make_plan
from genray.run.setup import memory_format
from genray.storage import Storage

UNITS = 26  # PGD-10 of input gradients 20, two updates of 3
WAYS = {
    "ours fp32": [],
    "ours bf16": ["compute.precision=bf16"],
    "ours fp32, NCHW, not folded": ["compute.channels_last=false", "compute.fold_batch_norm=false"],
    "ours bf16, compiled": ["compute.precision=bf16", "compute.compile=true"],
}


def run_config(args, overrides):
    learner = {"lr": 0.01, "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4}}
    attack = {"norm": "linf", "epsilon": "8/255", "step_size": "2/255", "num_steps": NUM_STEPS}
    config = {
        "name": "bench",
        "data": {"source": "cifar10"},
        "model": {"name": args.net, "width": args.width},
        "training": {"epochs": 1, "batch_size": args.batch},
        "base_learners": {
            "natural": {"objective": "natural", **learner},
            "linf": {"objective": "adversarial", "attack": attack, **learner},
        },
        "global_learner": {"gamma": 0.7},
    }
    return load_config(config, overrides)


def fresh_network(args):
    return build_model(args.net, num_classes=10, in_channels=3, image_size=(32, 32), width=args.width, seed=0)


def our_step(args, split, overrides, steps=1):
    """A callable that takes a window of `steps` steps of both learners."""
    config = run_config(args, overrides)
    plan = make_plan(config, len(split))
    device = "cuda" if config.device == "cuda" else "cpu"
    learners = []
    for name in config.base_learners:
        network = fresh_network(args).to(memory_format=memory_format(config))
        learners.append(BaseLearner(name, plan, network, split, device, args.threads))

    def step():
        for learner in learners:
            learner.run_window(learner.step, learner.step + steps)

    return step


def batch_of(split, size):
    return split.images[:size].float() / 255, split.labels[:size]


def images(args):
    """Random images by default: time does not depend on what is on them."""
    stream = torch.Generator().manual_seed(0)
    number = args.batch * (args.rounds + 2) * 2
    shape = (number, 3, 32, 32)
    return Split(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=stream),
        torch.randint(0, 10, (number,), generator=stream),
    )


def official_step(args, split):
    step, (x, y) = OfficialStep(fresh_network(args)), batch_of(split, args.batch)
    return lambda: step(x, y)


def forwards(args, split):
    """Forward passes of folded copies and of those that ours attacks, twenty at a time: the units."""
    x, _ = batch_of(split, args.batch)
    x = x.contiguous(memory_format=torch.channels_last)
    network = fresh_network(args).to(memory_format=torch.channels_last).eval()

    def twenty(copy):
        with torch.no_grad():
            for _ in range(20):
                copy(x)

    kinds, made = {"fp32": torch.float32, "bf16": torch.bfloat16}, {}
    for name, kind in kinds.items():
        made[f"forward {name}"] = partial(twenty, AttackCopy(network, dtype=kind))
        made[f"attacked {name}"] = partial(twenty, attacked(network, kind))
    return made


def times(args):
    split = images(args)
    variants = {"published": official_step(args, split)}
    variants |= {name: our_step(args, split, WAYS[name]) for name in args.ways}
    variants |= forwards(args, split)
    seconds = interleave(variants, args.rounds)
    record = {"seconds": seconds, "speedup": {}, "units": {}, "attacked_units": {}}
    for name in args.ways:
        record["speedup"][name] = paired(seconds["published"], seconds[name])
        precision = "bf16" if "bf16" in name else "fp32"
        for units, kind in (("units", "forward"), ("attacked_units", "attacked")):
            all_units = [t / 20 * UNITS for t in seconds[f"{kind} {precision}"]]
            record[units][name] = paired(seconds[name], all_units)
        print(
            f"{name:28} {statistics.median(seconds[name]):7.3f} s a step   {text_of(record['speedup'][name])} x faster"
            f" than the published   {text_of(record['units'][name])} of {UNITS} forwards, "
            f"{text_of(record['attacked_units'][name])} of those that overwrite"
        )
    print(f"{'published':28} {statistics.median(seconds['published']):7.3f} s a step")
    return record


# --- others' attacks and steps -----------------------------------------------------------------------------------


def others(args):
    """PGD-20 beside torchattacks (where it is installed), and a PGD-10 adversarial step beside one like MAIR's."""
    split = images(args)
    x, y = batch_of(split, args.batch)
    network = fresh_network(args).eval()
    nhwc, x_nhwc = (
        fresh_network(args).to(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
    )
    copies = {"fp32": attacked(nhwc), "bf16": attacked(nhwc, torch.bfloat16)}
    attack = GradientAttack("linf", EPSILON, STEP_SIZE, 20)
    variants = {
        f"pgd20 ours {name}": (lambda copy=copy: attack(copy, x_nhwc, y, draw())) for name, copy in copies.items()
    }
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        theirs = torchattacks.PGD(network, eps=EPSILON, alpha=STEP_SIZE, steps=20, random_start=True)
        variants["pgd20 torchattacks"] = lambda: theirs(x, y)
    else:
        print("torchattacks is not installed: its PGD-20 is left out")
    learner = {name: _linf_step(args, split, WAYS[f"ours {name}"]) for name in ("fp32", "bf16")}
    variants |= {f"step ours {name}": step for name, step in learner.items()}
    variants["step like MAIR"] = mair_like_step(fresh_network(args), x, y)
    seconds = interleave(variants, args.rounds)
    record = {"seconds": seconds, "speedup": {}}
    for kind, reference in (("pgd20", "pgd20 torchattacks"), ("step", "step like MAIR")):
        for name in ("fp32", "bf16"):
            if reference in seconds:
                ratio = paired(seconds[reference], seconds[f"{kind} ours {name}"])
                record["speedup"][f"{kind} {name}"] = ratio
                print(f"{kind} {name}: {text_of(ratio)} x faster than {reference.removeprefix(kind + ' ')}")
    return record


def attacked(network, dtype=torch.float32):
    """The copy of a network that training attacks on a CPU."""
    return AttackCopy(network, in_place=True, lean_gradients=True, dtype=dtype)


def draw():
    return StreamDraw(torch.Generator().manual_seed(0))


def _linf_step(args, split, overrides):
    config = run_config(args, overrides)
    plan = make_plan(config, len(split))
    network = fresh_network(args).to(memory_format=memory_format(config))
    learner = BaseLearner("linf", plan, network, split, threads=args.threads)
    return lambda: learner.run_window(learner.step, learner.step + 1)


def mair_like_step(network, x, y):
    """A PGD-10 adversarial training step as MAIR makes it: input gradients only, eval-mode attack, plain tensors."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step():
        network.eval()
        adversarial = (x + torch.empty_like(x).uniform_(-EPSILON, EPSILON)).clamp(0, 1).detach()
        for _ in range(NUM_STEPS):
            adversarial.requires_grad = True
            loss = F.cross_entropy(network(adversarial), y)
            (gradient,) = torch.autograd.grad(loss, adversarial, retain_graph=False, create_graph=False)
            adversarial = adversarial.detach() + STEP_SIZE * gradient.sign()
            adversarial = (x + (adversarial - x).clamp(-EPSILON, EPSILON)).clamp(0, 1).detach()
        network.train()
        loss = F.cross_entropy(network(adversarial), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# --- memory ------------------------------------------------------------------------------------------------------


def memory(args):
    """Peak resident size of fresh processes that take three steps: plain PGD-AT, and the robust learner of ours."""
    found = {}
    for name in ("nothing", "plain PGD-AT", *args.ways):
        line = [sys.executable, __file__, "--only-memory-of", name, "--net", args.net, "--width", str(args.width)]
        done = subprocess.run(
            [*line, "--batch", str(args.batch), "--threads", str(args.threads)],
            capture_output=True,
            text=True,
            check=True,
        )
        found[name] = float(done.stdout.split()[-1])
    base = found["nothing"]
    ratios = {name: (found[name] - base) / (found["plain PGD-AT"] - base) for name in args.ways}
    for name, ratio in ratios.items():
        print(f"{name:28} peak memory {ratio:.2f} of plain PGD-AT ({found[name] - base:.0f} MiB above an idle process)")
    return {"peak_mib": found, "ratio_to_plain_at": ratios}


def memory_of(args, name):
    args.rounds = 1
    split = images(args)
    if name != "nothing":
        plain = mair_like_step(fresh_network(args), *batch_of(split, args.batch)) if name == "plain PGD-AT" else None
        step = plain or _linf_step(args, split, WAYS[name])
        for _ in range(3):
            step()
    print(peak_mib())


# --- strength ----------------------------------------------------------------------------------------------------


def strength(args):
    """Adversarial loss and robust accuracy of the attacks on a trained model, judged in float32."""
    model = genray.load_model(args.run)
    from genray.data.datasets import load_image_data
    from genray.evaluation.sources import config_of, data_of

    test = load_image_data(**data_of(config_of(Storage(args.run)))).test.first(args.examples, "--examples")
    nhwc = genray.load_model(args.run).to(memory_format=torch.channels_last)
    copies = {"ours fp32": attacked(nhwc), "ours bf16": attacked(nhwc, torch.bfloat16)}
    attack, totals = GradientAttack("linf", EPSILON, STEP_SIZE, NUM_STEPS), {}
    stream = torch.Generator().manual_seed(1)
    for start in range(0, len(test), args.batch):
        part = slice(start, start + args.batch)
        x, y = test.images[part].float() / 255, test.labels[part]
        found = {"published": pgd(model, x, y)}
        found |= {
            name: attack(c, x.contiguous(memory_format=torch.channels_last), y, StreamDraw(stream))
            for name, c in copies.items()
        }
        with torch.no_grad():
            for name, adversarial in found.items():
                logits = model(adversarial)
                loss, right = totals.setdefault(name, [0.0, 0])
                totals[name] = [
                    loss + float(F.cross_entropy(logits, y, reduction="sum")),
                    right + int((logits.argmax(1) == y).sum()),
                ]
    record = {n: {"loss": a / len(test), "robust": b / len(test)} for n, (a, b) in totals.items()}
    for name, values in record.items():
        print(f"{name:12} adversarial loss {values['loss']:.4f}, robust {100 * values['robust']:.2f} % of {len(test)}")
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS)[:3], choices=list(WAYS))
    parser.add_argument(
        "--parts", nargs="*", default=["times", "others", "memory"], choices=["times", "others", "memory"]
    )
    parser.add_argument("--run", type=Path, help="a finished CIFAR-10 run: compares the attacks' strength on its model")
    parser.add_argument("--examples", type=int, default=1024, help="test images for that")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--only-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.only_memory_of:
        memory_of(args, args.only_memory_of)
        return
    record = {"machine": machine(), "net": args.net, "width": args.width, "batch": args.batch}
    print(f"{args.net} width {args.width}, batch {args.batch}; {record['machine']}")
    for part in args.parts:
        record[part] = {"times": times, "others": others, "memory": memory}[part](args)
        write_json(args.output, record)
    if args.run:
        record["strength"] = strength(args)
        write_json(args.output, record)


if __name__ == "__main__":
    main()
