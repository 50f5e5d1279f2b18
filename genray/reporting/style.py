"""Draws every figure of genray: one style file, the same bytes for the same input.

Needs matplotlib, an optional extra, which is imported only in these functions.
"""

import io
import re
import warnings
from pathlib import Path

from genray.errors import ConfigError
from genray.tables import printable

STYLE = Path(__file__).parent / "genray.mplstyle"
INK, PAPER, GRID, GREY = "#1b1f24", "#ffffff", "#d5d9df", "#7b828c"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vP*X"
LARGEST = 1.5  # CSS pixels a point
HATCHES = ("", "//", "..", "xx", "\\\\")
MISSING = "no plots: matplotlib is not installed; pip install 'genray[plot]'"


class MissingMatplotlib(ConfigError):
    """matplotlib is not installed."""


def require_matplotlib():
    """Raises:
    MissingMatplotlib: there is none.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise MissingMatplotlib(MISSING) from None


def draw(paint, width: float = 5.4, height: float = 3.6, rows: int = 1, share_x: bool = False) -> dict:
    """Draws a figure; returns file ending -> content, "png" and "svg".

    Args:
        paint: called with the axes (a list where there are several), draws on them.
        width, height: inches; 5.4 is a column of a page, and of a telephone's screen.

    Raises:
        MissingMatplotlib: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        matplotlib.rcdefaults()  # not what the user's own matplotlibrc says
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(STYLE, use_default_template=False))
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, squeeze=False, sharex=share_x).flatten().tolist()
        paint(axes[0] if len(axes) == 1 else axes)
        return {"png": _saved(figure, "png", {"Software": None}), "svg": _saved(figure, "svg", {"Date": None})}


def _saved(figure, kind, metadata):
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def label_text(text, longest: int = 44) -> str:
    """Returns text of unknown origin as a label: long text keeps its end, which tells names apart, and a leading
    underscore gets a space, because a legend leaves such labels out."""
    line = printable(text, 200)
    if len(line) > longest:
        line = f"{line[: longest // 2 - 1]}…{line[-(longest // 2) :]}"
    return f" {line}" if line.startswith("_") else line


def legend_below(axes, columns: int = 2):
    """Draws the legend below the axes, where it hides nothing and a narrow screen has room."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 1 if max(map(len, labels)) > 30 else columns
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def whole_epochs(axes):
    """Sets the ticks of the epoch axis to whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def colours_of(names) -> dict:
    """Returns name -> colour and marker, by the order of the names."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def inline_svg(svg: bytes, prefix: str, alt: str) -> str:
    """Returns an SVG as a part of a page: no XML head, unique ids, the colours of the page.

    Args:
        svg: as `draw` gives it.
        prefix: makes the ids unique in the page.
        alt: what a screen reader says, already escaped.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", text)
    series = zip(COLOURS, ("c1", "c2", "c3", "c4", "c5", "c6", "ink"))
    for colour, name in ((INK, "ink"), (PAPER, "card"), (GRID, "rule"), (GREY, "faint"), *series):
        text = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{name})", text, flags=re.I)
    head = re.search(r"<svg ([^>]*)>", text)
    return f'<svg role="img" aria-label="{alt}" {_sized(head[1])}>{text[head.end() :]}'


def _sized(attributes):
    """As wide as there is room, but not much larger than drawn."""
    width = re.search(r'\bwidth="([\d.]+)pt"', attributes)
    rest = re.sub(r'\b(width|height)="[^"]*"\s*', "", attributes)
    return f'{rest} style="max-width: {float(width[1]) * LARGEST:.0f}px"' if width else rest
