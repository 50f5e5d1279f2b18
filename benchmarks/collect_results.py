"""Collects finished runs into one JSON for `docs/results/`: `python benchmarks/collect_results.py WHAT... > FILE`.

WHAT is a run's folder, a grid's or an earlier FILE, whose trials are kept where the same grid's folder lacks them: a
grid may be run in parts. Kept is what a reader needs to judge and repeat a result: accuracies with intervals,
protocol, seed, versions, time. Of a grid, every trial that has finished so far, with all evaluations in its folder and
its accuracies on held-out training images.
"""

import argparse
import json
from pathlib import Path

import yaml

KEPT = ("models", "protocol", "best_epoch", "seed", "versions", "wall_s")
SHARED = ("protocol", "versions")


def collected(folder: Path) -> dict:
    """One run's record, from its `results.json` and `config.yaml`."""
    results = json.loads((folder / "results.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return {"name": config["name"], "epochs": config["training"]["epochs"], **{key: results[key] for key in KEPT}}


def collected_grid(folder: Path) -> dict:
    """A grid's finished trials."""
    trials = json.loads((folder / "grid.json").read_text())["trials"]
    found = [
        _trial(folder / name, trial) for name, trial in trials.items() if (folder / name / "results.json").exists()
    ]
    return {"grid": folder.name, "trials_in_all": len(trials), "trials": found}


def _trial(folder, trial):
    stated = {key: trial[key] for key in ("method", "point") if trial[key]}
    held_out = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = {**collected(folder), **stated}
    record["held_out"] = next(e["global"] for e in held_out if e["epoch"] == record["best_epoch"])
    files = sorted([*folder.glob("*/results.json"), *folder.glob("evaluations/*/results.json")])
    return record | {str(file.parent.relative_to(folder)): _evaluation(json.loads(file.read_text())) for file in files}


def _evaluation(judged):
    if "splits" in judged:  # of mixtures: the one that was chosen
        return {key: judged[key] for key in ("chosen", "gamma_of")}
    columns = {f"{norm}_{name}": c for norm, part in judged["norms"].items() for name, c in part["columns"].items()}
    without_classes = {
        name: {key: value for key, value in column.items() if key != "per_class"}
        for name, column in {"natural": judged["natural"], **columns}.items()
    }
    return {**without_classes, "protocol": judged["protocol"]["hash"]}


def merged(grids: list[dict]) -> dict:
    """One grid of which each record has some trials; of a trial that several have, the last is kept. What all trials
    share is there once."""
    trials = {}
    for grid in grids:
        for trial in grid["trials"]:
            of_all = {key: grid[key] for key in SHARED if key in grid}
            trials[trial.get("method"), str(trial.get("point")), trial["seed"]] = of_all | trial
    found = sorted(trials.values(), key=lambda trial: trial["name"])
    shared = {key: found[0][key] for key in SHARED if all(t[key] == found[0][key] for t in found)}
    kept = [{key: value for key, value in trial.items() if key not in shared} for trial in found]
    return {key: grids[-1][key] for key in ("grid", "trials_in_all")} | shared | {"trials": kept}


def read(path: Path) -> list[dict]:
    """The records of one argument."""
    if path.is_file():
        return json.loads(path.read_text())
    return [(collected_grid if (path / "grid.json").exists() else collected)(path)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", type=Path, metavar="WHAT", help="folder of a run or of a grid, or a FILE")
    records = [record for path in parser.parse_args().what for record in read(path)]
    names = dict.fromkeys(record["grid"] for record in records if "grid" in record)
    grids = [merged([record for record in records if record.get("grid") == name]) for name in names]
    print(json.dumps([record for record in records if "grid" not in record] + grids, indent=1))
