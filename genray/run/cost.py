"""The cost model of all plans and estimates: passes of images through the network."""

from dataclasses import dataclass

from genray.config.schema import BaseLearnerConfig
from genray.core.user_code import is_own
from genray.objectives import build_objective
from genray.run.plan import RunPlan


@dataclass(frozen=True)
class Passes:
    """Attributes:
    training: forward and backward to the weights.
    attack: forward and backward to the images.
    forward: forward alone.
    """

    training: float = 0.0
    attack: float = 0.0
    forward: float = 0.0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.training + other.training, self.attack + other.attack, self.forward + other.forward)

    def __mul__(self, number: float) -> "Passes":
        return Passes(self.training * number, self.attack * number, self.forward * number)

    @property
    def units(self) -> float:
        """In passes that train: a forward pass and a backward pass to images or to weights are a third of one each."""
        return self.training + (2 * self.attack + self.forward) / 3


def attack_passes(learner: BaseLearnerConfig) -> Passes:
    """To make the adversarial images of one image in a step; with `tau` (FAT) as if it took all steps."""
    objective, attacks = learner.objective, learner.all_attacks.values()
    number = len(attacks)
    every = sum((Passes(0, a.num_steps + bool(a.radius_clip), a.algorithm == "apgd") for a in attacks), Passes())
    if objective.name in ("adversarial", "rst", "trades") and not objective.beta:
        return Passes()
    if objective.name == "msd":  # one gradient a step, and a candidate of each norm
        steps = max(attack.num_steps for attack in attacks)
        return Passes(0, steps, steps * number)
    if objective.name in ("sat", "e_at"):  # one attack a step, each equally often on average
        return every * (1 / number)
    judged = number if objective.name == "max" and number > 1 else 0
    return every + Passes(forward=judged + (objective.name == "trades"))  # the KL of TRADES needs the clean logits


def step_passes(learner: BaseLearnerConfig, *, perturbed: bool = True) -> Passes:
    """Of one image in a training step.

    Args:
        perturbed: with AWP, after its warm-up: the loss is computed twice.
    """
    objective, own = learner.objective, is_own(learner.objective.name)
    beta = getattr(objective, "beta", None)
    batches = {"mart": 2, "iat": 2, "avg": len(learner.all_attacks), "trades": 2 if beta else 1}.get(objective.name, 1)
    if objective.name in ("adversarial", "rst") and beta not in (0, 1):  # the clean batch too
        batches = 2
    batches = build_objective(objective).passes if own else batches
    target = Passes(forward=learner.target is not None)
    return attack_passes(learner) + target + Passes(training=batches * (2 if learner.awp and perturbed else 1))


@dataclass(frozen=True)
class RunCost:
    """Attributes:
    learners: name -> passes of its training.
    evaluations: passes of the evaluations after epochs, if every image resists.
    table: passes of the final table of all models on the test images, likewise.
    """

    learners: dict[str, Passes]
    evaluations: Passes
    table: Passes


def run_cost(plan: RunPlan, splits: dict) -> RunCost:
    """Passes of a whole run.

    Args:
        plan: the run's plan.
        splits: "validation" and "test" -> the `Split`; only its length is used.
    """
    config, evaluation = plan.config, plan.config.evaluation
    norms = {attack.norm for learner in config.base_learners.values() for attack in learner.all_attacks.values()}
    judged = Passes(0, evaluation.attack.num_steps, 2)  # the clean image, the attack, the attacked image
    after_epochs = sum(window.evaluate for window in plan.windows) * len(splits[evaluation.select_on])
    learners = len(config.base_learners)
    return RunCost(
        {name: _training(plan, name) for name in config.base_learners},
        judged * (after_epochs * (1 + learners * evaluation.base_learners)),
        judged * (len(splits["test"]) * (2 + learners) * len(norms | {evaluation.attack.norm})),
    )


def _training(plan, name):
    training, learner, epochs = plan.config.training, plan.config.base_learners[name], plan.epochs_trained(name)
    images = plan.steps_per_epoch * training.batch_size if training.drop_last else plan.num_train
    # AWP's warm-up is counted from the run's beginning, like every schedule.
    warmup = min(epochs, max(0, learner.awp.warmup_epochs - learner.from_epoch)) if learner.awp else 0
    before, after = step_passes(learner, perturbed=False), step_passes(learner)
    return (before * warmup + after * (epochs - warmup)) * min(images, plan.num_train)


def table_in_steps(cost: RunCost, plan: RunPlan, actors: int) -> float:
    """Number of training steps that take as long as the final table.

    Args:
        cost: the run's.
        plan: its plan.
        actors: number that share the test images; with 1, a step trains all learners, evaluations included.
    """
    workers = plan.workers
    if actors > 1:
        training = max(passes.units / workers[name] for name, passes in cost.learners.items())
    else:
        training = sum(passes.units for passes in cost.learners.values()) + cost.evaluations.units
    return plan.total_steps * cost.table.units / actors / training
