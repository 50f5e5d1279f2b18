"""Tables of accuracies, written as text, Markdown, CSV, LaTeX and HTML."""

import csv
import io
import re
from dataclasses import dataclass, replace
from html import escape

# The paper's column order and heads.
HEADS = {"natural": "NAT", "pgd20": "PGD20", "pgd100": "PGD100", "mim": "MIM", "cw": "CW", "apgd_ce": "APGD_ce"}
HEADS |= {"apgd_dlr": "APGD_dlr", "apgd_t": "APGD_t", "fab_t": "FAB_t", "square": "Square", "aa": "AA"}
NARROW = 40  # characters in a row of a table that a telephone's screen shows whole
OURS, PUBLISHED, DIFFERENCE = "ours", "published", "difference"


@dataclass(frozen=True)
class Cell:
    """A printed number.

    Attributes:
        text: the number, in per cent; "" where there is none.
        spread: standard deviation over seeds, or "".
        interval: (low, high) of its 95 % interval, or ().
        rank: 1 for the best of its column, 2 for the second best, else 0.
    """

    text: str = ""
    spread: str = ""
    interval: tuple[str, ...] = ()
    rank: int = 0

    @property
    def number(self) -> str:
        """The number with its spread."""
        return f"{self.text} ± {self.spread}" if self.spread else self.text or "-"

    @property
    def between(self) -> str:
        return f"[{', '.join(self.interval)}]" if self.interval else ""


@dataclass(frozen=True)
class TableRow:
    """One row: its labels, its cells, and its kind: ours, published, or a difference of the two."""

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    kind: str = OURS


@dataclass(frozen=True)
class Table:
    """Attributes:
    name: of its files.
    title: one line.
    label_heads, heads: of the labels and of the cells.
    rows: see `TableRow`.
    notes: remarks on the numbers, a line each.
    """

    name: str
    title: str
    label_heads: tuple[str, ...]
    heads: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()

    def ranked(self, lower_is_better=()) -> "Table":
        """Returns the table with the best and second best of each column marked, separately for ours and published;
        equal numbers share a rank, and a single number has none."""
        ranks = {}
        for column, head in enumerate(self.heads):
            for kind in (OURS, PUBLISHED):
                found = {i: row.cells[column] for i, row in enumerate(self.rows) if row.kind == kind}
                values = {i: float(cell.text) for i, cell in found.items() if cell.text}
                best = sorted(set(values.values()), reverse=head not in lower_is_better)[:2]
                if len(values) > 1:
                    ranks |= {(i, column): best.index(v) + 1 for i, v in values.items() if v in best}
        rows = (
            replace(row, cells=tuple(replace(cell, rank=ranks.get((i, j), 0)) for j, cell in enumerate(row.cells)))
            for i, row in enumerate(self.rows)
        )
        return replace(self, rows=tuple(rows))


def head_of(column: str) -> str:
    """Returns the head of a column; "l2/aa" is a column of one of several norms."""
    norm, _, name = column.rpartition("/")
    head = HEADS.get(name, name.upper() if name.startswith("pgd") else name)
    return f"{norm} {head}" if norm else head


def cell_of(mean: float, spread: float | None = None, low: float | None = None, high: float | None = None) -> Cell:
    """Returns the cell of a mean, a spread and an interval, given as fractions."""
    interval = () if low is None else (f"{100 * low:.1f}", f"{100 * high:.1f}")
    return Cell(f"{100 * mean:.2f}", "" if spread is None else f"{100 * spread:.2f}", interval)


def accuracy_cell(record: dict | None) -> Cell:
    """Returns the cell of {"value", "low", "high"}; an empty one for None."""
    return cell_of(record["value"], None, record["low"], record["high"]) if record else Cell()


def printable(text, longest: int = 200) -> str:
    """Returns text of unknown origin as one printable line."""
    words = "".join(c if c.isprintable() else " " for c in str(text)).split()
    line = " ".join(words)
    return line if len(line) <= longest else line[: longest - 1] + "…"


# --- written ----------------------------------------------------------------------------------------------------------


def as_text(table: Table, intervals: bool = False, notes: bool = False) -> str:
    """Returns the table for a terminal: aligned, best marked *, second best marked +."""
    lines = [[*table.label_heads, *table.heads]]
    for row in table.rows:
        cells = (f"{c.number}{('', '*', '+')[c.rank]} {c.between * intervals}".rstrip() for c in row.cells)
        lines.append([*map(printable, row.labels), *cells])
    text = aligned(lines)
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*[table.title] * bool(table.title), *text, *table.notes * notes])


