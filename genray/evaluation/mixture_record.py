"""The natural/robust curve of a run's mixtures as a record, a table and a CSV."""

import csv
import io

from genray.evaluation.pareto import pareto
from genray.reporting.table import Cell, Table, TableRow, cell_of, head_of, one_line
from genray.types import fraction_text

CHOSEN_ON = "validation"


def build_row(kind: str, name: str, weights: dict | None, record: dict) -> dict:
    """One evaluated model.

    Args:
        kind: "mixture", "base learner" or "theta_g".
        name: what tables call it.
        weights: learner -> exact weight, for a mixture.
        record: what `genray.evaluate` gave.
    """
    columns = {  # not the members of the cascade, whose last is `aa`
        threat["norm"]: {a["name"]: record["norms"][threat["norm"]]["columns"][a["name"]] for a in threat["attacks"]}
        for threat in record["protocol"]["threats"]
    }
    lowest = min((value for by_name in columns.values() for value in by_name.values()), key=lambda v: v["value"])
    findings = list(record["findings"]) + [f for values in record["norms"].values() for f in values["findings"]]
    return {
        "kind": kind,
        "name": name,
        "weights": weights and {learner: fraction_text(weight) for learner, weight in weights.items()},
        "natural": _plain(record["natural"]),
        "columns": {norm: {name: _plain(v) for name, v in by_name.items()} for norm, by_name in columns.items()},
        "robust": _plain(record.get("union") or next(iter(record["norms"].values())).get("union", lowest)),
        "findings": findings,
    }


def _plain(accuracy):
    return {key: accuracy[key] for key in ("value", "low", "high", "examples")}


def mark_pareto(rows: list[dict]):
    """Says of each mixture whether no other mixture is at least as good in both accuracies and better in one."""
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    front = pareto([_both(row) for row in mixtures])
    for row in mixtures:
        row["pareto"] = _both(row) in front


def choose(rows: list[dict]) -> str:
    """Name of the mixture with the largest natural + robust accuracy; of equals the more robust, then the first."""
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    return max(mixtures, key=lambda row: (round(sum(_both(row)), 9), row["robust"]["value"]))["name"]


def _both(row):
    return row["natural"]["value"], row["robust"]["value"]


def curve_table(results: dict, split: str) -> str:
    """One split's rows as text: accuracies in % with their intervals, with the split, the protocol and what marks mean.

    Args:
        results: the whole record.
        split: of `results["splits"]`.
    """
    part = results["splits"][split]
    protocol, rows = part["protocol"], part["rows"]
    names = [(norm, column) for norm, by_name in rows[0]["columns"].items() for column in by_name]
    threats = ", ".join(f"{t['norm']} {t['epsilon']} ({t['epsilon_decimal']:.6g})" for t in protocol["threats"])
    single = len(results["norms"]) == 1
    heads = ["", "model", "natural", *(column if single else f"{norm} {column}" for norm, column in names)]
    heads += ["robust"] if len(names) > 1 else []
    lines = [heads]
    for row in rows:
        cells = [row["natural"], *(row["columns"][norm][column] for norm, column in names)]
        cells += [row["robust"]] if len(names) > 1 else []
        lines.append([_marks(row, results), row["name"], *map(_cell, cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    title = f"{results['data']}, {protocol['data']['examples']} {split} images; {threats}; {_batch_norm(results)}"
    findings = [f"! {row['name']}: {finding}" for row in rows for finding in row["findings"]]
    return "\n".join([title, *text, *findings, *_notes(results, split, len(names))])


def _batch_norm(results):
    words = {"mix": "mixed", "reestimate": "re-estimated"}
    return f"BatchNorm statistics {words[results['batch_norm']]}"


def _marks(row, results):
    return "P" * row.get("pareto", False) + "*" * (row["name"] == results["chosen"])


def _notes(results, split, num_columns):
    notes = ["accuracy in % with its 95 % Wilson interval; P: Pareto-optimal among the mixtures on these images"]
    if num_columns > 1:
        several = len(results["norms"]) > 1
        notes.append(
            "robust: " + ("survives every attack in every norm" if several else "the lowest column of the row")
        )
    if results["chosen"]:
        notes.append(
            f"*: largest natural + robust accuracy on the {CHOSEN_ON} images; nothing is chosen on test images"
        )
    elif split == "test":
        notes.append(
            f"a mixture picked from this table is picked on test images; --split {CHOSEN_ON},test picks honestly"
        )
    if results["theta_g_selected_on"] == "test":
        notes.append("NOTE: theta_g's epoch was chosen on the test images (evaluation.select_on: test)")
    return notes


def _cell(accuracy):
    return f"{100 * accuracy['value']:6.2f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"


def study_table(results: dict, split: str, name: str) -> Table:
    """The same as a table of a report.

    Args:
        name: of the table's files.
    """
    part = results["splits"][split]
    protocol, rows = part["protocol"], part["rows"]
    names = list(dict.fromkeys((norm, column) for row in rows for norm, of in row["columns"].items() for column in of))
    threats = ", ".join(f"{t['norm']} {t['epsilon']} ({t['epsilon_decimal']:.6g})" for t in protocol["threats"])
    lines = []
    for row in rows:
        accuracies = [row["natural"], *(row["columns"].get(norm, {}).get(column) for norm, column in names)]
        accuracies += [row["robust"]] * (len(names) > 1)
        cells = tuple(cell_of(a["value"], None, a["low"], a["high"]) if a else Cell() for a in accuracies)
        lines.append(TableRow((row["name"], _marks(row, results)), cells))
    heads = [head_of(column if len(results["norms"]) == 1 else f"{norm}/{column}") for norm, column in names]
    title = f"{results['run']}: {protocol['data']['examples']} {split} images of {results['data']}, {threats}"
    findings = (f"CAUTION: {row['name']}: {finding}" for row in rows for finding in row["findings"])
    notes = (_batch_norm(results), *_notes(results, split, len(names)), *findings)
    heads = ("NAT", *heads, *["robust"] * (len(names) > 1))
    return Table(name, one_line(title), ("model", "marks"), heads, tuple(lines), notes).ranked()


def curve_csv(results: dict) -> str:
    """One line a split, model and column."""
    learners = results["learners"]
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    heads = ["split", "kind", "model", *(f"weight_{name}" for name in learners), "norm", "column"]
    out.writerow([*heads, "accuracy", "low", "high", "examples", "pareto", "chosen"])
    for split, part in results["splits"].items():
        for row in part["rows"]:
            weights = [(row["weights"] or {}).get(name, "") for name in learners]
            marks = [int(row.get("pareto", False)), int(row["name"] == results["chosen"])]
            cells = [("", "natural", row["natural"])]
            cells += [(norm, name, v) for norm, by_name in row["columns"].items() for name, v in by_name.items()]
            for norm, column, accuracy in [*cells, ("", "robust", row["robust"])]:
                out.writerow([split, row["kind"], row["name"], *weights, norm, column, *accuracy.values(), *marks])
    return buffer.getvalue()
