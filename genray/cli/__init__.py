"""The commands: each reads its arguments, calls one function of `genray.api`, and prints what it returned."""

import sys
from importlib import import_module


def run_module(name: str, command: str):
    """Runs a command for `python -m genray.COMMAND`, whose module must not replace the function of that name.

    Raises:
        ImportError: the module is imported and not run.
    """
    if name == "__main__":
        module, parser = import_module(f"genray.cli.{command}"), import_module("genray.cli.parser")
        sys.exit(parser.run_command(module.main, module.parse_args(sys.argv[1:])))
    if name != "__mp_main__":  # a process that multiprocessing starts imports the program's main module
        raise ImportError(f"genray.{command} is a function: import genray, then genray.{command}(...)")
