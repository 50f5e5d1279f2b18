"""Collects finished runs into one JSON for `docs/results/`: `python benchmarks/collect_results.py RUN|GRID... > FILE`.

Keeps what a reader needs to judge and repeat a result: accuracies with intervals, protocol, seed, versions, time. Of a
grid's folder, every trial that has finished so far, with its evaluation and its accuracies on held-out training images.
"""

import argparse
import json
from pathlib import Path

import yaml

KEPT = ("models", "protocol", "best_epoch", "seed", "versions", "wall_s")


def collected(folder: Path) -> dict:
    """One run's record, from its `results.json` and `config.yaml`."""
    results = json.loads((folder / "results.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return {"name": config["name"], "epochs": config["training"]["epochs"], **{key: results[key] for key in KEPT}}


def collected_grid(folder: Path) -> dict:
    """A grid's finished trials. What all of them share is there once."""
    trials = json.loads((folder / "grid.json").read_text())["trials"]
    found = [
        _trial(folder / name, trial) for name, trial in trials.items() if (folder / name / "results.json").exists()
    ]
    shared = {key: found[0][key] for key in ("protocol", "versions") if all(t[key] == found[0][key] for t in found)}
    for trial in found:
        for key in shared:
            del trial[key]
    return {"grid": folder.name, "trials_in_all": len(trials), **shared, "trials": found}


def _trial(folder, trial):
    stated = {key: trial[key] for key in ("method", "point") if trial[key]}
    held_out = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = {**collected(folder), **stated}
    record["held_out"] = next(e["global"] for e in held_out if e["epoch"] == record["best_epoch"])
    evaluation = folder / "evaluation" / "results.json"
    if evaluation.exists():
        judged = json.loads(evaluation.read_text())
        columns = {f"{norm}_{name}": c for norm, part in judged["norms"].items() for name, c in part["columns"].items()}
        columns = {"natural": judged["natural"], **columns}
        without_classes = {
            name: {key: value for key, value in column.items() if key != "per_class"}
            for name, column in columns.items()
        }
        record["evaluation"] = {**without_classes, "protocol": judged["protocol"]["hash"]}
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN|GRID", help="folder of a finished run or of a grid"
    )
    folders = parser.parse_args().folders
    print(json.dumps([(collected_grid if (f / "grid.json").exists() else collected)(f) for f in folders], indent=1))
