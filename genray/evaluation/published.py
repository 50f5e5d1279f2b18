"""Published rows to print beside our own numbers."""

import csv
from fractions import Fraction
from pathlib import Path

from genray.config import objectives
from genray.config.schema import RunConfig
from genray.evaluation.suite import COLUMNS

FOLDER = Path(__file__).parent / "published"
COLUMN_OF = {"NAT": "natural"} | {column.replace("_", ""): column for column in COLUMNS}
# Radii and K of the tables: the paper's text says 8/255, its code 0.031.
THREATS = {"mnist": ({Fraction(3, 10)}, 40)}
THREAT = ({Fraction(8, 255), Fraction(31, 1000)}, 10)
# One learner's objective -> the row, when its attack takes all steps. A table without the first name has the second.
ROWS = {
    objectives.AdversarialObjective(beta=1.0): ("AT (beta=1)",),
    objectives.AdversarialObjective(beta=0.5): ("AT (beta=1/2)",),
    objectives.TradesObjective(beta=6.0): ("TRADES (lambda=6)", "TRADES"),
    objectives.TradesObjective(beta=1.0): ("TRADES (lambda=1)", "TRADES"),
    objectives.IatObjective(alpha=1.0): ("IAT",),
    objectives.RstObjective(beta=0.5, natural_weight=0.9, robust_weight=0.5): ("RST",),
}


def published_row(table: str, method: str) -> dict:
    """One row of a table of the papers.

    Args:
        table: name of a file in `published/`, for example "cifar10_resnet18".
        method: the row, for example "Generalist".

    Returns:
        {"row": label, "values": {column: per cent}}.

    Raises:
        KeyError: there is no such row.
    """
    with open(FOLDER / f"{table}.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == method:
                keys = {name: COLUMN_OF.get(name) or COLUMN_OF.get(name.lower().replace("_", "")) for name in row}
                values = {key: float(row[name]) for name, key in keys.items() if key}
                return {"row": f"published {method}", "values": values}
    raise KeyError(f"{table}: {method}")


def row_of_run(config: RunConfig, norm: str) -> dict | None:
    """The published row that a run repeats, or None: same data, full-size architecture, method, norm, radius and K."""
    data = config.data
    if norm != "linf" or config.model.width is not None or (data.train_examples, data.test_examples) != (None, None):
        return None
    table = f"{data.source}_{config.model.name.removesuffix('_10').replace('wrn_32', 'wrn32_10')}"
    for method in _methods(config):
        try:
            return published_row(table, method)
        except (KeyError, FileNotFoundError):
            continue
    return None


def _methods(config) -> tuple[str, ...]:
    """The papers' names of a line-up of learners, the more exact one first; none for one they do not have."""
    learners, unlabeled = list(config.base_learners.values()), config.data.unlabeled
    if unlabeled and not (
        unlabeled.source == "fraction" and isinstance(learners[0].objective, objectives.RstObjective)
    ):
        return ()  # the tables' RST has most likely seen no more images than the others
    if any(learner.awp or learner.augmentation.cutout for learner in learners):
        return ()
    natural = [learner for learner in learners if learner.objective == objectives.NaturalObjective()]
    robust = [learner for learner in learners if _in_the_tables_ball(learner, config.data.source)]
    glob = config.global_learner
    if len(learners) == 1:
        if (glob.mix, glob.decay) != ("raw", 0):  # theta_g is an average of the network's weights: SEAT
            return ()
        return ("NT",) if natural else _row_of(robust[0]) if robust else ()
    pair = len(learners) == 2 and len(natural) == len(robust) == 1 and glob.sync_unit != "never"
    return ("Generalist",) if pair and _row_of(robust[0]) == ("AT (beta=1)",) else ()


def _in_the_tables_ball(learner, source):
    radii, num_steps = THREATS.get(source, THREAT)
    attack = learner.attack
    return attack is not None and attack.norm == "linf" and attack.epsilon in radii and attack.num_steps == num_steps


def _row_of(learner):
    if learner.attack.tau is None:
        return ROWS.get(learner.objective, ())
    stops_early = max(learner.attack.tau.values) < learner.attack.num_steps  # otherwise it is plain PGD
    return ("FAT",) if stops_early and learner.objective == objectives.AdversarialObjective() else ()
