"""Published rows to print beside our own numbers."""

import csv
from pathlib import Path

from genray.config.objectives import AdversarialObjective
from genray.config.schema import RunConfig
from genray.evaluation.suite import COLUMNS

FOLDER = Path(__file__).parent / "published"
COLUMN_OF = {"NAT": "natural"} | {column.replace("_", ""): column for column in COLUMNS}


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
    """The published row that a run repeats, or None: same data, full-size architecture, method and norm."""
    table = f"{config.data.source}_{config.model.name.removesuffix('_10').replace('wrn_32', 'wrn32_10')}"
    method = _method(config)
    if norm != "linf" or config.model.width is not None or config.data.train_examples is not None or method is None:
        return None
    try:
        return published_row(table, method)
    except (KeyError, FileNotFoundError):
        return None


def _method(config):
    """The papers' name of a line-up of learners; None for one they do not have."""
    learners = list(config.base_learners.values())
    robust = [learner for learner in learners if learner.is_robust]
    if any(learner.objective != AdversarialObjective() or learner.attack.norm != "linf" for learner in robust):
        return None
    return {(1, 0): "NT", (1, 1): "AT (beta=1)", (2, 1): "Generalist"}.get((len(learners), len(robust)))
