"""`python -m genray.config`."""

from genray.cli import run_module

run_module(__name__, "config")
