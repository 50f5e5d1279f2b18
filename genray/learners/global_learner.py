"""The global learner: theta_g as the sum of the base learners' shares."""

from genray.config.schema import RunConfig
from genray.core.flat import from_array, to_array
from genray.core.mixing import sum_shares
from genray.types import WeightSnapshot


class GlobalLearner:
    """Sums contributions into theta_g.

    The averaging itself happens inside the base learners (architecture section 2), so what is left is one sum a
    window. Shares are summed in the order of the configuration, wherever they come from: both runtimes round alike.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RunConfig):
        self.names = tuple(config.base_learners)
        robust = [name for name, learner in config.base_learners.items() if learner.is_robust]
        # Integer buffers (BatchNorm's step counters) cannot be averaged; they are the robust learner's (methods A1).
        self.counter_index = self.names.index(robust[0] if robust else self.names[0])

    def combine(self, contributions: list[WeightSnapshot]) -> WeightSnapshot:
        """theta_g from one contribution of each base learner, in the order of the configuration.

        Raises:
            ValueError: a contribution is missing, of another step or of another architecture.
        """
        if len(contributions) != len(self.names):
            raise ValueError(f"expected {len(self.names)} contributions, got {len(contributions)}")
        steps = {name: c.step for name, c in zip(self.names, contributions)}
        if len(set(steps.values())) != 1:
            raise ValueError(f"expected contributions of one step, got {steps}")
        if len({c.weights.shape for c in contributions}) != 1:
            raise ValueError(f"expected contributions of one size, got {[c.weights.shape for c in contributions]}")
        total = to_array(sum_shares([from_array(c.weights) for c in contributions]), copy=False)
        return WeightSnapshot(contributions[0].step, total, contributions[self.counter_index].counters.copy())
