"""What all objectives share."""

from genray.attacks import build_attack


class Objective:
    """A loss of one training step. Subclasses say what it is; most also which loss their attack maximises.

    Args:
        options: its section of the configuration.
    """

    attack_loss = "cross_entropy"
    chooses = False  # whether which attacks a step needs depends on draws or on what it carries from step to step

    def __init__(self, options):
        self.options = options

    def __call__(self, step):
        """(mean loss of the batch, logits (N, K) of the images trained on: for the record of the training accuracy).

        Args:
            step: a `TrainingStep`.
        """
        raise NotImplementedError

    def build_attacks(self, configs: dict) -> dict:
        """name -> attack (model, x, y, draw) -> adversarial images, from name -> `AttackConfig`."""
        return {name: build_attack(config, self.attack_loss) for name, config in configs.items()}

    def wanted(self, names: tuple, numbers) -> tuple:
        """Which of its attacks, all called by `names`, a step crafts; `numbers` as fresh as those of the step."""
        return names

    def state_dict(self) -> dict:
        """What it carries from step to step, as arrays and numbers; most carry nothing."""
        return {}

    def load_state_dict(self, state: dict):
        """Goes back to what `state_dict` gave."""
