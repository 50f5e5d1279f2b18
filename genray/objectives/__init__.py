"""What base learners minimise: one method a file, one registry entry."""

from genray.objectives.adversarial import Adversarial
from genray.objectives.anchor import Anchor
from genray.objectives.e_at import Eat
from genray.objectives.iat import Iat
from genray.objectives.mart import Mart
from genray.objectives.multi_norm import Average, Max, Msd, Stochastic
from genray.objectives.natural import Natural
from genray.objectives.objective import Objective
from genray.objectives.rst import Rst
from genray.objectives.step import TrainingStep
from genray.objectives.trades import Trades

__all__ = ["OBJECTIVES", "Objective", "TrainingStep", "build_objective"]

OBJECTIVES = {
    "natural": Natural,
    "adversarial": Adversarial,
    "anchor": Anchor,
    "trades": Trades,
    "mart": Mart,
    "iat": Iat,
    "rst": Rst,
    "max": Max,
    "avg": Average,
    "sat": Stochastic,
    "msd": Msd,
    "e_at": Eat,
}


def build_objective(options) -> Objective:
    """The objective of a learner's `objective` section."""
    return OBJECTIVES[options.name](options)
