"""docs/records.md has every field of the records, and files hold what it says."""

import pyarrow.parquet as pq
import torch
from conftest import ROOT

import genray
from genray import records
from genray.cli.config import RECORDS, RECORDS_HEAD
from genray.config.reference import fields_page
from genray.models import build_model


def test_the_page_is_up_to_date():
    page = (ROOT / "docs/records.md").read_text(encoding="utf-8")
    assert page == fields_page(RECORDS_HEAD, RECORDS), "run: python -m genray.config records > docs/records.md"
    assert page.count("in results.json of a run\n") >= 4 and "| `waiting_seconds` | a finite number |" in page


def test_every_field_has_a_meaning():
    seen, todo = set(), [*RECORDS.values()]
    while todo:
        model = todo.pop()
        seen.add(model)
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            todo += [found for found in named_in(field.annotation) if found not in seen]
    assert {records.AttackRecord, records.LearnerEpoch, records.AccuracyRecord} <= seen


def named_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, records.Record):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in named_in(part)]


def test_rows_of_results_parquet_are_such_records(tmp_path):
    model = build_model("small_cnn", num_classes=10, in_channels=1, image_size=(8, 8), width=4, seed=0)
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    genray.evaluate(model, images, labels, attacks=["pgd20"], norms=["linf", "l2"], output=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "results.parquet")
    rows = [records.check(records.ImageRow, row) for row in table.to_pylist()]
    assert [(row["index"], row["label"]) for row in rows] == [(i, i) for i in range(6)]
    assert set(table.column_names) - set(records.ImageRow.model_fields) == {"linf_pgd20", "l2_pgd20"}
