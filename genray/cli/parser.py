"""What all commands share: one-line errors, exit codes and signals."""

import argparse
import faulthandler
import re
import signal
import sys
import traceback
from pathlib import Path

from genray.config.model import did_you_mean
from genray.console import lasting_output
from genray.errors import ConfigError, GenrayError


class Parser(argparse.ArgumentParser):
    """An argument parser: its help ends with an example, an error is one line with what was probably meant."""

    def __init__(self, example: str = "", prog: str = "", **options):
        program = Path(sys.argv[0])
        if program.name == "genray" or program.parts[-2:] == ("genray", "__main__.py"):
            prog = prog.replace(".", " ")  # called by that name
        super().__init__(epilog=f"example: {example}" if example else None, prog=prog or None, **options)
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def add_allow_option(self):
        """`--allow`, of commands that read configurations or model files; `--network` is its older name."""
        says = "import this code of yours, which a file names: package.module:NAME, or all of a package"
        self.add_argument("--allow", "--network", action="append", default=[], metavar="NAME", help=says)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}{self._meant(message)}\n")

    def _meant(self, message):
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            return did_you_mean(choice[1], [word.strip("'") for word in choice[2].split(", ")])
        option = re.match(r"unrecognized arguments: (--[^ =]+)(.*)", message)
        if not option:
            return ""
        if "." in option[1]:
            return f" (a field is overridden without dashes: {option[1].lstrip('-')}={option[2].lstrip(' =') or '...'})"
        return did_you_mean(option[1], re.findall(r"--[a-z-]+", self.format_help()))


def at_least(least: int):
    """The type of an argument: a whole number from `least` on."""

    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return number


def seconds(text):
    """The type of an argument: a number of seconds above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return float(text)


class Terminated(BaseException):
    """SIGTERM arrived."""


def run_command(main, args) -> int:
    """Calls `main(args)` and turns its outcome into an exit code, with one line an error and no traceback.

    0 done, 1 the run failed, 2 the input was wrong, 130 Ctrl-C, 143 SIGTERM. A process that crashes says by which
    signal and where; a terminal or a log that goes away does not end it.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with lasting_output():
        if not faulthandler.is_enabled():
            faulthandler.enable(2, all_threads=False)
        return _outcome(main, args)


def _outcome(main, args) -> int:
    try:
        _call(main, args)
        return 0
    except GenrayError as error:
        if args.debug:
            traceback.print_exc()
        for line in error.problems if isinstance(error, ConfigError) else [" ".join(str(error).split())]:
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _say_stopped("Ctrl-C", args)
        return 130
    except Terminated:
        _say_stopped("SIGTERM", args)
        return 143
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {message} (--debug shows where)", file=sys.stderr)
        return 1


def _say_stopped(what, args):
    hint = "; --resume goes on from the newest checkpoint" if hasattr(args, "resume") else ""
    print(f"stopped by {what}{hint}", file=sys.stderr)


def _call(main, args):
    if getattr(args, "allow", None):
        from genray.core.user_code import allow_import

        allow_import(*args.allow)
    try:
        main(args)
    except SystemError as error:  # what a signal handler raises inside Ray's compiled code comes out wrapped
        if isinstance(error.__cause__, (Terminated, KeyboardInterrupt)):
            raise error.__cause__ from None
        raise


def _raise_terminated(signum, frame):
    raise Terminated
