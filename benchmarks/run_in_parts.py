"""Trains and evaluates one preset in calls of limited length, for a machine that is lent for minutes.

    python benchmarks/run_in_parts.py configs/cifar10_resnet18_anchored.yaml data.source=cifar10 --output parts
    python benchmarks/run_in_parts.py configs/digits.yaml --output parts --minutes 1                 # try it on a CPU

Every call goes on where the last one stopped: training from its newest checkpoint, the evaluation at its first missing
block. What a call needs and leaves is in --output; take the folder to the next machine. A call ends within --minutes,
with exit code 3 while there is more to do and 0 when all is done: then `NAME.json` and `NAME.md` are there, for
`docs/results/`.
Wrong input exits with 2, a failed run with 1.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from collect_results import collected

from genray.config.load import load_config
from genray.errors import GenrayError

TO_END = 25  # seconds that a stopped command gets for its last checkpoint or block, before the call's own end


class OutOfTime(Exception):
    pass


def call(arguments: list[str], deadline: float):
    """Runs one command of genray, and stops it as an operator would when the time is over.

    Raises:
        OutOfTime: it was stopped; the next call goes on.
        SystemExit: it failed, with its exit code.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTime
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    try:
        code = process.wait(left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise OutOfTime from None
    if code:
        raise SystemExit(code)


def page(run: dict, evaluation: dict, command: str) -> str:
    """Markdown of one run: the models with 95 % intervals, then the attacks on theta_g."""

    def row(name, columns):
        cells = (f"{100 * c['value']:.2f} [{100 * c['low']:.2f}, {100 * c['high']:.2f}]" for c in columns.values())
        return f"| {name} | {' | '.join(cells)} |"

    def table(rows: dict):
        names = list(next(iter(rows.values())))
        head = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        return head + [row(name, columns) for name, columns in rows.items()]

    what = f"Seed {run['seed']}, {run['epochs']} epochs, one run. In % with 95 % intervals."
    lines = [f"# {run['name']}", "", what, ""]
    attacked = {"natural": evaluation["natural"]}
    for norm, record in evaluation["norms"].items():
        attacked |= {f"{norm} {name}": accuracy for name, accuracy in record["columns"].items()}
    lines += [*table(run["models"]), "", "The saved theta_g under the attacks of `genray.evaluate`:", ""]
    lines += [*table({"theta_g": attacked}), "", "    " + command, ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a preset or any configuration file")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run, its evaluation and the result")
    parser.add_argument("--minutes", type=float, default=9, help="length of one call (default 9)")
    parser.add_argument("--attacks", default="aa", help="columns of genray.evaluate (default aa)")
    parser.add_argument("--engine", default="genray", help="genray, genray-bf16 or autoattack (default genray)")
    parser.add_argument("--examples", help="number of test images to attack (default all)")
    asked = parser.parse_args()
    deadline = time.monotonic() + 60 * asked.minutes - TO_END
    try:
        name = load_config(asked.config, asked.overrides).name
    except GenrayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run, evaluation = asked.output / name, asked.output / f"{name}_evaluation"
    training = ["genray.train", "--config", asked.config, "--runtime", "local", "--storage", str(asked.output)]
    attacking = ["genray.evaluate", str(run), "--attacks", asked.attacks, "--engine", asked.engine]
    attacking += ["--output", str(evaluation), "--resume", *(["--examples", asked.examples] if asked.examples else [])]
    attacking += [f"--data={o.partition('=')[2]}" for o in asked.overrides if o.startswith("data.path=")]
    try:
        if not (run / "results.json").exists():
            call([*training, "--resume", *asked.overrides], deadline)
        call(attacking, deadline)
    except OutOfTime:
        print(f"{asked.minutes:g} minutes are over; the same command goes on", flush=True)
        sys.exit(3)
    record = json.loads((evaluation / "results.json").read_text())
    results = collected(run)
    command = f"python benchmarks/run_in_parts.py {' '.join(sys.argv[1:])}"
    (asked.output / f"{name}.json").write_text(json.dumps({"run": results, "evaluation": record}, indent=1) + "\n")
    (asked.output / f"{name}.md").write_text(page(results, record, command))
    print(f"done: {asked.output / name}.json and .md")


if __name__ == "__main__":
    main()
