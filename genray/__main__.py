"""`genray COMMAND ...`, or `python -m genray COMMAND ...`: the commands `python -m genray.COMMAND` under one name."""

import sys
from importlib import import_module

from genray import __version__
from genray.config.model import did_you_mean

COMMANDS = {
    "train": ("genray.cli.train", "train a run"),
    "evaluate": ("genray.cli.evaluate", "measure the robustness of a run or of any model file"),
    "tune": ("genray.cli.tune", "compare runs: a grid of them"),
    "report": ("genray.cli.report", "tables and plots of what is there"),
    "export": ("genray.cli.export", "a model for other programs"),
    "label": ("genray.cli.label", "a model's labels of images, as training data"),
    "configs": ("genray.cli.configs", "configurations to begin with: list, copy, init"),
    "config": ("genray.cli.config", "JSON Schema and reference of configurations"),
}


def main(argv=None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    if name in ("-V", "--version"):
        print(f"genray {__version__}")
        return 0
    if name in ("-h", "--help"):
        print("usage: genray COMMAND ...\n")
        print("\n".join(f"  {command:<10}{what}" for command, (_, what) in COMMANDS.items()))
        print("\n  genray COMMAND --help says more, with an example; genray --version")
        return 0 if argv else 2
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"genray: error: expected a command of {', '.join(COMMANDS)}, got {name!r}{hint}", file=sys.stderr)
        return 2
    from genray.cli.parser import run_command

    module = import_module(COMMANDS[name][0])
    return run_command(module.main, module.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
