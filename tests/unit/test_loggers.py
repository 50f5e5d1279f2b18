"""MLflow and Weights & Biases through Ray's own callbacks, and what is said where they are not installed."""

import pytest
import yaml

from genray.cli.parser import run_command
from genray.cli.tune import main, parse_args
from genray.tuning.grid import load_grid

pytest.importorskip("ray", reason="grids run on Ray")

from genray.tuning import loggers, search

GRID = {"set": {"training.epochs": 2}, "name": "logged"}


@pytest.fixture
def grid_file(tmp_path):
    def write(**content):
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump(GRID | content))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("content", "module", "line"),
    [
        ({"loggers": ["mlflow"]}, loggers, "loggers.mlflow: mlflow is not installed; pip install mlflow"),
        ({"loggers": ["wandb"]}, loggers, "loggers.wandb: wandb is not installed; pip install wandb"),
        (
            {"search": "optuna", "choices": {"seed": [1]}},
            search,
            "search: optuna is not installed; pip install 'genray[optuna]', or search: random",
        ),
    ],
)
def test_what_is_not_installed_is_one_line(grid_file, monkeypatch, capsys, tmp_path, content, module, line):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    args = parse_args([grid_file(**content), "--storage", str(tmp_path / "runs")])
    assert run_command(main, args) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "runs").exists()


def test_settings_reach_rays_callbacks(grid_file, monkeypatch):
    made = []
    monkeypatch.setattr(loggers, "_callback", lambda name: lambda **given: made.append((name, given)))
    grid = load_grid(grid_file(loggers=["mlflow", "wandb"]))
    for name in ("MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    loggers.logger_callbacks(grid)
    for name, value in {"MLFLOW_EXPERIMENT_NAME": "e", "WANDB_PROJECT": "p", "WANDB_RUN_GROUP": "g"}.items():
        monkeypatch.setenv(name, value)
    loggers.logger_callbacks(grid)
    assert made == [
        ("mlflow", {"experiment_name": "logged"}),
        ("wandb", {"project": "genray", "group": "logged"}),
        ("mlflow", {"experiment_name": "e"}),
        ("wandb", {"project": "p", "group": "g"}),
    ]
