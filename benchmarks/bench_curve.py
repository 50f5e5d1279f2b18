"""One evaluation at several radii beside one at each radius: time, and every image with another verdict.

    python benchmarks/bench_curve.py runs/digits --attacks pgd20,aa
    python benchmarks/bench_curve.py runs/digits --attacks standard --examples 120 --rounds 1 \
        --epsilon linf=0.05:0.1:0.15:0.2:0.25:0.3,l2=0.25:0.5:0.75:1:1.25:1.5,l1=1:2:3:4:5:6

Both have the same seed and blocks and take turns. An image stands in the separate evaluations if it stands in those of
the radius and of every smaller one. "saved" counts images that stand in the curve and not there, "broken" the reverse.
PGD draws random numbers for each image, so there are none. Members of AutoAttack draw for a batch, and which images are
in one depends on what fell before; "alone" counts what falls at a radius and stands at a larger one in separate
evaluations, which is as much a matter of chance.
"""

import argparse
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from common import interleave, machine, paired, text_of, write_json

import genray
from genray.evaluation.inputs import given_by_norm

EPSILON = "linf=0.05:0.1:0.15:0.2:0.25:0.3,l2=0.25:0.5:1:1.5:2:2.5,l1=1:2:4:6:8:10"
NORMS = ("linf", "l2", "l1")


def measured(model, x, y, args, epsilon):
    """Flags of one evaluation: column of `results.parquet` -> (N,) bool."""
    with tempfile.TemporaryDirectory() as folder:
        how = {"attacks": args.attacks, "norms": [*epsilon], "engine": args.engine, "seed": args.seed}
        genray.evaluate(model, x, y, epsilon=epsilon, output=folder, **how)
        table = pq.read_table(Path(folder) / "results.parquet")
        return {name: table[name].to_numpy() for name in table.column_names if name not in ("index", "label")}


def differences(epsilon, curve, alone):
    """Columns of the curve -> saved, broken, alone; and how many verdicts were compared."""
    found, verdicts = {}, 0
    for norm, radii in epsilon.items():
        for column in sorted(name.removeprefix(f"{norm}_") for name in alone[0] if name.startswith(f"{norm}_")):
            if column.startswith("aa_"):
                continue
            stand, before = curve["natural"], curve["natural"]
            for at, radius in enumerate(radii):
                now, ours = alone[at][f"{norm}_{column}"], curve[f"{norm}_{radius}_{column}"]
                stand = stand & now
                counts = (ours & ~stand, stand & ~ours, now & ~before)
                found[f"{norm} {radius} {column}"] = dict(
                    zip(("saved", "broken", "alone"), (int(c.sum()) for c in counts)), standing=int(ours.sum())
                )
                before, verdicts = now, verdicts + len(ours)
    return found, verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--attacks", default="standard")
    parser.add_argument("--epsilon", default=EPSILON, help="as many radii of each norm, as the command takes them")
    parser.add_argument("--engine", default=None)
    parser.add_argument("--examples", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", help="file for the record")
    args = parser.parse_args()
    model = genray.load_model(args.run)
    x, y = (part[: args.examples] for part in genray.test_images(args.run))
    epsilon = given_by_norm("--epsilon", args.epsilon, NORMS)
    single = [dict(zip(epsilon, radii)) for radii in zip(*epsilon.values(), strict=True)]
    flags = {}

    def together():
        flags["curve"] = measured(model, x, y, args, epsilon)

    def apart():
        flags["alone"] = [measured(model, x, y, args, radii) for radii in single]

    seconds = interleave({"curve": together, "alone": apart}, args.rounds, warm_up=0)
    ratio = paired(seconds["curve"], seconds["alone"])
    found, verdicts = differences(epsilon, flags["curve"], flags["alone"])
    for name, of in found.items():
        print(f"{name:24} {of['standing']:5} stand, {of['saved']} saved, {of['broken']} broken, alone {of['alone']}")
    total = {key: sum(of[key] for of in found.values()) for key in ("saved", "broken", "alone")}
    print(
        f"curve {text_of(ratio)} of the time of {len(single)} evaluations ({seconds}); {total} of {verdicts} verdicts"
    )
    if args.json:
        write_json(args.json, {"ratio": ratio, "seconds": seconds, "differences": found, "machine": machine()})


if __name__ == "__main__":
    main()
