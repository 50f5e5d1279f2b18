"""The repository's Markdown pages and the commands in them, for the tests of the documentation."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "cluster/README.md",
    ROOT / "configs/paper/README.md",
    ROOT / "genray/evaluation/published/README.md",
]
PROGRAM = re.compile(r"(?:\$ )?(?:python[\d.]*|pip|ray|bash|for|docker|kubectl|[A-Z]\w*=\S*)(?:\s|$)")
NOT_RUN = re.compile(r"<!-- not run: ((?:(?!-->).)+?) -->\s*\Z", re.S)
CONTINUED = re.compile(r"\\\n\s*")


@dataclass(frozen=True)
class Block:
    """Code on a page.

    Attributes:
        page: the file.
        line: number of its first line.
        language: what stands behind the fence; "" for an indented block.
        text: without the fence or the indent.
        reason: why its commands are not run, as the comment above it says; "" where there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str

    @property
    def where(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """Fenced and indented blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at, found = 0, []
    while at < len(lines):
        fence = re.match(r"( *)```(\w*)", lines[at])
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            body = [line.removeprefix(fence[1]) for line in lines[at + 1 : end]]
            found.append((at, fence[2] or "text", body))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()) and not _in_list(lines, at):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append((at, "", [line[4:] for line in lines[at:end]]))
            at = end
        else:
            at += 1
    for at, language, body in found:
        above = NOT_RUN.search("\n".join(lines[:at]))
        yield Block(page, at + 1, language, "\n".join(body), " ".join(above[1].split()) if above else "")


def _in_list(lines, at):
    """Whether an indented line goes on with a list item instead of being code."""
    for line in reversed(lines[:at]):
        if line.strip() and not line.startswith(" "):
            return bool(re.match(r"[-*] |\d+\. ", line))
    return False


def commands(block):
    """Lines of a block that a shell would run, continued lines joined."""
    if block.language not in ("bash", "sh", "console", ""):
        return
    for line in CONTINUED.sub(" ", block.text).splitlines():
        if block.language and line.strip() and not line.startswith("#"):
            yield line
        elif PROGRAM.match(line):
            yield line


def simple_commands(line, variables):
    """Words of each program that a line starts; sets `variables`, takes one turn of a loop, drops redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words, one = list(lexer), []
    for word in [*words, ";"]:
        if word not in (";", "&&", "|", "||"):
            one.append(word)
            continue
        while one and (one[0] == "do" or re.fullmatch(r"[A-Z]\w*=\S*", one[0])):
            if one[0] != "do":
                name, _, value = one[0].partition("=")
                variables[name] = value
            one = one[1:]
        if one and one[0] == "for":
            variables[one[1]] = one[3]
        elif one and one != ["done"]:
            yield (
                [_expanded(w, variables) for w in one[: one.index(">")] if w]
                if ">" in one
                else [_expanded(w, variables) for w in one]
            )
        one = []


def _expanded(word, variables):
    return re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), word)
