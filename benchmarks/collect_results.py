"""Collects finished runs into one JSON for `docs/results/`: `python benchmarks/collect_results.py RUN... > FILE`.

Keeps what a reader needs to judge and repeat a result: accuracies with intervals, protocol, seed, versions, time.
"""

import argparse
import json
from pathlib import Path

import yaml


def collected(folder: Path) -> dict:
    """One run's record, from its `results.json` and `config.yaml`."""
    results = json.loads((folder / "results.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    kept = ("models", "protocol", "best_epoch", "seed", "versions", "wall_s")
    return {"name": config["name"], "epochs": config["training"]["epochs"], **{key: results[key] for key in kept}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    print(json.dumps([collected(folder) for folder in parser.parse_args().runs], indent=1))
