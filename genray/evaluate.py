"""`python -m genray.evaluate`. In Python, `genray.evaluate` is the function."""

from genray.cli import run_module

run_module(__name__, "evaluate")
