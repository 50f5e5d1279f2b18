"""The natural/robust curve of a run's mixtures as figures."""

from fractions import Fraction

from genray.evaluation.mixture_record import CHOSEN_ON
from genray.reporting.style import BLUE, GREY, MARKERS, MISSING, ORANGE, VERMILION, draw, label_text, legend_below
from genray.reporting.table import head_of

AGAIN = f"{MISSING} and --resume draw them without measuring again"
KINDS = {"base learner": ("s", GREY), "theta_g": ("D", VERMILION)}


def draw_curve(results: dict, split: str) -> dict[str, bytes]:
    """A figure of one split: file ending -> content, "png" and "svg".

    Left, where the run has gamma: accuracies over gamma with their 95 % intervals. Right: robust over natural accuracy.

    Raises:
        MissingMatplotlib: matplotlib is not installed.
    """
    paints = curve_parts(results, split)

    def paint(axes):
        panels = axes if len(paints) > 1 else [axes]
        for panel, part in zip(panels, paints.values()):
            part(panel)
            if panel.get_legend_handles_labels()[1]:
                panel.legend(loc="lower left")
        panels[0].figure.suptitle(_title(results, split), fontsize=8)

    return draw(paint, width=9 if len(paints) > 1 else 4.8, height=3.9, columns=len(paints))


def draw_parts(results: dict, split: str) -> dict[str, dict]:
    """The same, each part a figure of its own, for a page: "over_gamma" (where the run has gamma) and "against"."""

    def below(part):
        def paint(axes):
            part(axes)
            legend_below(axes)

        return paint

    return {name: draw(below(part), height=4) for name, part in curve_parts(results, split).items()}


def curve_parts(results: dict, split: str) -> dict:
    """name -> what paints it on axes."""
    rows, gamma_of = results["splits"][split]["rows"], results["gamma_of"]
    parts = {"over_gamma": lambda axes: _over_gamma(axes, rows, gamma_of)} if gamma_of else {}
    return {**parts, "against": lambda axes: _against(axes, rows, gamma_of, results["chosen"])}


def _title(results, split):
    protocol = results["splits"][split]["protocol"]
    threats = ", ".join(f"{threat['norm']} {threat['epsilon']}" for threat in protocol["threats"])
    chosen = f"; * chosen on {CHOSEN_ON}" if results["chosen"] else ""
    return f"{label_text(results['run'])}: {protocol['data']['examples']} {split.upper()} images, {threats}{chosen}"


def _over_gamma(axes, rows, gamma_of):
    points = _by_gamma(rows, gamma_of)
    gammas = [float(Fraction(row["weights"][gamma_of])) for row in points]
    curves = {"natural": [row["natural"] for row in points]}
    for norm, by_name in points[0]["columns"].items():
        curves |= {
            f"{head_of(column)} ({norm})": [row["columns"][norm][column] for row in points] for column in by_name
        }
    for marker, (name, accuracies) in zip(MARKERS * len(curves), curves.items()):
        values = [100 * a["value"] for a in accuracies]
        (line,) = axes.plot(gammas, values, marker=marker, markersize=3.5, label=label_text(name))
        low, high = ([100 * a[end] for a in accuracies] for end in ("low", "high"))
        axes.fill_between(gammas, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel=f"gamma (weight of {gamma_of})", ylabel="accuracy, %")


def _by_gamma(rows, gamma_of):
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    return sorted(mixtures, key=lambda row: Fraction(row["weights"][gamma_of]))


def _against(axes, rows, gamma_of, chosen):
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    if gamma_of:
        axes.plot(*zip(*map(_place, _by_gamma(rows, gamma_of))), "-", color=BLUE, linewidth=0.8, alpha=0.5, zorder=0)
    for row in mixtures:
        x, y = _place(row)
        axes.plot(x, y, "o", color=BLUE, fillstyle="full" if row["pareto"] else "none", markersize=5)
        if row["name"] == chosen:
            axes.plot(x, y, "*", color=ORANGE, markersize=13, zorder=0)
        if len(mixtures) <= 12:
            axes.annotate(
                label_text(row["name"].split(" = ")[0]), (x, y), textcoords="offset points", xytext=(5, 3), fontsize=6
            )
    for row in rows:
        if row["kind"] in KINDS:
            marker, color = KINDS[row["kind"]]
            axes.plot(*_place(row), marker, color=color, markersize=5, label=label_text(row["name"]), zorder=0)
    axes.set(xlabel="natural accuracy, %", ylabel=f"{_robust(rows[0])}, %", title="full: Pareto-optimal")
    axes.margins(0.15)


def _robust(row):
    names = [f"{head_of(column)} ({norm})" for norm, by_name in row["columns"].items() for column in by_name]
    return f"accuracy under {names[0]}" if len(names) == 1 else "robust accuracy (see the table)"


def _place(row):
    return 100 * row["natural"]["value"], 100 * row["robust"]["value"]
