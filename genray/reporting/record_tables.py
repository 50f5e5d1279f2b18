"""Tables of runs and evaluations: the seconds of each learner, and the protocol of each attack."""

from genray.reporting import run_plots
from genray.reporting.found import Run
from genray.tables import Cell, Table, TableRow, head_of, printable
from genray.types import ThreatModel


def time_table(measured: dict) -> Table:
    """Run -> learner -> part -> seconds."""
    rows = []
    for run, of in measured.items():
        for learner, parts in of.items():
            cells = tuple(Cell(f"{parts[part]:.1f}") for part in run_plots.PARTS)
            rows.append(TableRow((run, learner), cells))
    notes = (
        "seconds; attack: crafting adversarial images; step: the rest of the optimiser steps; averaging: the learner's "
        "average and its share of theta_g; transfer: copying weights out of and into the device's memory at the end of "
        "a window; waiting: from one window to the next apart from that (for theta_g, for others; with --runtime local "
        "for the other learners' turns and for evaluations)",
        "on a GPU attack and averaging are measured in the first 32 steps of every window and scaled up",
    )
    return Table("time", "Seconds of each learner", ("run", "learner"), run_plots.PARTS, tuple(rows), notes)


def attacks_table(protocol: dict, threat: dict, labels) -> Table:
    """Returns a table of the attacks behind the columns of an evaluation."""
    rows = []
    for attack in threat["attacks"]:
        size = attack.get("step_size")
        cells = [attack["num_steps"], "" if size is None else f"{size:.6g}", attack.get("restarts", ""),
                 attack.get("passes", ""), attack.get("queries", "")]  # fmt: skip
        rows.append(
            TableRow((head_of(attack["name"]), str(attack.get("loss", ""))), tuple(Cell(str(c)) for c in cells))
        )
    title = f"{ThreatModel.of(threat)}, protocol {protocol['hash']}"
    data = protocol["data"]
    of = f"of {printable(', '.join(dict.fromkeys(labels)), 160)}"
    what = f"{data['examples']} {data.get('split', '')} images of {data['source']}"
    what += f" (fingerprint {data['fingerprint']})" if data.get("fingerprint") else ""
    how = f"blocks of {protocol.get('block_size', '?')}, engine {protocol['engine']}, seed {protocol['seed']}"
    heads = ("steps", "step size", "restarts", "passes", "queries")
    name = f"protocol_{protocol['hash']}_{threat['norm']}"
    return Table(name, printable(title), ("attack", "loss"), heads, tuple(rows), (f"{of}; {what}, {how}",))


def versions_line(run: Run) -> str:
    found = run.results["versions"]
    packages = [f"{key} {printable(found[key], 60)}" for key in ("genray", "torch", "ray", "python") if found.get(key)]
    devices = found.get("devices")
    names = dict.fromkeys(map(str, devices)) if isinstance(devices, list) else ()
    return f"computed with {', '.join(packages)}" + (f"; on {printable(', '.join(names), 120)}" if names else "")
