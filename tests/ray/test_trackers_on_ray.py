"""Trials of a grid on a real Ray, in MLflow."""

import pytest
import yaml

import genray

pytestmark = pytest.mark.ray


def test_trials_of_a_grid_in_mlflow(on_ray, small_run, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'store'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    content = {"set": dict(pair.split("=", 1) for pair in small_run), "seeds": [0, 1], "runtime": "local"}
    content["set"] = {key: yaml.safe_load(value) for key, value in content["set"].items()}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**content, "loggers": ["mlflow"]}))
    trials = genray.tune(tmp_path / "small.yaml", storage=str(tmp_path / "runs"))
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(row["trial"] for row in trials.rows)
    natural = {row["trial"]: row["natural"] for row in trials.rows}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.metrics["test_natural"] == natural[run.info.run_name]
        assert [m.step for m in client.get_metric_history(run.info.run_id, "linf/loss")] == [1, 2, 3]
