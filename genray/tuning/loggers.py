"""Ray's own callbacks that tell other programs of the trials: `loggers` of a grid."""

from importlib import import_module
from importlib.util import find_spec

from genray.errors import ConfigError
from genray.tuning.grid import Grid

CALLBACKS = {"mlflow": "MLflowLoggerCallback", "wandb": "WandbLoggerCallback"}


def check_loggers(grid: Grid):
    """Whether the programs that the trials are logged to are installed.

    Raises:
        ConfigError: one is not.
    """
    missing = [name for name in grid.loggers if find_spec(name) is None]
    if missing:
        raise ConfigError([f"loggers.{name}: {name} is not installed; pip install {name}" for name in missing])


def logger_callbacks(grid: Grid) -> list:
    """A callback of Ray's for each of the grid's loggers; the grid's name is that of the experiment or group."""
    default = {"mlflow": {"experiment_name": grid.name}, "wandb": {"project": "genray", "group": grid.name}}
    return [_callback(name)(**default[name] | settings) for name, settings in grid.loggers.items()]


def _callback(name):
    return getattr(import_module(f"ray.air.integrations.{name}"), CALLBACKS[name])
