"""The record of an evaluation: accuracies with intervals, per class, protocol with a hash, findings, flags."""

import hashlib
import io
import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genray.evaluation.checks import look_at_numbers
from genray.evaluation.engines import engines_text, not_by_the_package
from genray.evaluation.job import NATURAL, STAGE, Request
from genray.evaluation.results import accuracy
from genray.evaluation.suite import CASCADE, build_evaluation_attack
from genray.evaluation.task_queue import TaskQueue
from genray.tables import Table, TableRow, accuracy_cell, aligned, head_of
from genray.types import ThreatModel, ball_names


def protocol(request: Request, data: dict, num_classes: int, versions: dict) -> dict:
    """The protocol of an evaluation, with a hash over all of it but the versions: equal hashes are comparable.

    `engine` is the engine of AutoAttack's members (and is hashed), `engines` that of each column in each norm.

    Args:
        request: the evaluation.
        data: {"source", "split", "examples"}.
        num_classes: K.
        versions: of the packages.
    """
    threats, engines = [], {}
    for ball, threat in request.balls().items():
        attacks = []
        for name in request.columns(threat.norm):
            _, description = build_evaluation_attack(name, request.settings(ball, num_classes))
            attack = asdict(description)
            engines.setdefault(threat.norm, {})[name] = attack.pop("engine")
            attacks.append(attack)
        threats.append({**threat.record(), "attacks": attacks})
    stated = {"data": data, "threats": threats, "seed": request.seed, "block_size": request.block_size}
    norms = list(dict.fromkeys(threat.norm for threat in request.threats))
    stated |= {"engine": engines_text(request.engine, norms), "num_classes": num_classes}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
    return {**stated, "interval": "95 % Wilson", "hash": digest, "engines": engines, "versions": versions}


def join(queue: TaskQueue) -> dict:
    """(ball, column) -> flags of all examples; `natural` has ball "none", and `aa` is the cascade's last member.

    Where a norm has several radii, the flags say what stands at this radius and at every smaller one.
    """
    flags: dict[tuple[str, str], np.ndarray] = {}
    for ball, attack in queue.column_of:
        if attack == f"{STAGE}{CASCADE[0]}":
            flags[ball, "aa"] = flags[ball, f"{STAGE}{CASCADE[-1]}"] = np.zeros(queue.num_examples, dtype=bool)
        flags.setdefault((ball, attack), np.zeros(queue.num_examples, dtype=bool))
    for task, result in queue.results.items():
        flags[task.ball, task.attack][list(queue.examples(task))] = result.flags[task.attack]
    return flags


def build_record(request, flags, results, labels, model_findings, stated) -> dict:
    """The whole record, without times: the same for any number of workers.

    Args:
        request: the evaluation.
        flags: result of `join`.
        results: task -> `BlockResult`.
        labels: (N,) int64 array.
        model_findings: result of `look_at_model`.
        stated: the `protocol`.
    """
    natural = flags[("none", NATURAL)]
    norms = {}
    for ball in request.balls():
        columns = {name: values for (of, name), values in flags.items() if of == ball}
        rates = {NATURAL: float(natural.mean())} | {name: float(values.mean()) for name, values in columns.items()}
        norms[ball] = {
            "columns": {name: _column(values, labels) for name, values in columns.items()},
            "union": _column(union(flags, ball), labels),
            "findings": look_at_numbers(rates, len(labels)) + _point_findings(results, ball),
        }
    findings = [*model_findings, *_point_findings(results, "none")]
    record = {"natural": _column(natural, labels), "norms": norms, "findings": findings}
    if len({threat.norm for threat in request.threats}) > 1:
        record["union"] = _column(union(flags), labels)
    return {**record, "protocol": stated}


def union(flags, of_ball=None):
    """Examples that are classified correctly and survive every attack in one ball or, without one, in every ball."""
    alive = flags[("none", NATURAL)].copy()
    for (ball, _), values in flags.items():
        if ball != "none" and of_ball in (None, ball):
            alive &= values
    return alive


def _column(values, labels):
    per_class = {str(k): float(values[labels == k].mean()) for k in np.unique(labels)}
    return {**accuracy(values), "per_class": per_class}


def _point_findings(results, ball):
    found = {}
    for task, result in results.items():
        if task.ball == ball:
            for problem in result.problems:
                found.setdefault(f"{task.attack}: {problem}", []).append(task.block)
    return [f"{problem} (blocks {', '.join(map(str, sorted(blocks)))})" for problem, blocks in sorted(found.items())]


