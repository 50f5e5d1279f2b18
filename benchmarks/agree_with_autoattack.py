"""Whether our evaluation says of each example what the authors' AutoAttack, called directly, says of it.

    python benchmarks/agree_with_autoattack.py runs/digits --examples 256 --output agreement.json

For each norm, each member alone and the whole cascade: the share of examples with equal verdicts, and both accuracies.
The direct call gets the seed that our evaluation gives its block, so both start at the same random points; --other-seed
adds a direct call under another seed, to show what chance alone changes. Expected of the first: at least 99 % equal
verdicts and accuracies within 0.5 points.
"""

import argparse
import itertools
import json
import logging
import time
from functools import partial
from pathlib import Path

import torch
from pyautoattack import AutoAttack

import genray
from genray.attacks.auto import PACKAGE_NORMS
from genray.config.values import parse_fraction
from genray.core.allocator import keep_freed_memory
from genray.data.datasets import load_image_data
from genray.evaluation.inputs import RADII
from genray.evaluation.job import Request, run_here
from genray.evaluation.record import join
from genray.evaluation.robust import correct_flags
from genray.evaluation.sources import config_of, data_of
from genray.evaluation.suite import block_seed
from genray.evaluation.task_queue import TaskQueue
from genray.storage import Storage
from genray.types import ThreatModel, fraction_text

# Our column, and what the package calls it.
MEMBERS = {
    "apgd_ce": "apgd-ce", "apgd_dlr": "apgd-dlr", "apgd_t": "apgd-t", "fab_t": "fab-t", "square": "square",
}  # fmt: skip


def direct_flags(model, x, y, norm, epsilon, column, seed):
    """(N,) bool: correct under the authors' package, as its documentation calls it."""
    suite = AutoAttack(model, norm=PACKAGE_NORMS[norm], eps=float(epsilon), seed=seed, device="cpu")
    logging.getLogger("auto-attack").disabled = True
    if column != "aa":
        suite.attacks_to_run = [MEMBERS[column]]
    adversarial, _ = suite.run_standard_evaluation(x.clone(), y, batch_size=len(x))
    with torch.no_grad():
        return model(adversarial).argmax(1) == y


def our_flags(model, images, labels, classes, threat, column, engine):
    """(N,) bool: correct under our evaluation, as `genray.evaluate` runs it."""
    request = Request((threat,), (column,), {}, block_size=len(labels), engine=engine)
    todo = TaskQueue(request, len(labels))
    for task, result in run_here(todo, model, images, labels, classes, "cpu"):
        todo.finish(task, result)
    return torch.from_numpy(join(todo)[threat.norm, column])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--norms", nargs="+", default=["linf", "l2", "l1"])
    parser.add_argument("--columns", nargs="+", default=[*MEMBERS, "aa"])
    parser.add_argument(
        "--epsilon", nargs="+", default=[], metavar="NORM=RADIUS", help="default: the run's, or papers'"
    )
    parser.add_argument("--engines", nargs="+", default=["pyautoattack"], help="of ours: genray, pyautoattack")
    parser.add_argument("--other-seed", action="store_true", help="also a direct call under another seed")
    parser.add_argument("--output", type=Path, help="JSON file; what it holds already is not run again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    config = config_of(Storage(args.run))
    data = load_image_data(**data_of(config))
    test, model = data.test.first(args.examples, "--examples"), genray.load_model(args.run)
    x, y = test.images.float() / 255, test.labels
    first = int(correct_flags(model, x, y).nonzero()[0])
    attack = config.evaluation.attack
    radii = RADII | {attack.norm: attack.epsilon} | dict(pair.split("=") for pair in args.epsilon)
    record = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    for norm, column in itertools.product(args.norms, args.columns):
        threat = ThreatModel(norm, parse_fraction(radii[norm]))
        seeds = {"direct": block_seed(0, column, 0 if column == "aa" else first)}
        seeds |= {"direct, other seed": 12345} if args.other_seed else {}
        ways = {n: partial(direct_flags, model, x, y, norm, threat.epsilon, column, seed) for n, seed in seeds.items()}
        for engine in args.engines:
            ways[engine] = partial(our_flags, model, test.images, y, data.num_classes, threat, column, engine)
        row = record.setdefault(f"{norm} {fraction_text(threat.epsilon)}", {}).setdefault(column, {})
        for name in [name for name in ways if name not in row]:
            began = time.process_time()
            flags = "".join("01"[int(flag)] for flag in ways[name]())
            row[name] = {"standing": flags, "cpu_seconds": round(time.process_time() - began, 1)}
            if args.output:
                args.output.write_text(json.dumps(record, indent=1) + "\n")
        print(_line(norm, threat, column, row), flush=True)


def _line(norm, threat, column, row):
    direct = row["direct"]["standing"]
    text = f"{norm:4} {float(threat.epsilon):8.4f} {column:8} direct {100 * direct.count('1') / len(direct):6.2f} %"
    for engine in [name for name in row if name != "direct"]:
        ours = row[engine]["standing"]
        equal = sum(a == b for a, b in zip(direct, ours)) / len(direct)
        broken, saved = (sum(pair == change for pair in zip(direct, ours)) for change in (("1", "0"), ("0", "1")))
        text += (
            f" | {engine} {100 * ours.count('1') / len(ours):6.2f} %, equal {100 * equal:6.2f} % "
            f"(+{broken} broken, -{saved}), {row['direct']['cpu_seconds'] / row[engine]['cpu_seconds']:.2f}x"
        )
    return text


if __name__ == "__main__":
    main()
