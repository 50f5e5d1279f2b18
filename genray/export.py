"""`python -m genray.export`. In Python, `genray.export` is the function."""

from genray.cli import run_module

run_module(__name__, "export")
