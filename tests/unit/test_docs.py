"""Every command on every page is run here or taken by the real command line, or its block says why not; links hold."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml
from conftest import ROOT
from pages import PAGES, Block, blocks, commands, simple_commands

import genray
from genray.cli.config import SCHEMAS
from genray.cli.evaluate import _asked
from genray.cli.parser import run_command
from genray.config import load_config
from genray.data.datasets import SOURCES
from genray.evaluation.mixtures import parse_mixtures
from genray.tuning.grid import load_grid

BLOCKS = [block for page in PAGES for block in blocks(page)]
# Names that stand for the reader's own file.
STANDS_FOR = {"my.yaml": "configs/digits.yaml", "GRID.yaml": "configs/ablations/averaging.yaml"}
# Run by CI, in a fresh copy: .ci/run takes this very line from the README.
BY_CI = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text())[1]


def all_commands():
    for block in BLOCKS:
        variables = {}
        for line in commands(block):
            for words in simple_commands(line, variables):
                yield block, line, [STANDS_FOR.get(word, word) for word in words]


def inline_commands():
    """Those in running text, where they have arguments and leave nothing out."""
    for page in PAGES:
        for line in re.findall(
            r"`((?:(?:\S*/)?python -m genray\.\w+|genray [a-z]+) [^`]+)`", page.read_text(encoding="utf-8")
        ):
            if "..." not in line:
                yield Block(page, 0, "", line, ""), line, shlex.split(line)


COMMANDS = [*all_commands(), *inline_commands()]
OURS = re.compile(r"genray\.[\w.]+")


def genray_part(words):
    """(module, its arguments) of a command that runs one of ours, in whatever it is wrapped; None for others."""
    if words[0] == "genray" and words[1:]:
        return f"genray.{words[1]}", words[2:]
    for i in range(len(words) - 2):
        if Path(words[i]).name in ("python", "python3") and words[i + 1] == "-m" and OURS.fullmatch(words[i + 2]):
            return words[i + 2], words[i + 3 :]
    return None


# --- what the commands of genray are given --------------------------------------------------------------------------


def check_train(args):
    load_config(
        str(ROOT / args.config.removeprefix("/home/ray/genray/")) if args.config else None, [*args.overrides, *args.set]
    )


def check_evaluate(args):
    _asked(args).request()
    assert args.data is None or args.data.partition(":")[0] in SOURCES
    three = ("natural", "linf", "l2")
    for points in (args.mixtures, args.save_mixture):
        if points:
            parse_mixtures(points, three if "l2" in points else three[:2], "linf" if "l2" not in points else None, "-")


def check_tune(args):
    assert load_grid(str(ROOT / args.grid), args.overrides).trials


CHECKS = {"genray.train": check_train, "genray.evaluate": check_evaluate, "genray.tune": check_tune}
OF_GENRAY = [(block, line, genray_part(words)) for block, line, words in COMMANDS if genray_part(words)]


def test_the_pages_are_read():
    assert len(PAGES) > 20 and len(OF_GENRAY) > 60
    assert {"genray.train", "genray.evaluate", "genray.tune", "genray.export"} <= {part[0] for *_, part in OF_GENRAY}
    assert len({block.where for block, *_ in OF_GENRAY}) > 20


CALLS = sorted({(m, tuple(a)) for _, _, (m, a) in OF_GENRAY})  # in one order in all of pytest's processes


@pytest.mark.parametrize(("module", "argv"), CALLS, ids=str)
def test_a_command_of_genray_is_taken(module, argv, capsys):
    """By its own parser and by what checks its values: only files that are not here are not looked at."""
    if module == "genray.config":
        assert argv[0] in (*SCHEMAS, "reference", "records")  # run by test_json_schema.py and test_records_page.py
        return
    args = importlib.import_module(module.replace("genray.", "genray.cli.")).parse_args(list(argv))
    CHECKS.get(module, lambda args: None)(args)


DRY = [(m, a) for m, a in CALLS if "--dry-run" in a and "genray.train" == m]


@pytest.mark.parametrize("argv", [argv for _, argv in DRY if "/data/mine" not in " ".join(argv)], ids=str)
def test_dry_runs_run(argv, capsys):
    from genray.cli.train import main, parse_args

    assert run_command(main, parse_args(list(argv))) == 0
    out = capsys.readouterr().out
    assert "epochs" in out and "placement" in out


# --- all other commands ---------------------------------------------------------------------------------------------


class Taken(Exception):
    """A script's parser has taken its arguments."""


def check_script(words, monkeypatch):
    """Runs a script of ours up to where its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, words[2:] if args is None else args)
        raise Taken

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend(str((ROOT / words[1]).parent))
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(Taken):
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


SCRIPTS = {tuple(words): block.where for block, _, words in COMMANDS if words[1:] and re.match("bench.*py$", words[1])}


@pytest.mark.parametrize("words", sorted(SCRIPTS), ids=" ".join)
def test_a_script_takes_its_arguments(words, monkeypatch):
    check_script(list(words), monkeypatch)


def test_every_other_command_says_why_it_is_not_run():
    left = set()
    for block, line, words in COMMANDS:
        run = genray_part(words) or tuple(words) in SCRIPTS or line == BY_CI
        if not run and not block.reason:
            left.add(f"{block.where}: {' '.join(words)}")
    assert left == set()


# --- Python on the pages --------------------------------------------------------------------------------------------

PYTHON = [block for block in BLOCKS if block.language == "python" and not block.reason]


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_python_on_a_page_runs(block, trained_run, tmp_path, monkeypatch):
    """In a folder that has the configurations and a finished run; trainings are cut to one epoch."""
    shutil.copytree(trained_run, tmp_path / "runs/digits")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    text = block.text.replace('"training.epochs": 10', '"training.epochs": 1')
    exec(compile(text, block.where, "exec"), {"images": torch.rand(2, 1, 8, 8)})


def test_what_python_on_a_page_calls_is_there():
    for block in BLOCKS:
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "genray":
                    assert hasattr(genray, node.attr), f"{block.where}: genray.{node.attr}"


# --- links ----------------------------------------------------------------------------------------------------------


def headings(page):
    """GitHub's anchors of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = []
    for title in re.findall(r"^#+ +(.*?) *$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        found.append(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


LINK = re.compile(r"(?<!!)\[(?:[^][]|\[[^]]*\])*\]\(<?([^)>\s]+)>?\)|!\[[^]]*\]\(([^)\s]+)\)")


def links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for match in LINK.finditer(text):
        yield match[1] or match[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in links(page):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), f"{target}: outside the repository"
        if anchor:
            assert anchor in headings(file), f"{target}: no such heading"


def test_every_page_can_be_reached():
    index = ROOT / "docs/README.md"
    assert "docs/README.md" in links(ROOT / "README.md")
    reached, todo = set(), [index, ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        todo += [(page.parent / target.partition("#")[0]).resolve() for target in links(page) if "://" not in target]
    assert set(PAGES) <= reached


def test_the_citation_file_names_this_version_and_both_papers():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (str(cff["version"]), cff["license"]) == (project["version"], project["license"])
    values = [i["value"] for paper in cff["references"] for i in paper["identifiers"]]
    assert values == ["arXiv:2303.13813", "arXiv:2510.13361"]
