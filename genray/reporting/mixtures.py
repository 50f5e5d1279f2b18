"""The natural/robust curve of a run's mixtures as a table and figures."""

import json
from fractions import Fraction

from genray.evaluation.mixture_sweep import CHOSEN_ON
from genray.evaluation.suite import BY_GRADIENTS
from genray.reporting.style import (
    BLUE,
    GREY,
    MARKERS,
    MISSING,
    ORANGE,
    VERMILION,
    MissingMatplotlib,
    draw,
    label_text,
    legend_below,
)
from genray.tables import Table, TableRow, accuracy_cell, as_csv, head_of, printable
from genray.types import ThreatModel

AGAIN = f"{MISSING} and --resume draw them without measuring again"
KINDS = {"base learner": ("s", GREY), "theta_g": ("D", VERMILION)}


def mixture_files(results: dict) -> dict[str, bytes]:
    """Returns the files of a sweep: `results.json`, and of each split a CSV table and, with matplotlib, the figures."""
    files = {"results.json": (json.dumps(results, indent=1) + "\n").encode()}
    for split in results["splits"]:
        files[f"curve_{split}.csv"] = as_csv(mixture_table(results, split)).encode()
        try:
            for name, drawn in draw_split(results, split).items():
                files |= {f"curve_{split}_{name}.{ending}": content for ending, content in drawn.items()}
        except MissingMatplotlib:
            pass
    return files


def mixture_table(results: dict, split: str, name: str = "mixtures") -> Table:
    """Returns the table of one split: accuracies with their intervals, the protocol and the meaning of the marks.

    Args:
        results: the whole record.
        split: of `results["splits"]`.
        name: of the table's files.
    """
    part = results["splits"][split]
    columns = list(
        dict.fromkeys((norm, column) for row in part["rows"] for norm, of in row["columns"].items() for column in of)
    )
    several = len(columns) > 1
    rows = []
    for row in part["rows"]:
        found = [row["natural"], *(row["columns"].get(norm, {}).get(column) for norm, column in columns)]
        cells = tuple(map(accuracy_cell, [*found, *[row["robust"]] * several]))
        marks = "P" * row.get("pareto", False) + "*" * (row["name"] == results["chosen"])
        rows.append(TableRow((row["name"], marks), cells))
    heads = [head_of(column if len(results["norms"]) == 1 else f"{norm}/{column}") for norm, column in columns]
    notes = [f"CAUTION: {row['name']}: {finding}" for row in part["rows"] for finding in row["findings"]]
    notes.append("accuracy in % with its 95 % Wilson interval; P: Pareto-optimal among the mixtures on these images")
    if several:
        meaning = "survives every attack in every norm" if len(results["norms"]) > 1 else "the lowest column of the row"
        notes.append(f"robust: {meaning}")
    if columns and all(column in BY_GRADIENTS for _, column in columns):
        notes.append("NOTE: only attacks that follow gradients were run, and mixtures can hide gradients: add square")
    if results["chosen"]:
        text = f"largest natural + robust accuracy on the {CHOSEN_ON} images; nothing is chosen on test images"
        notes.append(f"*: {text}")
    elif split == "test":
        text = f"picked on test images; --split {CHOSEN_ON},test picks honestly"
        notes.append(f"a mixture picked from this table is {text}")
    if results["theta_g_selected_on"] == "test":
        notes.append("NOTE: theta_g's epoch was chosen on the test images (evaluation.select_on: test)")
    threats = ", ".join(str(ThreatModel.of(threat)) for threat in part["protocol"]["threats"])
    statistics = {"mix": "mixed", "reestimate": "re-estimated"}[results["batch_norm"]]
    title = f"{results['run']}: {part['protocol']['data']['examples']} {split} images of {results['data']}, {threats}"
    title = printable(f"{title}; BatchNorm statistics {statistics}")
    heads = ("NAT", *heads, *["robust"] * several)
    return Table(name, title, ("model", "marks"), heads, tuple(rows), tuple(notes))


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_split(results: dict, split: str) -> dict[str, dict]:
    """Draws the figures of one split, each {"png": bytes, "svg": bytes}.

    "over_gamma" (where the run has gamma) shows accuracies over gamma with their 95 % intervals, "against" robust over
    natural accuracy.

    Raises:
        MissingMatplotlib: matplotlib is not installed.
    """
    part, gamma_of, chosen = results["splits"][split], results["gamma_of"], results["chosen"]
    mixtures = [row for row in part["rows"] if row["kind"] == "mixture"]
    if gamma_of:
        mixtures.sort(key=lambda row: Fraction(row["weights"][gamma_of]))
    others = [row for row in part["rows"] if row["kind"] in KINDS]
    protocol = part["protocol"]
    threats = ", ".join(f"{threat['norm']} {threat['epsilon']}" for threat in protocol["threats"])
    title = f"{label_text(results['run'])}: {protocol['data']['examples']} {split.upper()} images, {threats}"

    def figure(paint, note=""):
        def whole(axes):
            paint(axes)
            axes.set_title(title + note, fontsize=8)
            legend_below(axes)

        return draw(whole, height=4)

    star = f"; * chosen on {CHOSEN_ON}" if chosen else ""
    against = figure(lambda axes: _against(axes, mixtures, others, gamma_of, chosen), f"; full: Pareto-optimal{star}")
    if not gamma_of:
        return {"against": against}
    return {"over_gamma": figure(lambda axes: _over_gamma(axes, mixtures, gamma_of)), "against": against}


def _columns(row):
    return {f"{head_of(column)} ({norm})": a for norm, of in row["columns"].items() for column, a in of.items()}


def _over_gamma(axes, mixtures, gamma_of):
    gammas = [float(Fraction(row["weights"][gamma_of])) for row in mixtures]
    columns = [{"natural": row["natural"]} | _columns(row) for row in mixtures]
    for number, name in enumerate(columns[0]):
        values, low, high = ([100 * of[name][key] for of in columns] for key in ("value", "low", "high"))
        marker = MARKERS[number % len(MARKERS)]
        (line,) = axes.plot(gammas, values, marker=marker, markersize=3.5, label=label_text(name))
        axes.fill_between(gammas, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel=f"gamma (weight of {gamma_of})", ylabel="accuracy, %")


def _against(axes, mixtures, others, is_curve, chosen):
    def place(row):
        return 100 * row["natural"]["value"], 100 * row["robust"]["value"]

    if is_curve:
        axes.plot(*zip(*map(place, mixtures)), "-", color=BLUE, linewidth=0.8, alpha=0.5, zorder=0)
    for row in mixtures:
        axes.plot(*place(row), "o", color=BLUE, fillstyle="full" if row["pareto"] else "none", markersize=5)
        if row["name"] == chosen:
            axes.plot(*place(row), "*", color=ORANGE, markersize=13, zorder=0)
        if len(mixtures) <= 12:
            name = label_text(row["name"].split(" = ")[0])
            axes.annotate(name, place(row), textcoords="offset points", xytext=(5, 3), fontsize=6)
    for row in others:
        marker, color = KINDS[row["kind"]]
        axes.plot(*place(row), marker, color=color, markersize=5, label=label_text(row["name"]), zorder=0)
    names = list(_columns(mixtures[0]))
    robust = f"accuracy under {names[0]}" if len(names) == 1 else "robust accuracy (see the table)"
    axes.set(xlabel="natural accuracy, %", ylabel=f"{robust}, %")
    axes.margins(0.15)
