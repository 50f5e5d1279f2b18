"""Folders of an older version (`tests/data/old_run`) are gone on with, evaluated and shown."""

import json
import shutil

import pytest
import yaml
from conftest import ROOT, described, run_outcome, undescribed

import genray
from genray import records
from genray.config import load_config
from genray.data.datasets import load_image_data
from genray.reporting.found import find
from genray.storage import Storage

OLD = ROOT / "tests/data/old_run"


def test_records_hold_what_is_described(old):
    for name, model in {
        "finished/digits/results.json": records.RunResults,
        "half/digits/metrics.jsonl": records.EpochRecord,
        "half/digits/data.json": records.DataRecord,
        "finished/digits/evaluation/results.json": records.EvaluationRecord,
        "finished/digits/evaluation/request.json": records.EvaluationRequest,
        "finished/digits/mixtures/results.json": records.MixtureResults,
        "grid/grid.json": records.GridRecord,
    }.items():
        assert described(model, old / name)
    newer = json.loads((old / "finished/digits/results.json").read_text()) | {"of_the_future": [1]}
    assert records.check(records.RunResults, newer) is newer
    assert list(undescribed(records.RunResults.model_validate(newer))) == [".of_the_future"]


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(OLD, tmp_path / "old")


@pytest.mark.slow
def test_a_run_is_gone_on_with(old, tmp_path):
    config = load_config(yaml.safe_load((old / "half/digits/config.yaml").read_text()))
    epochs = []
    for storage, resume in ((old / "half", True), (tmp_path / "new", False)):
        genray.train(config, runtime="local", storage=str(storage), resume=resume, on_epoch=epochs.append)
    assert [record["epoch"] for record in epochs] == [3, 4, 1, 2, 3, 4]
    (records_then, weights_then, models_then) = run_outcome(old / "half/digits")
    (records_now, weights_now, models_now) = run_outcome(tmp_path / "new/digits")
    losses = [
        [[r["learners"][n]["loss"] for n in config.base_learners] for r in of] for of in (records_then, records_now)
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    if losses[0][:2] == losses[1][:2]:  # on a CPU that rounds as the one that made the old epochs
        assert (weights_then, models_then) == (weights_now, models_now)
        assert losses[0] == losses[1]
    assert described(records.RunResults, tmp_path / "new/digits/results.json")
    assert described(records.EpochRecord, tmp_path / "new/digits/metrics.jsonl")


def test_a_model_is_evaluated_and_an_evaluation_gone_on_with(old, tmp_path):
    folder = old / "finished/digits"
    before = records.read(records.EvaluationRecord, Storage(folder / "evaluation"), "results.json")
    model, test = genray.load_model(folder), load_image_data("digits", test_examples=40).test
    asked = {"attacks": "pgd20", "data": {"source": "digits", "split": "test"}}
    again = genray.evaluate(model, test.images, test.labels, **asked, output=str(tmp_path / "again"))
    assert 0 < again["norms"]["linf"]["columns"]["pgd20"]["value"] < again["natural"]["value"]
    (folder / "evaluation/results.json").unlink()
    gone_on = genray.evaluate(model, test.images, test.labels, **asked, output=str(folder / "evaluation"), resume=True)
    for record in (again, gone_on):
        assert {key: record[key] for key in ("natural", "norms")} == {key: before[key] for key in ("natural", "norms")}
    assert described(records.EvaluationRecord, tmp_path / "again/results.json")
    assert described(records.EvaluationRequest, tmp_path / "again/request.json")


def test_everything_is_read_and_shown(old):
    found = find([str(old)])
    assert sorted(reason.partition(":")[0].partition(",")[0] for _, reason in found.problems) == [
        "4 of 4 trials have not started", "unfinished",
    ]  # fmt: skip
    assert [len(run.records) for run in found.runs] == [4, 3] and found.runs[0].results["best_epoch"]
    assert [len(trials.rows) for _, trials in found.grids] == [4]
    (evaluation,), (study,) = found.evaluations, found.studies
    assert evaluation.owner.path == found.runs[0].path and list(study.results["splits"]) == ["validation", "test"]
    assert json.loads((OLD / "grid/grid.json").read_text())["trials"].keys() == {
        r["trial"] for r in found.grids[0][1].rows
    }
