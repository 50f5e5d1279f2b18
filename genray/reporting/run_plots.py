"""Figures of how runs went: accuracies, learning rates and mixing weights over epochs, and where time went."""

from genray.reporting.found import Run
from genray.reporting.style import (
    COLOURS,
    GREY,
    HATCHES,
    INK,
    colours_of,
    draw,
    label_text,
    legend_below,
    whole_epochs,
)
from genray.tables import head_of

DASHES = ("-", "--", ":", "-.")
PARTS = ("attack", "step", "averaging", "transfer", "waiting")


def epochs(run: Run) -> dict:
    """Draws accuracies over epochs: theta_g on the selection images, learners on their training inputs.

    Returns:
        {"png": bytes, "svg": bytes}.
    """
    looks = colours_of(["theta_g", *run.config.base_learners])

    def paint(axes):
        _redistributions(axes, run.records)
        for name, dashes in (("natural", "-"), (None, "-")):
            curve = _theta_g(run.records, name)
            label = f"theta_g, {head_of(name or _attack_name(run.records))}"
            marker = "o" if name else "s"
            axes.plot(*curve, linestyle=dashes, color=COLOURS[0], marker=marker, markersize=3.5, label=label)
        for learner in run.config.base_learners:
            _own(axes, run, learner, looks[learner]["color"])
            points = [(r["epoch"], 100 * r["learners"][learner]["train_accuracy"]) for r in run.records
                      if learner in r["learners"] and "train_accuracy" in r["learners"][learner]]  # fmt: skip
            if points:
                axes.plot(*zip(*points), linestyle="--", linewidth=1, color=looks[learner]["color"],
                          label=label_text(f"{learner}, on what it trains on"))  # fmt: skip
        _at_the_end(axes, run, looks)
        best = run.records[-1].get("best_epoch") if run.records else 0
        if best:
            axes.axvline(best, color=INK, linewidth=0.8, linestyle=":", label=f"model.pt: epoch {best}", zorder=0)
        axes.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 103))
        whole_epochs(axes)
        legend_below(axes)

    return draw(paint, height=4.6)


def _attack_name(records):
    names = [name for record in records for name in record["global"] or {} if name != "natural"]
    return names[0] if names else "PGD"


def _theta_g(records, name):
    name = name or _attack_name(records)
    points = [(r["epoch"], 100 * r["global"][name]) for r in records if r["global"] and name in r["global"]]
    return tuple(zip(*points)) if points else ((), ())


def _own(axes, run, learner, color):
    """A base learner's own model over epochs, where it was evaluated: natural thin, under attack thin with squares."""
    split = run.config.evaluation.select_on
    names = dict.fromkeys(key for r in run.records for key in r["learners"].get(learner, {}))
    for name in (name for name in names if name.startswith(f"{split}_")):
        points = [(r["epoch"], 100 * r["learners"][learner][name]) for r in run.records
                  if name in r["learners"].get(learner, {})]  # fmt: skip
        attack = name.removeprefix(f"{split}_")
        axes.plot(*zip(*points), color=color, linewidth=1, marker="o" if attack == "natural" else "s", markersize=2,
                  label=label_text(f"{learner}, {head_of(attack)}"))  # fmt: skip


def _at_the_end(axes, run, looks):
    """Base learners' accuracies on the test images, where the run has ended: filled natural, hollow under attack."""
    last = run.records[-1]["epoch"]
    for learner, by_attack in (run.results or {"models": {}})["models"].items():
        if learner in run.config.base_learners:
            for attack, record in by_attack.items():
                fill = "full" if attack == "natural" else "none"
                axes.plot(last, 100 * record["value"], "D", color=looks[learner]["color"], fillstyle=fill, markersize=5,
                          label=label_text(f"{learner}, test, {head_of(attack)}"), clip_on=False)  # fmt: skip


def _redistributions(axes, records):
    """A grey line for every epoch in which theta_g was handed back."""
    before = 0
    for record in records:
        if record["redistributions"] > before:
            label = {} if before else {"label": "theta_g handed back"}
            axes.axvline(record["epoch"], color=GREY, linewidth=2.5, alpha=0.25, zorder=0, **label)
        before = record["redistributions"]


