"""`genray COMMAND ...`, or `python -m genray COMMAND ...`: the commands `python -m genray.COMMAND` under one name."""

import sys
from importlib import import_module

from genray import __version__
from genray.config.model import did_you_mean

COMMANDS = {
    "train": ("genray.cli.train", "train a run: genray train configs/digits.yaml training.epochs=10"),
    "evaluate": ("genray.cli.evaluate", "measure robustness: genray evaluate runs/digits --attacks pgd20,cw"),
    "tune": ("genray.cli.tune", "compare runs: genray tune configs/ablations/mixing_and_interval.yaml"),
    "report": ("genray.cli.report", "tables and plots of what is there: genray report runs"),
    "export": ("genray.cli.export", "a model for other programs: genray export runs/digits --layout onnx"),
    "configs": ("genray.cli.configs", "configurations to begin with: genray configs copy digits"),
    "config": ("genray.cli.config", "JSON Schema and reference of configurations: genray config schema"),
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
        print("\n  genray COMMAND --help says more; genray --version")
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
