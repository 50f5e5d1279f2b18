"""Ray's callbacks that log trials to MLflow and wandb: `loggers` of a grid."""

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
    missing = [name for name in _settings(grid) if find_spec(name) is None]
    if missing:
        raise ConfigError([f"loggers.{name}: {name} is not installed; pip install {name}" for name in missing])


def logger_callbacks(grid: Grid) -> list:
    """A callback for each of the grid's loggers; the grid's name is the name of the experiment or group."""
    default = {"mlflow": {"experiment_name": grid.name}, "wandb": {"project": "genray", "group": grid.name}}
    return [_callback(name)(**default[name] | settings) for name, settings in _settings(grid).items()]


def _callback(name):
    return getattr(import_module(f"ray.air.integrations.{name}"), CALLBACKS[name])


def _settings(grid):
    return grid.file.loggers.model_dump(exclude_unset=True)
