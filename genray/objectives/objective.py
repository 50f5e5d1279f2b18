"""The base class of objectives."""

from genray.attacks import build_attack


class Objective:
    """The loss of a training step, and the loss that its attack maximises.

    A user's class takes its own options as keyword arguments instead.

    Args:
        options: the objective's section of the configuration.

    Attributes:
        attacks: of a user's class: "none", "one" (the learner's `attack`) or "several" (its `attacks`).
        passes: of a user's class: how often the batch goes through the network and back in a step, attacks apart.
    """

    attacks = "one"
    passes: float = 1

    attack_loss = "cross_entropy"
    uses_target = False  # whether a step has the logits of a target network, which its attacks get too
    chooses = False  # whether the attacks of a step depend on the objective's state

    def __init__(self, options=None):
        self.options = options

    def __call__(self, step):
        """(mean loss of the batch, logits (N, K) of the training images, for the training accuracy).

        Args:
            step: a `TrainingStep`.
        """
        raise NotImplementedError

    def build_attacks(self, configs: dict) -> dict:
        """name -> attack (model, x, y, draw) -> adversarial images, from name -> `AttackConfig`."""
        places = {name: name if name == "attack" else f"attacks.{name}" for name in configs}
        return {name: build_attack(config, self.attack_loss, places[name]) for name, config in configs.items()}

    def wanted(self, names: tuple, numbers) -> tuple:
        """The attacks of `names` that this step needs. `numbers`: a generator in the same state as `step.numbers`."""
        return names

    def state_dict(self) -> dict:
        """State kept from step to step, as arrays and numbers; empty for most objectives."""
        return {}

    def load_state_dict(self, state: dict):
        """Restores a state returned by `state_dict`."""
