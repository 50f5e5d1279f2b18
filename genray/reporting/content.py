"""The content of a report, for every file format: sections of tables, figures and notes."""

from dataclasses import dataclass, field

from genray.tables import Table

CAUTION = "CAUTION: "  # prefix of notes that are warnings


@dataclass(frozen=True)
class Figure:
    """Attributes:
    name: of its files.
    caption: a description, also for readers of the text alone.
    files: ending -> content.
    """

    name: str
    caption: str
    files: dict


@dataclass(frozen=True)
class Notes:
    lines: tuple[str, ...]


@dataclass
class ReportSection:
    """Attributes:
    key: of its place in the page.
    title: one line.
    blocks: `Table`, `Figure`, `Notes` and `ReportSection` objects.
    """

    key: str
    title: str
    blocks: list = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Attributes:
    summary: the numbers of results found and the best of them, a line each.
    cautions: reasons to doubt numbers, a line each.
    sections: the rest.
    tables: the tables for the terminal.
    """

    summary: tuple[str, ...]
    cautions: tuple[str, ...]
    sections: list[ReportSection]
    tables: list[Table]
