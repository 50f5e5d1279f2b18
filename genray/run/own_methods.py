"""Tries the user's objectives and attacks before a run: mistakes are one line, and nothing is written."""

import torch

from genray.attacks import FriendlyAttack, StreamDraw
from genray.core.rng import generator, host_generator
from genray.core.user_code import errors_as, is_own
from genray.errors import ConfigError
from genray.objectives import TrainingStep, build_objective

WANTED = {"none": "no attack", "one": "one `attack`", "several": "`attacks`"}


def try_own_methods(network: torch.nn.Module, setup):
    """Computes the loss of a batch for each learner with an objective or attack of the user's.

    Args:
        network: of the run; its buffers may change.
        setup: the `RunSetup`.

    Raises:
        ConfigError: an objective or attack fails, or does not fit the configuration.
    """
    for name, learner in setup.config.base_learners.items():
        try:
            _try_learner(learner, network, setup)
        except ConfigError as error:
            raise ConfigError([f"base_learners.{name}.{problem}" for problem in error.problems]) from error


def _try_learner(learner, network, setup):
    objective = build_objective(learner.objective)
    attacks = objective.build_attacks(learner.all_attacks)
    own = is_own(learner.objective.name)
    if own and objective.attacks != learner.wants:
        wanted = WANTED.get(objective.attacks, objective.attacks)
        raise ConfigError(f"objective: expected {wanted} for {learner.objective.name}, got {WANTED[learner.wants]}")
    if own or any(is_own(attack.algorithm) for attack in learner.all_attacks.values()):
        with torch.random.fork_rng(devices=[]):
            _try(objective, attacks, network.train(), setup, learner.objective.name * own)


def _try(objective, attacks, network, setup, name):
    number, device = min(2, setup.plan.smallest_batch), next(network.parameters()).device
    x = torch.full((number, *setup.splits["train"].shape), 0.5, device=device)
    y = torch.zeros(number, dtype=torch.long, device=device)

    def draw():
        return StreamDraw(generator(device, 0))

    def craft(key):
        values = {"tau": 0} if isinstance(attacks[key], FriendlyAttack) else {}
        return attacks[key](network, x, y, draw(), **values)

    step = TrainingStep(network, x, y, craft, draw, lambda: host_generator(0))
    if not name:
        for key in attacks:
            craft(key)
        return
    with errors_as(f"objective: {name} failed on a batch", torch.OutOfMemoryError):
        result = objective(step)
    if not _is_loss(result, (number, len(setup.class_names))):
        raise ConfigError(
            f"objective: expected {name} to return (a finite loss with gradients, logits "
            f"{(number, len(setup.class_names))}), got {_described(result)}"
        )


def _is_loss(result, shape):
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(part, torch.Tensor) for part in result):
        return False
    loss, logits = result
    return loss.shape == () and loss.requires_grad and bool(loss.isfinite()) and tuple(logits.shape) == shape


def _described(result):
    if not isinstance(result, tuple):
        return type(result).__name__
    said = [f"{tuple(p.shape)} {p.dtype}" if isinstance(p, torch.Tensor) else type(p).__name__ for p in result]
    loss = result[0] if result else None
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        said[0] = f"{loss.item():g}{'' if loss.requires_grad else ' without gradients'}"
    return f"({', '.join(said)})"
