"""`python -m genray.report`. In Python, `genray.report` is the function."""

from genray.cli import run_module

run_module(__name__, "report")
