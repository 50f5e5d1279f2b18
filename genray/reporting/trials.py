"""The results of a grid: one row a trial, mean and spread over seeds, as files and as tables."""

import csv
import io
import json
import statistics
from dataclasses import dataclass
from typing import Any

from genray import records
from genray.errors import RunFolderError
from genray.evaluation.job import STAGE
from genray.evaluation.suite import COLUMNS
from genray.storage import Storage
from genray.tables import Cell, Table, TableRow, as_markdown, cell_of, head_of
from genray.tuning.grid import RECORD, short_names, stated_trials
from genray.types import NORMS

METHOD = "method"


@dataclass(frozen=True)
class Trials:
    """Attributes:
    name: of the grid.
    rows: one dict a trial: trial, method, seed, status, the grid's keys, then numbers (accuracies are fractions).
    keys: the grid's keys.
    measures: names of the accuracies, in the order of the tables.
    about: what was measured, in words.
    """

    name: str
    rows: list[dict]
    keys: tuple[str, ...]
    measures: tuple[str, ...]
    about: str

    def place_of(self, row: dict) -> str:
        """Returns the method and the grid values of a row, as text."""
        parts = [row[METHOD], *(f"{short}={row[key]}" for short, key in zip(short_names(self.keys), self.keys))]
        return " ".join(part for part in parts if part) or self.name


def read_trials(folder: Any) -> Trials:
    """Reads all runs of a grid folder, finished or not.

    Args:
        folder: path, URI or `Storage`.

    Raises:
        RunFolderError: it is not the folder of a grid.
    """
    storage = Storage(folder)
    if not storage.exists(RECORD):
        raise RunFolderError(f"{storage}: expected the folder of a grid, with {RECORD} in it; it is not there")
    try:
        stated = stated_trials(storage)
    except records.Damaged as error:
        raise RunFolderError(f"{storage}: expected the folder of a grid: {error}") from None
    keys = tuple(dict.fromkeys(key for trial in stated.values() for key in trial["point"]))
    rows, measures, about = [], {}, ""
    for name, trial in stated.items():
        row = {"trial": name, METHOD: trial["method"], "seed": trial["seed"], "status": "not started"}
        row |= {key: _cell(trial["point"].get(key)) for key in keys}
        found, text = _numbers(storage, name, data_name(trial["config"]["data"]))
        about = text or about
        measures |= dict.fromkeys(key for key in found if key not in ("best_epoch", "wall_s", "status"))
        rows.append(row | found)
    return Trials(storage.name, rows, keys, tuple(sorted(measures, key=_in_the_papers_order)), about)


def _in_the_papers_order(measure):
    norm, _, column = measure.rpartition("/")
    known = ("natural", *COLUMNS)
    last = measure == "union"
    return last, NORMS.index(norm) if norm in NORMS else -1, known.index(column) if column in known else len(known)


def data_name(data: dict) -> str:
    """Returns the name of the images: that of their folder where the source is only a file format."""
    folder = str(data.get("path") or "").partition("?")[0].rstrip("/").rpartition("/")[2]
    return folder if data["source"] in ("parquet", "image_folder") and folder else data["source"]


def _cell(value):
    return value if value is None or isinstance(value, (int, float, str)) else json.dumps(value)


def _numbers(storage, name, data):
    """(accuracies of theta_g and the state of the run, what was measured)."""
    if not storage.exists(f"{name}/results.json"):
        begun = storage.exists(f"{name}/config.yaml")
        return {"status": "unfinished" if begun else "not started"}, ""
    try:
        results = records.read(records.RunResults, storage, f"{name}/results.json")
        numbers = {attack: record["value"] for attack, record in results["models"]["global"].items()}
        protocol = results["protocol"]
        about = f"{protocol['examples']} test images of {data}, {protocol['threat_model']}"
        if storage.exists(f"{name}/evaluation/results.json"):
            judged = records.read(records.EvaluationRecord, storage, f"{name}/evaluation/results.json")
            numbers = {"natural": judged["natural"]["value"]}
            for norm, part in judged["norms"].items():
                several = len(judged["norms"]) > 1
                columns = {c: r["value"] for c, r in part["columns"].items() if not c.startswith(STAGE)}
                columns |= {"union": part["union"]["value"]} if several and part.get("union") else {}
                numbers |= {f"{norm}/{c}" if several else c: value for c, value in columns.items()}
            numbers |= {"union": judged["union"]["value"]} if judged.get("union") else {}
            stated = judged["protocol"]
            radii = ", ".join(f"{threat['norm']} {threat['epsilon']}" for threat in stated["threats"])
            about = f"{stated['data']['examples']} test images of {data}, {radii}, engine {stated['engine']}"
        ended = {"status": "finished", "best_epoch": results["best_epoch"], "wall_s": results["wall_s"]}
        return numbers | ended, about
    except records.Damaged:
        return {"status": "damaged results.json"}, ""


def groups(trials: Trials) -> list[dict]:
    """Computes mean and sample standard deviation over seeds: one dict a place in the grid.

    Returns:
        [{"method", each key, "seeds": n, measure: (mean, std or None)}], in the order of the trials.
    """
    places = {}
    for row in trials.rows:
        place = (row[METHOD], *(row[key] for key in trials.keys))
        places.setdefault(place, []).append(row)
    found = []
    for place, rows in places.items():
        done = [row for row in rows if row["status"] == "finished"]
        group = {METHOD: place[0], **dict(zip(trials.keys, place[1:])), "seeds": len(done)}
        for measure in trials.measures:
            values = [row[measure] for row in done if measure in row]
            spread = statistics.stdev(values) if len(values) > 1 else None
            group[measure] = (statistics.fmean(values), spread) if values else None
        found.append(group)
    return found


def trials_csv(trials: Trials) -> bytes:
    """Returns a CSV file: one row a trial; accuracies are fractions."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in trials.rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(trials.rows)
    return text.getvalue().encode()


def varying(trials: Trials) -> list[str]:
    """Returns the keys of the grid, `method` among them, with more than one value."""
    return [key for key in (METHOD, *trials.keys) if len({row[key] for row in trials.rows}) > 1]


def trials_table(trials: Trials) -> Table:
    """Returns a table in the papers' layout: a row a method or place, per cent, mean and deviation over seeds."""
    rows = groups(trials)
    with_method = [METHOD] if any(row[METHOD] for row in rows) else []
    places, heads = [*with_method, *trials.keys], [*with_method, *short_names(trials.keys)]
    lines = [
        TableRow(
            tuple(str(row[place]) for place in places) or (trials.name,),
            tuple(cell_of(*row[measure]) if row[measure] else Cell() for measure in trials.measures),
        )
        for row in rows
    ]
    columns = tuple(head_of(measure) for measure in trials.measures)
    return Table(
        f"grid_{trials.name}",
        f"Grid {trials.name}",
        tuple(heads) or ("grid",),
        columns,
        tuple(lines),
        (_legend(trials),),
    ).ranked()


def markdown(trials: Trials) -> str:
    table = trials_table(trials)
    return "\n".join([as_markdown(table), *table.notes]) + "\n"


def _legend(trials):
    done = sum(row["status"] == "finished" for row in trials.rows)
    seeds = ", ".join(map(str, sorted({row["seed"] for row in trials.rows})))
    spread = f"mean ± standard deviation over seeds {seeds}" if "," in seeds else f"seed {seeds}"
    return (
        f"Accuracy of theta_g in %, {spread}; {trials.about}; {done} of {len(trials.rows)} trials finished. "
        "Best in bold, second best underlined."
    )
