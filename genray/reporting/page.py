"""Writes a report as one self-contained page of HTML, and as Markdown."""

from html import escape
from pathlib import Path

from genray.reporting.content import CAUTION, Figure, Notes, Report, ReportSection
from genray.reporting.style import inline_svg
from genray.tables import Table, as_html, as_markdown, markdown_text, notes_html, printable

STYLE = Path(__file__).parent / "page.css"
FOLDED = {"published", "protocol"}  # sections that a reader opens


def as_page(report: Report) -> str:
    """Returns the page: no scripts, no external links, images and styles inside; the same bytes for the same report."""
    contents = "".join(f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in report.sections)
    cautions = _list(report.cautions)
    body = "".join(map(_section, report.sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>genray report</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<a class="skip" href="#content">To the content</a>
<header>
<h1>genray report</h1>
<p class="lead">Accuracy on natural and on attacked images, in per cent.</p>
<div class="summary"><h2>In short</h2>{_list(report.summary)}</div>
{f'<div class="cautions"><h2>Before you rely on it</h2>{cautions}</div>' if report.cautions else ""}
<nav aria-label="Sections"><ol>{contents}</ol></nav>
</header>
<main id="content">
{body}
</main>
<footer>Made by python -m genray.report. It opens without a network and runs no scripts.</footer>
</body>
</html>
"""


def _list(lines):
    return f"<ul>{''.join(f'<li>{escape(printable(line, 600))}</li>' for line in lines)}</ul>" if lines else ""


def _section(section: ReportSection, level: int = 2) -> str:
    inside = _blocks(section, level)
    if section.key in FOLDED:
        inside = f"<details><summary>Show</summary>{inside}</details>"
    head = f"<h{level}>{escape(section.title)}</h{level}>"
    return f'<section id="{section.key}">{head}{inside}</section>\n'


def _blocks(section, level):
    parts, figures = [], []
    for number, block in enumerate([*section.blocks, None]):
        if isinstance(block, Figure):
            figures.append(_figure(block, f"{section.key}-{number}"))
            continue
        if figures:
            parts.append(f'<div class="figures">{"".join(figures)}</div>')
            figures = []
        if isinstance(block, Table):
            parts.append(_marked(as_html(block)))
        elif isinstance(block, Notes):
            parts.append(_marked(notes_html(block.lines)))
        elif isinstance(block, ReportSection):
            parts.append(_section(block, level + 1))
    return "".join(parts)


def _marked(html):
    """Notes that warn stand out."""
    return html.replace(f"<li>{CAUTION}", '<li class="caution">Caution: ')


def _figure(figure, prefix):
    alt = escape(figure.caption)
    return f"<figure>{inline_svg(figure.files['svg'], prefix, alt)}<figcaption>{alt}</figcaption></figure>"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def as_document(report: Report, plot_folder: str | None) -> str:
    """Returns the report as Markdown.

    Args:
        report: the content.
        plot_folder: the folder with PNG files of the figures, or None.
    """
    lines = ["# genray report", "", *(f"- {markdown_text(line, 600)}" for line in report.summary), ""]
    if report.cautions:
        lines += ["**Before you rely on it:**", "", *(f"- {markdown_text(line, 600)}" for line in report.cautions), ""]
    for section in report.sections:
        lines += _document_section(section, 2, plot_folder)
    return "\n".join(lines).rstrip() + "\n"


def _document_section(section, level, plot_folder):
    lines = [f"{'#' * level} {markdown_text(section.title)}", ""]
    for block in section.blocks:
        if isinstance(block, Table):
            lines += [f"**{markdown_text(block.title, 300)}**", "", as_markdown(block)]
            lines += [*(f"- {markdown_text(note, 1000)}" for note in block.notes), ""]
        elif isinstance(block, Notes):
            lines += [*(f"- {markdown_text(line, 600)}" for line in block.lines), ""]
        elif isinstance(block, Figure) and plot_folder:
            lines += [f"![{markdown_text(block.caption, 600)}]({plot_folder}/{block.name}.png)", ""]
        elif isinstance(block, ReportSection):
            lines += _document_section(block, level + 1, plot_folder)
    return lines
