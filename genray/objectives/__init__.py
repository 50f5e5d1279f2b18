"""What base learners minimise: one method a file, one registry entry."""

from genray.config import schema
from genray.objectives.adversarial import Adversarial
from genray.objectives.natural import Natural

OBJECTIVES = {schema.NaturalObjective: Natural, schema.AdversarialObjective: Adversarial}


def build_objective(options):
    """The objective of a learner's `objective` section."""
    return OBJECTIVES[type(options)](options)
