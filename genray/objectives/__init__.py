"""What base learners minimise: one method a file, one registry entry."""

from genray.core.user_code import errors_as, find, is_own
from genray.errors import ConfigError
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


def build_objective(options, field: str = "objective") -> Objective:
    """The objective of a learner's `objective` section.

    Args:
        options: the section.
        field: its name, for errors.

    Raises:
        ConfigError: a user's class cannot be found or made.
    """
    if not is_own(options.name):
        return OBJECTIVES[options.name](options)
    kind = find(options.name, f"{field}.name")
    with errors_as(f"{field}: {options.name} cannot be made"):
        made = kind(**(options.options or {}))
    if not isinstance(made, Objective):
        raise ConfigError(
            f"{field}.name: expected a class derived from genray.objectives.Objective, got {options.name}"
        )
    return made
