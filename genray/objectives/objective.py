"""The base class of objectives."""

from genray.attacks import build_attack


class Objective:
    """The loss of a training step, and the loss that its attack maximises.

    Args:
        options: the objective's section of the configuration.
    """

    attack_loss = "cross_entropy"
    uses_target = False  # whether a step has the logits of a target network, which its attacks get too
    chooses = False  # whether the attacks of a step depend on random numbers or on the objective's state

    def __init__(self, options):
        self.options = options

    def __call__(self, step):
        """(mean loss of the batch, logits (N, K) of the training images, for the training accuracy).

        Args:
            step: a `TrainingStep`.
        """
        raise NotImplementedError

    def build_attacks(self, configs: dict) -> dict:
        """name -> attack (model, x, y, draw) -> adversarial images, from name -> `AttackConfig`."""
        return {name: build_attack(config, self.attack_loss) for name, config in configs.items()}

    def wanted(self, names: tuple, numbers) -> tuple:
        """The attacks of `names` that this step needs. `numbers`: a generator in the same state as `step.numbers`."""
        return names

    def state_dict(self) -> dict:
        """State kept from step to step, as arrays and numbers; empty for most objectives."""
        return {}

    def load_state_dict(self, state: dict):
        """Restores a state returned by `state_dict`."""
