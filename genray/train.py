"""`python -m genray.train`. In Python, `genray.train` is the function."""

from genray.cli import run_module

run_module(__name__, "train")
