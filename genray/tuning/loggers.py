"""Ray's callbacks that log trials to MLflow and wandb: `loggers` of a grid."""

import os
from importlib import import_module
from importlib.util import find_spec

from genray.errors import ConfigError
from genray.tuning.grid import Grid

CALLBACKS = {"mlflow": "MLflowLoggerCallback", "wandb": "WandbLoggerCallback"}


def check_loggers(grid: Grid):
    """Checks that the packages of a grid's loggers are installed.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in grid.file.loggers if find_spec(name) is None]
    if missing:
        raise ConfigError([f"loggers.{name}: {name} is not installed; pip install {name}" for name in missing])


def logger_callbacks(grid: Grid) -> list:
    """Returns a callback for each of the grid's loggers; the grid's name is the default experiment and group."""
    settings = {
        "mlflow": {"experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME", grid.name)},
        "wandb": {
            "project": os.environ.get("WANDB_PROJECT", "genray"),
            "group": os.environ.get("WANDB_RUN_GROUP", grid.name),
        },
    }
    return [_callback(name)(**settings[name]) for name in grid.file.loggers]


def _callback(name):
    return getattr(import_module(f"ray.air.integrations.{name}"), CALLBACKS[name])
