"""Figures of results: accuracies against each other, over two fields of a grid, over epsilon."""

from collections.abc import Sequence
from dataclasses import dataclass

from genray.evaluation.mixtures import pareto
from genray.reporting.style import BLUE, GREY, colours_of, draw, label_text, legend_below
from genray.reporting.trials import Trials, groups, varying
from genray.tables import head_of
from genray.tuning.grid import short_names

MOST_NAMED = 14  # points that a legend names; of more, only those on the front are named


@dataclass(frozen=True)
class Point:
    """A model in the natural/robust plane, in per cent; bars are one standard deviation, or None."""

    label: str
    natural: float
    robust: float
    natural_bar: float | None = None
    robust_bar: float | None = None


def scatter(points: list[Point], robust_name: str, published: Sequence[Point] = ()) -> dict:
    """Draws robust over natural accuracy, the Pareto front of `points` as a line; published ones grey and numbered.

    Returns:
        {"png": bytes, "svg": bytes}.
    """

    def paint(axes):
        front = pareto([(p.natural, p.robust) for p in points])
        axes.plot(*zip(*front), color=GREY, linewidth=1, linestyle="--", zorder=1, label="Pareto front")
        named = points if len(points) <= MOST_NAMED else [p for p in points if (p.natural, p.robust) in front]
        looks = colours_of(p.label for p in named[:28])
        rest = [p for p in points if p.label not in looks]
        for point in rest:
            _with_bars(axes, point, color=BLUE, marker="o", fillstyle="none", alpha=0.7)
        for point in points:
            if point.label in looks:
                _with_bars(axes, point, label=label_text(point.label), **looks[point.label])
        for number, point in enumerate(published, 1):
            axes.plot(point.natural, point.robust, "o", color=GREY, markersize=3, zorder=0)
            axes.annotate(str(number), (point.natural, point.robust), xytext=(3, 2), textcoords="offset points",
                          fontsize=7, color=GREY)  # fmt: skip
        axes.set(xlabel="natural accuracy, %", ylabel=f"{robust_name}, %")
        axes.margins(0.12)
        legend_below(axes)

    return draw(paint, height=4.2)


def _with_bars(axes, point, **look):
    bars = {"xerr": point.natural_bar, "yerr": point.robust_bar}
    axes.errorbar(point.natural, point.robust, **bars, linestyle="", elinewidth=0.8, zorder=2, **look)


def heat_map(trials: Trials, measure: str) -> dict:
    """Draws a two-way grid: rows and columns are its two fields, cells the mean over seeds in per cent.

    Args:
        trials: of a grid in which two fields vary, as `varying` says.
    """
    keys = varying(trials)
    rows = [row for row in groups(trials) if row[measure]]
    down, across = (list(dict.fromkeys(row[key] for row in trials.rows)) for key in keys)
    values = [[float("nan")] * len(across) for _ in down]
    for row in rows:
        values[down.index(row[keys[0]])][across.index(row[keys[1]])] = 100 * row[measure][0]
    names = short_names(keys)

    def paint(axes):
        axes.grid(False)
        image = axes.imshow(values, aspect="auto")
        axes.set_xticks(range(len(across)), [label_text(v, 16) for v in across])
        axes.set_yticks(range(len(down)), [label_text(v, 16) for v in down])
        axes.set(xlabel=label_text(names[1]), ylabel=label_text(names[0]), title=f"{head_of(measure)}, % (theta_g)")
        low, high = image.get_clim()
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if value == value:
                    light = value < (low + high) / 2
                    axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="#fefefe" if light else "#010101")

    return draw(paint, width=min(9, max(3.2, 1.6 + 0.8 * len(across))), height=max(2.2, 1.3 + 0.5 * len(down)))


def over_epsilon(curves: dict[str, dict[float, tuple]], norm: str) -> dict:
    """Draws accuracy over the radius, one curve an attack, with 95 % intervals.

    Args:
        curves: column -> {epsilon: (value, low, high)}, fractions; epsilon 0 is the natural accuracy.
        norm: of the ball.
    """

    def paint(axes):
        for name, look in colours_of(curves).items():
            radii = sorted(curves[name])
            values, low, high = ([100 * curves[name][radius][i] for radius in radii] for i in range(3))
            axes.plot(radii, values, label=label_text(name), **look)
            axes.fill_between(radii, low, high, alpha=0.15, color=look["color"], linewidth=0)
        axes.set(xlabel=f"epsilon ({norm})", ylabel="accuracy, %", ylim=(0, 101))
        axes.set_xlim(left=0)
        legend_below(axes, 3)

    return draw(paint)
