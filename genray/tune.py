"""`python -m genray.tune`. In Python, `genray.tune` is the function."""

from genray.cli import run_module

run_module(__name__, "tune")