def schedules(run: Run) -> dict:
    """Draws mixing weights (gamma is the robust learner's) and learning rates over epochs."""
    looks = colours_of(["theta_g", *run.config.base_learners])

    def paint(panels):
        weights, rates = panels
        at = [record["epoch"] for record in run.records]
        for learner in run.config.base_learners:
            color = looks[learner]["color"]
            shares = [r["mixing_weights"].get(learner, float("nan")) for r in run.records]
            dashes = DASHES[list(run.config.base_learners).index(learner) % len(DASHES)]  # curves may coincide
            weights.plot(at, shares, dashes, color=color, label=label_text(learner))
            lr = [r["learners"].get(learner, {}).get("learning_rate", float("nan")) for r in run.records]
            rates.plot(at, lr, dashes, color=color)
        for axes in panels:
            _redistributions(axes, run.records)
        weights.set(ylabel="mixing weight", ylim=(-0.05, 1.05))
        rates.set(xlabel="epoch", ylabel="learning rate")
        whole_epochs(rates)
        rates.set_ylim(bottom=0)
        legend_below(weights, 3)

    return draw(paint, height=4, rows=2, share_x=True)


def grid_epochs(runs: list[Run]) -> dict:
    """Draws theta_g of all trials over epochs: natural above, under attack below; one colour a place."""
    looks = colours_of(dict.fromkeys(run.point for run in runs))

    def paint(panels):
        labelled = set()
        for run in runs:
            label = {} if run.point in labelled or len(looks) > 14 else {"label": label_text(run.point)}
            labelled.add(run.point)
            color = looks[run.point]["color"]
            dashes = DASHES[list(looks).index(run.point) // len(COLOURS) % 4]
            panels[0].plot(*_theta_g(run.records, "natural"), color=color, linestyle=dashes, linewidth=1, **label)
            panels[1].plot(*_theta_g(run.records, None), color=color, linestyle=dashes, linewidth=1)
        panels[0].set(ylabel="NAT, %")
        whole_epochs(panels[1])
        panels[1].set(xlabel="epoch", ylabel=f"{head_of(_attack_name([r for run in runs for r in run.records]))}, %")
        legend_below(panels[0])

    return draw(paint, height=4.8, rows=2, share_x=True)


# --- time -------------------------------------------------------------------------------------------------------------


def times(records: list[dict]) -> dict[str, dict[str, float]]:
    """Returns learner -> part -> seconds, summed over epochs; older records without these times are left out."""
    found = {}
    for record in records:
        for learner, values in record["learners"].items():
            if "attack_seconds" in values:
                sums = found.setdefault(learner, dict.fromkeys(PARTS, 0.0))
                step = values["seconds"] - values["attack_seconds"] - values["averaging_seconds"]
                for part in PARTS:
                    sums[part] += max(0.0, step) if part == "step" else values[f"{part}_seconds"]
    return found


def time_split(by_run: dict[str, dict[str, dict[str, float]]]) -> dict:
    """Draws bars of seconds, one a learner, divided into the parts of its time.

    Args:
        by_run: run -> learner -> part -> seconds.
    """
    bars = [
        (f"{run}\n{name}" if len(by_run) > 1 else name, parts)
        for run, of in by_run.items()
        for name, parts in of.items()
    ]

    def paint(axes):
        axes.grid(False, axis="y")
        for i, part in enumerate(PARTS):
            left = [sum(parts[p] for p in PARTS[:i]) for _, parts in bars]
            widths = [parts[part] for _, parts in bars]
            grey = {"color": GREY, "alpha": 0.45} if part == "waiting" else {"color": COLOURS[i]}
            axes.barh(range(len(bars)), widths, left=left, height=0.6, label=part, hatch=HATCHES[i],
                      edgecolor="#ffffff", linewidth=0.4, **grey)  # fmt: skip
        axes.set_yticks(range(len(bars)), ["\n".join(label_text(p, 24) for p in name.split("\n")) for name, _ in bars])
        axes.invert_yaxis()
        axes.set(xlabel="seconds")
        legend_below(axes, 5)

    return draw(paint, height=1.5 + 0.45 * len(bars))
