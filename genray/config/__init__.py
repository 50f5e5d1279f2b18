"""Typed configuration: `load_config` gives a checked, complete `RunConfig`."""

from genray.config.load import (
    DEFAULT_CONFIG,
    listed_overrides,
    load_config,
    load_run,
    to_dict,
    to_yaml,
)
from genray.config.schema import RunConfig

__all__ = [
    "DEFAULT_CONFIG",
    "RunConfig",
    "listed_overrides",
    "load_config",
    "load_run",
    "to_dict",
    "to_yaml",
]