def flags_parquet(flags, labels) -> bytes:
    """Per-example flags as a Parquet file: one row an example, one column a ball and attack."""
    columns = {"index": np.arange(len(labels)), "label": labels}
    for (ball, name), values in sorted(flags.items()):
        columns[name if ball == "none" else f"{ball}_{name}"] = values
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def record_table(record: dict, published: dict | None = None) -> str:
    """The record as text: a table a ball, the paper's column order, accuracies in % with intervals below.

    Args:
        record: result of `build_record`.
        published: ball -> {"row": label, "values": {column: per cent}} to print below its accuracies; None: none.
    """
    lines = []
    for ball, threat, part in parts_of(record):
        columns = {NATURAL: record["natural"]}
        columns |= {a["name"]: part["columns"][a["name"]] for a in threat["attacks"]}
        if len(columns) > 2 and "union" in part:
            columns["union"] = part["union"]
        lines.append(f"{ThreatModel.of(threat)}, {_examples(record)}")
        lines += _rows(columns, (published or {}).get(ball))
        lines += [f"  {_saved_text(attack, counts)}" for attack, counts in part.get("images", {}).items()]
        lines += [f"  ! {finding}" for finding in part["findings"]]
        notes = dict.fromkeys(
            note for attack in threat["attacks"] for note in attack["notes"]
        )  # AA repeats its members'
        lines += [f"  note: {note}" for note in (*notes, not_by_the_package(record["protocol"], threat)) if note]
    if "union" in record:
        cell, several = accuracy_cell(record["union"]), len(record["norms"]) > len(largest_balls(record))
        lines.append(
            f"union of all norms{' at their largest radii' * several} and attacks: {cell.number} {cell.between}"
        )
    for norm, columns in curves(record).items():
        lines += _curve_rows(norm, columns) if len(next(iter(columns.values()), ())) > 2 else []
    lines += [f"! {finding}" for finding in record["findings"]]
    lines.append(f"accuracy in % with its 95 % Wilson interval; protocol {record['protocol']['hash']}")
    return "\n".join(lines)


def tables_of(record: dict) -> list[Table]:
    """The record as one table for each ball."""
    tables = []
    for ball, threat, part in parts_of(record):
        title = f"{ThreatModel.of(threat)}, {_examples(record)}"
        columns = {NATURAL: record["natural"], **part["columns"]}
        row = TableRow(("accuracy in %",), tuple(map(accuracy_cell, columns.values())))
        notes = (*part["findings"], *record["findings"])
        tables.append(Table(ball, title, ("",), tuple(map(head_of, columns)), (row,), notes))
    return tables


def _saved_text(attack, counts):
    return (
        f"stored images of {attack}: {counts['stored']}, read back {counts['wrong']} fool the model; rounded to 8 bits "
        f"{counts['wrong_in_8_bits']}, {counts['in_8_bits']} of them in the ball"
    )


def parts_of(record: dict) -> list[tuple[str, dict, dict]]:
    """(name of the ball, its entry in the protocol, its part of the record), in the order of the protocol."""
    threats = record["protocol"]["threats"]
    return [(ball, threat, record["norms"][ball]) for ball, threat in zip(ball_names(threats), threats)]


def largest_balls(record: dict) -> list[tuple[str, dict, dict]]:
    """As `parts_of`, of each norm the ball of the largest radius, which contains the others."""
    return list({threat["norm"]: (ball, threat, part) for ball, threat, part in parts_of(record)}.values())


def curves(record: dict) -> dict[str, dict[str, dict[str, dict]]]:
    """norm -> column -> radius as text -> accuracy with its interval, from the radius 0, which is natural accuracy."""
    found: dict = {}
    for _, threat, part in parts_of(record):
        of_norm = found.setdefault(threat["norm"], {})
        for attack in threat["attacks"]:
            of_column = of_norm.setdefault(attack["name"], {"0": record["natural"]})
            of_column[threat["epsilon"]] = part["columns"][attack["name"]]
    return found


def _curve_rows(norm, columns):
    """A row a radius, each accuracy with its interval."""
    rows = [["epsilon", *columns]]
    for radius in next(iter(columns.values())):
        cells = [accuracy_cell(curve[radius]) for curve in columns.values()]
        rows.append([radius, *(f"{cell.number} {cell.between}" for cell in cells)])
    return [f"{norm}: accuracy over the radius", *(f"  {line}" for line in aligned(rows, str.rjust))]


def _examples(record):
    return f"{record['protocol']['data']['examples']} examples"


def _rows(columns, published):
    cells = [accuracy_cell(value) for value in columns.values()]
    rows = [["", *columns], ["accuracy", *(c.number for c in cells)], ["interval", *(c.between for c in cells)]]
    if published:
        values = published["values"]
        rows.append([published["row"], *(f"{values[c]:.2f}" if c in values else "-" for c in columns)])
    return [f"  {line}" for line in aligned(rows, str.rjust)]
