"""Plots of a grid. Needs matplotlib, which is an optional extra."""

import io

from genray.errors import ConfigError
from genray.reporting.pareto import pareto
from genray.reporting.trials import METHOD, Trials, groups
from genray.tuning.grid import short_names

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "genray",
}
# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"


def _pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("plots: matplotlib is not installed; pip install 'genray[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def heat_map(trials: Trials, measure: str) -> bytes:
    """A PNG of a two-way grid: rows and columns are its two keys, cells the mean over seeds in per cent.

    Raises:
        ConfigError: the grid has not exactly two keys that vary, or matplotlib is not installed.
    """
    rows = [row for row in groups(trials) if row[measure]]
    keys = [key for key in trials.keys if len({row[key] for row in rows}) > 1]
    if len(keys) != 2:
        raise ConfigError(f"heat map: expected a grid over two keys, got {len(keys)} that vary")
    down, across = (list(dict.fromkeys(row[key] for row in rows)) for key in keys)
    values = [[float("nan")] * len(across) for _ in down]
    for row in rows:
        values[down.index(row[keys[0]])][across.index(row[keys[1]])] = 100 * row[measure][0]
    pyplot = _pyplot()
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(1.6 + 0.8 * len(across), 1.2 + 0.5 * len(down)))
        image = axes.imshow(values, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(across)), [str(v) for v in across])
        axes.set_yticks(range(len(down)), [str(v) for v in down])
        axes.set_xlabel(short_names(keys)[1])
        axes.set_ylabel(short_names(keys)[0])
        low, high = image.get_clim()
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                light = value < (low + high) / 2
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if light else "black")
        axes.set_title(f"{measure}, % (theta_g)")
        return _png(figure, pyplot)


def scatter(trials: Trials, across: str = "natural", up: str | None = None) -> bytes:
    """A PNG with one point a method or place, bars of one standard deviation, and the Pareto front as a line.

    Args:
        across, up: measures of the axes; `up` is the last one by default, AutoAttack's or the union where there is one.
    """
    up = up or trials.measures[-1]
    rows = [row for row in groups(trials) if row[across] and row[up]]
    pyplot = _pyplot()
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.5, 4))
        for i, row in enumerate(rows):
            spreads = [100 * (row[measure][1] or 0) for measure in (across, up)]
            point = [100 * row[measure][0] for measure in (across, up)]
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
            axes.errorbar(*point, xerr=spreads[0], yerr=spreads[1], label=_label(row, trials), linestyle="", **style)
        front = pareto([(row[across][0], row[up][0]) for row in rows])
        axes.plot([100 * x for x, _ in front], [100 * y for _, y in front], color="0.6", linewidth=1, zorder=0)
        axes.set_xlabel(f"{across}, %")
        axes.set_ylabel(f"{up}, %")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        return _png(figure, pyplot)


def _label(row, trials):
    parts = [row[METHOD], *(f"{short}={row[key]}" for short, key in zip(short_names(trials.keys), trials.keys))]
    return " ".join(part for part in parts if part)


def _png(figure, pyplot):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
