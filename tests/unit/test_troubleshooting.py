"""docs/troubleshooting.md has every message that the source can give, and gives none that the source has not."""

import re

import pytest
from conftest import ROOT
from messages import ERRORS, messages

import genray.errors
from genray.command_line import run_command

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = messages()


def listed():
    """The messages of the page's tables of messages."""
    inside = False
    for line in PAGE.splitlines():
        inside = line.startswith("| message |") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| message", "|---")):
            yield from re.findall(r"``?(.+?)``?(?=[,;] `|, and| \|| )", line.split(" | ")[0] + " |")


LISTED = list(listed())


def fits(shown, text):
    return re.fullmatch(re.escape(shown).replace("…", ".*"), text.replace("`", ""), re.S) is not None


def test_the_source_is_walked():
    assert len(MESSAGES) > 200 and len(LISTED) > 80
    for text, error in [
        ("…: unknown key…", "ConfigError"),
        ("…: a run of this name exists; choose another with --name, or go on with --resume", "RunFolderError"),
        ("no answer within runtime.stall_timeout_s (… s)", "LostError"),
        ("step_noise: has no effect without tau (it is part of FAT)", "ConfigError"),
    ]:
        assert MESSAGES[text]["error"] == error


def test_every_message_of_the_source_has_a_cure():
    lacking = {
        f"{m['where']}: {text}" for text, m in MESSAGES.items() if not any(fits(shown, text) for shown in LISTED)
    }
    assert lacking == set()


@pytest.mark.parametrize("shown", LISTED)
def test_every_message_of_the_page_is_in_the_source(shown):
    assert any(fits(shown, text) for text in MESSAGES)


def test_every_error_has_its_exit_code():
    rows = dict(re.findall(r"^\| (\d) \| .*? \| (.*) \|$", PAGE, re.M))
    for name in ERRORS:
        assert f"`{name}`" in rows[str(vars(genray.errors)[name].exit_code)]


SAID = [
    (["training.epoch=3"], "training.epoch: unknown key (did you mean epochs?)"),
    (["training.epochs=0"], "training.epochs: expected a whole number at least 1, got 0"),
    (["training.epochs"], "'training.epochs': expected key=value, for example training.epochs=10"),
    (["seed=[1"], "seed: value '[1' is not valid YAML: "),
    (["base_learners.linf.attack.sparsity=0.1"], "base_learners.linf.attack.sparsity: has no effect with norm linf"),
    (["--config", "absent.yaml"], "absent.yaml: cannot be read: No such file or directory"),
    (["base_learners.linf.attack.epsilon=8"], "write 8/255, not 8"),
]


@pytest.mark.parametrize(("argv", "says"), SAID, ids=lambda value: value if isinstance(value, str) else None)
def test_what_is_said_is_what_the_page_lists(argv, says, capsys):
    from genray.train import main, parse_args

    assert run_command(main, parse_args([*argv, "--dry-run"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and any(fits(shown, line.removeprefix("error: ")) for shown in LISTED)
