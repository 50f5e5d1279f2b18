"""`python -m genray.label`. In Python, `genray.label` is the function."""

from genray.cli import run_module

run_module(__name__, "label")
