"""The natural/robust curve of a run's mixtures as a figure. matplotlib is imported only when something is drawn."""

import io
from fractions import Fraction

from genray.reporting.mixture_record import CHOSEN_ON

MISSING = (
    "no plot: matplotlib is not installed; pip install 'genray[plot]' and --resume draw it without measuring again"
)
KINDS = {"base learner": ("s", "tab:gray"), "theta_g": ("D", "tab:red")}


def draw_curve(results: dict, split: str) -> dict[str, bytes]:
    """A figure of one split: file ending -> content, "png" and "svg".

    Left, where the run has gamma: accuracies over gamma with their 95 % intervals. Right: robust over natural accuracy.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, gamma_of = results["splits"][split]["rows"], results["gamma_of"]
    settings = {"font.size": 8, "svg.hashsalt": "genray", "svg.fonttype": "none"}  # the same bytes every time
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8 if gamma_of else 4.4, 3.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2 if gamma_of else 1, squeeze=False)[0]
        if gamma_of:
            _over_gamma(axes[0], rows, gamma_of)
        _against(axes[-1], rows, gamma_of, results["chosen"])
        figure.suptitle(_title(results, split), fontsize=8)
        return {"png": _saved(figure, "png", {}), "svg": _saved(figure, "svg", {"Date": None})}


def _saved(figure, kind, metadata):
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _title(results, split):
    protocol = results["splits"][split]["protocol"]
    threats = ", ".join(f"{threat['norm']} {threat['epsilon']}" for threat in protocol["threats"])
    chosen = f"; * chosen on {CHOSEN_ON}" if results["chosen"] else ""
    return f"{results['run']}: {protocol['data']['examples']} {split.upper()} images, {threats}{chosen}"


def _over_gamma(axes, rows, gamma_of):
    points = _by_gamma(rows, gamma_of)
    gammas = [float(Fraction(row["weights"][gamma_of])) for row in points]
    curves = {"natural": [row["natural"] for row in points]}
    for norm, by_name in points[0]["columns"].items():
        curves |= {f"{column} ({norm})": [row["columns"][norm][column] for row in points] for column in by_name}
    for name, accuracies in curves.items():
        (line,) = axes.plot(gammas, [100 * a["value"] for a in accuracies], marker="o", markersize=3, label=name)
        low, high = ([100 * a[end] for a in accuracies] for end in ("low", "high"))
        axes.fill_between(gammas, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel=f"gamma (weight of {gamma_of})", ylabel="accuracy, %")
    axes.legend(loc="center left")  # "best" is a slow search
    axes.grid(alpha=0.3)


def _by_gamma(rows, gamma_of):
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    return sorted(mixtures, key=lambda row: Fraction(row["weights"][gamma_of]))


def _against(axes, rows, gamma_of, chosen):
    mixtures = [row for row in rows if row["kind"] == "mixture"]
    if gamma_of:
        axes.plot(
            *zip(*map(_place, _by_gamma(rows, gamma_of))), "-", color="tab:blue", linewidth=0.8, alpha=0.5, zorder=0
        )
    for row in mixtures:
        x, y = _place(row)
        axes.plot(x, y, "o", color="tab:blue", fillstyle="full" if row["pareto"] else "none", markersize=5)
        if row["name"] == chosen:
            axes.plot(x, y, "*", color="tab:orange", markersize=13, zorder=0)
        if len(mixtures) <= 12:
            axes.annotate(row["name"].split(" = ")[0], (x, y), textcoords="offset points", xytext=(5, 3), fontsize=6)
    for row in rows:
        if row["kind"] in KINDS:
            marker, color = KINDS[row["kind"]]
            axes.plot(*_place(row), marker, color=color, markersize=5, label=row["name"], zorder=0)
    if any(row["kind"] in KINDS for row in rows):
        axes.legend(loc="lower left")
    axes.set(xlabel="natural accuracy, %", ylabel=f"{_robust(rows[0])}, %", title="full: Pareto-optimal")
    axes.margins(0.15)
    axes.grid(alpha=0.3)


def _robust(row):
    names = [f"{column} ({norm})" for norm, by_name in row["columns"].items() for column in by_name]
    return f"accuracy under {names[0]}" if len(names) == 1 else "robust accuracy (see the table)"


def _place(row):
    return 100 * row["natural"]["value"], 100 * row["robust"]["value"]
