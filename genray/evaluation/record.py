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
from genray.evaluation.job import NATURAL, STAGE, BlockResult, Request, Task
from genray.evaluation.results import accuracy
from genray.evaluation.suite import CASCADE, build_evaluation_attack
from genray.tables import Table, TableRow, accuracy_cell, aligned, head_of
from genray.types import ThreatModel


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
    for threat in request.threats:
        attacks = []
        for name in request.columns(threat.norm):
            _, description = build_evaluation_attack(name, request.settings(threat.norm, num_classes))
            attack = asdict(description)
            engines.setdefault(threat.norm, {})[name] = attack.pop("engine")
            attacks.append(attack)
        threats.append({**threat.record(), "attacks": attacks})
    stated = {"data": data, "threats": threats, "seed": request.seed, "block_size": request.block_size}
    norms = [threat.norm for threat in request.threats]
    stated |= {"engine": engines_text(request.engine, norms), "num_classes": num_classes}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]
    return {**stated, "interval": "95 % Wilson", "hash": digest, "engines": engines, "versions": versions}


def join(results: dict[Task, BlockResult]) -> dict:
    """(norm, column) -> flags of all examples; `natural` has norm "none", and `aa` is the cascade's last member."""
    blocks, cascades = {}, {}
    for task in sorted(results, key=lambda task: task.block):
        if task.examples is None:
            blocks.setdefault((task.norm, task.attack), []).append(results[task].flags[task.attack])
        else:
            cascades.setdefault(task.norm, []).append(task)
    flags = {key: np.concatenate(parts) for key, parts in blocks.items()}
    for norm, stages in cascades.items():
        stood = {f"{STAGE}{member}": np.zeros(len(flags["none", NATURAL]), dtype=bool) for member in CASCADE}
        for task in stages:
            stood[task.attack][list(task.examples)] = results[task].flags[task.attack]
        flags |= {(norm, "aa"): stood[f"{STAGE}{CASCADE[-1]}"]} | {(norm, name): f for name, f in stood.items()}
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
    for threat in request.threats:
        columns = {name: values for (norm, name), values in flags.items() if norm == threat.norm}
        rates = {NATURAL: float(natural.mean())} | {name: float(values.mean()) for name, values in columns.items()}
        norms[threat.norm] = {
            "columns": {name: _column(values, labels) for name, values in columns.items()},
            "union": _column(union(flags, threat.norm), labels),
            "findings": look_at_numbers(rates, len(labels)) + _point_findings(results, threat.norm),
        }
    findings = [*model_findings, *_point_findings(results, "none")]
    record = {"natural": _column(natural, labels), "norms": norms, "findings": findings}
    if len(request.threats) > 1:
        record["union"] = _column(union(flags), labels)
    return {**record, "protocol": stated}


def union(flags, of_norm=None):
    """Examples that are classified correctly and survive every attack in one norm or, without one, in every norm."""
    alive = flags[("none", NATURAL)].copy()
    for (norm, _), values in flags.items():
        if norm != "none" and of_norm in (None, norm):
            alive &= values
    return alive


def _column(values, labels):
    per_class = {str(k): float(values[labels == k].mean()) for k in np.unique(labels)}
    return {**accuracy(values), "per_class": per_class}


def _point_findings(results, norm):
    found = {}
    for task, result in results.items():
        if task.norm == norm:
            for problem in result.problems:
                found.setdefault(f"{task.attack}: {problem}", []).append(task.block)
    return [f"{problem} (blocks {', '.join(map(str, sorted(blocks)))})" for problem, blocks in sorted(found.items())]


def flags_parquet(flags, labels) -> bytes:
    """Per-example flags as a Parquet file: one row an example, one column a norm and attack."""
    columns = {"index": np.arange(len(labels)), "label": labels}
    for (norm, name), values in sorted(flags.items()):
        columns[name if norm == "none" else f"{norm}_{name}"] = values
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def record_table(record: dict, published: dict | None = None) -> str:
    """The record as text: a row a norm, the paper's column order, accuracies in % with intervals below.

    Args:
        record: result of `build_record`.
        published: {"row": label, "values": {column: per cent}} to print below those of linf, or None.
    """
    lines = []
    for threat in record["protocol"]["threats"]:
        norm = threat["norm"]
        columns = {NATURAL: record["natural"]}
        columns |= {a["name"]: record["norms"][norm]["columns"][a["name"]] for a in threat["attacks"]}
        if len(columns) > 2 and "union" in record["norms"][norm]:
            columns["union"] = record["norms"][norm]["union"]
        lines.append(f"{ThreatModel.of(threat)}, {_examples(record)}")
        lines += _rows(columns, published if norm == "linf" else None)
        lines += [f"  ! {finding}" for finding in record["norms"][norm]["findings"]]
        notes = dict.fromkeys(
            note for attack in threat["attacks"] for note in attack["notes"]
        )  # AA repeats its members'
        lines += [f"  note: {note}" for note in (*notes, not_by_the_package(record["protocol"], threat)) if note]
    if "union" in record:
        cell = accuracy_cell(record["union"])
        lines.append(f"union of all norms and attacks: {cell.number} {cell.between}")
    lines += [f"! {finding}" for finding in record["findings"]]
    lines.append(f"accuracy in % with its 95 % Wilson interval; protocol {record['protocol']['hash']}")
    return "\n".join(lines)


def tables_of(record: dict) -> list[Table]:
    """The record as one table for each norm."""
    tables = []
    for threat in record["protocol"]["threats"]:
        part, title = record["norms"][threat["norm"]], f"{ThreatModel.of(threat)}, {_examples(record)}"
        columns = {NATURAL: record["natural"], **part["columns"]}
        row = TableRow(("accuracy in %",), tuple(map(accuracy_cell, columns.values())))
        notes = (*part["findings"], *record["findings"])
        tables.append(Table(threat["norm"], title, ("",), tuple(map(head_of, columns)), (row,), notes))
    return tables


def _examples(record):
    return f"{record['protocol']['data']['examples']} examples"


def _rows(columns, published):
    cells = [accuracy_cell(value) for value in columns.values()]
    rows = [["", *columns], ["accuracy", *(c.number for c in cells)], ["interval", *(c.between for c in cells)]]
    if published:
        values = published["values"]
        rows.append([published["row"], *(f"{values[c]:.2f}" if c in values else "-" for c in columns)])
    return [f"  {line}" for line in aligned(rows, str.rjust)]
