"""Writes the files of a report into a folder of its own."""

import json
from pathlib import PurePosixPath

from genray.errors import RunFolderError
from genray.recording.writer import write_all
from genray.reporting.content import Figure, Report, ReportSection
from genray.reporting.page import as_document, as_page
from genray.storage import Storage
from genray.tables import Table, as_csv, as_latex

FORMATS = ("html", "md", "csv", "tex", "png", "svg")
DEFAULT_FORMATS = ("html", "md", "csv", "tex", "png")
RECORD, KIND = "report.json", "genray-report/1"


def open_output(folder: str) -> tuple[Storage, list[str]]:
    """Returns the folder of a report and the names of the files of an earlier report in it.

    Raises:
        RunFolderError: it cannot be written, or something else is in it.
    """
    storage = Storage(folder)
    storage.check_writable()
    if not storage.exists():
        return storage, []
    if RECORD in storage.names():
        try:
            record = json.loads(storage.read(RECORD))
            files = [str(name) for name in record["files"]]
            if record["kind"] == KIND and all(_inside(name) for name in files):
                return storage, files
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
    if storage.names() or storage.folders():
        raise RunFolderError(
            f"--output {storage}: expected a new or empty folder or an earlier report, other files are there"
        )
    return storage, []


def _inside(name):
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def files_of(report: Report, formats) -> dict[str, bytes]:
    """Returns name -> content of every file."""
    tables, figures = [], []
    _collect(report.sections, tables, figures)
    files = {}
    if "html" in formats:
        files["index.html"] = as_page(report).encode()
    if "md" in formats:
        files["report.md"] = as_document(report, "plots" if "png" in formats else None).encode()
    for ending, write in (("csv", as_csv), ("tex", as_latex)):
        if ending in formats:
            files |= {f"tables/{_file(table.name)}.{ending}": write(table).encode() for table in tables}
    for ending in ("png", "svg"):
        if ending in formats:
            files |= {f"plots/{_file(figure.name)}.{ending}": figure.files[ending] for figure in figures}
    return files


def _file(name):
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)[:100]


def _collect(blocks, tables, figures):
    for block in blocks:
        if isinstance(block, ReportSection):
            _collect(block.blocks, tables, figures)
        elif isinstance(block, Table):
            tables.append(block)
        elif isinstance(block, Figure):
            figures.append(block)


def write_files(storage: Storage, before: list[str], files: dict[str, bytes]):
    """Writes the files and removes those of the earlier report without a successor.

    The record of both is written first, so that an interrupted report can be overwritten.

    Raises:
        StorageError: files could not be written; all others are.
    """
    _record(storage, sorted({*before, *files}))
    write_all(storage, files)
    for name in before:
        if name not in files and storage.exists(name):
            storage.delete(name)
    _record(storage, sorted(files))


def _record(storage, names):
    storage.write(RECORD, (json.dumps({"kind": KIND, "files": names}, indent=1) + "\n").encode())
