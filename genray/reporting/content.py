"""The content of a report, for every file format: sections of tables, figures and notes."""

from dataclasses import dataclass, field

from genray.tables import Table

CAUTION = "CAUTION: "  # how a note begins that a reader must not overlook


@dataclass(frozen=True)
class Figure:
    """Attributes:
    name: of its files.
    caption: its content, also for readers of the text alone.
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
    summary: what was found and the best of it, a line each.
    cautions: why numbers may not be what they seem, a line each.
    sections: the rest.
    tables: the tables that a terminal shows.
    """

    summary: tuple[str, ...]
    cautions: tuple[str, ...]
    sections: list[ReportSection]
    tables: list[Table]