def aligned(lines: list[list[str]], justify=str.ljust) -> list[str]:
    """Returns rows of cells as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(map(justify, line, widths)).rstrip() for line in lines]


def as_markdown(table: Table) -> str:
    """Returns the table as Markdown: best in bold, second best underlined, intervals behind the numbers."""
    labels, marks = len(table.label_heads), {1: "**{}**", 2: "<u>{}</u>", 0: "{}"}
    lines = [[*table.label_heads, *table.heads], ["---"] * labels + ["---:"] * len(table.heads)]
    for row in table.rows:
        cells = [f"{marks[cell.rank].format(cell.number)} {cell.between}".rstrip() for cell in row.cells]
        lines.append([*map(markdown_text, row.labels), *cells])
    head = "| " + " | ".join(lines[0]) + " |"
    rule = "|" + "|".join(lines[1]) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(line) + " |" for line in lines[2:])]) + "\n"


def markdown_text(text, longest: int = 200) -> str:
    """Returns text of unknown origin with the characters of Markdown escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text, longest))


def as_csv(table: Table) -> str:
    """Returns the table as CSV, a line a row; spreads and intervals have columns of their own."""
    parts = []
    for j, head in enumerate(table.heads):
        cells = [row.cells[j] for row in table.rows]
        parts.append((j, head, lambda cell: cell.text))
        if any(cell.spread for cell in cells):
            parts.append((j, f"{head}_std", lambda cell: cell.spread))
        if any(cell.interval for cell in cells):
            parts.append((j, f"{head}_low", lambda cell: cell.interval[0] if cell.interval else ""))
            parts.append((j, f"{head}_high", lambda cell: cell.interval[1] if cell.interval else ""))
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow([*table.label_heads, *(head for _, head, _ in parts)])
    for row in table.rows:
        out.writerow([*map(_csv_text, row.labels), *(take(row.cells[j]) for j, _, take in parts)])
    return buffer.getvalue()


def _csv_text(text):
    """Returns the text with a leading quote where a spreadsheet would read a formula."""
    line = printable(text)
    return f"'{line}" if line[:1] in "=+-@" and line else line


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {char: f"\\{char}" for char in "&%$#_{}"}


def latex_text(text) -> str:
    return "".join(LATEX.get(char, char) for char in printable(text))


def as_latex(table: Table) -> str:
    """Returns the table as a LaTeX `tabular` with booktabs' rules; best bold, second best underlined."""
    marks = {1: r"\textbf{%s}", 2: r"\underline{%s}", 0: "%s"}
    lines = [f"% {printable(table.title)}", *(f"% {printable(note, 1000)}" for note in table.notes)]
    lines.append(r"\begin{tabular}{" + "l" * len(table.label_heads) + "r" * len(table.heads) + "}")
    lines += [r"\toprule", " & ".join(map(latex_text, (*table.label_heads, *table.heads))) + r" \\", r"\midrule"]
    before = table.rows[0].kind if table.rows else ""
    for row in table.rows:
        if row.kind == PUBLISHED != before:
            lines.append(r"\midrule")
        before = row.kind
        cells = [marks[cell.rank] % latex_text(cell.number) for cell in row.cells]
        lines.append(" & ".join([*map(latex_text, row.labels), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_html(table: Table) -> str:
    """Returns the table as HTML with a caption and header cells, in a frame with a horizontal scroll bar."""
    labels = len(table.label_heads)
    head = "".join(f'<th scope="col"{" class=label" * (i < labels)}>{escape(text)}</th>'
                   for i, text in enumerate((*table.label_heads, *table.heads)))  # fmt: skip
    body = "".join(_html_row(row) for row in table.rows)
    title = escape(printable(table.title, 300))
    lines = ["  ".join([*row.labels, *(cell.number for cell in row.cells)]) for row in table.rows]
    hint = '<p class="hint">the table scrolls sideways</p>' * any(len(line) > NARROW for line in lines)
    return (
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table>'
        f"<caption><span>{title}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{hint}{notes_html(table.notes)}"
    )


def _html_row(row):
    first, *rest = (escape(printable(label)) for label in row.labels)
    labels = f'<th scope="row" class="label">{first}</th>' + "".join(
        f'<td class="label">{label}</td>' for label in rest
    )
    return f'<tr class="{row.kind}">{labels}{"".join(map(_html_cell, row.cells))}</tr>'


def _html_cell(cell):
    text = escape(cell.number)
    text = {1: f'<b title="best">{text}</b>', 2: f'<u title="second best">{text}</u>', 0: text}[cell.rank]
    return f"<td>{text}" + (f"<small>{cell.between}</small>" if cell.interval else "") + "</td>"


def notes_html(notes) -> str:
    items = "".join(f"<li>{escape(printable(note, 1000))}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""
