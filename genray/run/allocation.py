"""How many devices each learner gets, so that all of them finish a window at about the same time."""

import math

from genray.config.schema import BaseLearnerConfig, RunConfig

WITHIN = 1e-9  # relative: costs that are equal but for rounding


def divide(costs: dict, devices: int, *, most: int | None = None) -> dict:
    """Devices a learner, at least one each, such that the slowest takes as short as it can.

    n devices divide a learner's step by n. Of all divisions that are as fast the one with the fewest devices is taken:
    what is left speeds nobody up.

    Args:
        costs: learner name -> time of a step on one device.
        devices: how many there are; with fewer than learners, each gets one and they share.
        most: devices that one learner can use.

    Returns:
        Learner name -> number of devices.
    """
    most, given = most or devices, dict.fromkeys(costs, 1)
    for _ in range(devices - len(costs)):
        slowest = max(costs, key=lambda name: costs[name] / given[name])
        if given[slowest] >= most:
            break
        given[slowest] += 1
    slowest = max((costs[name] / n for name, n in given.items()), default=0.0)
    if not slowest:
        return dict.fromkeys(costs, 1)
    return {name: min(n, max(1, math.ceil(costs[name] / slowest * (1 - WITHIN)))) for name, n in given.items()}


def idle_shares(costs: dict, devices: dict) -> dict:
    """Learner name -> share of the time that its devices wait for the slowest learner.

    Args:
        costs: as of `divide`.
        devices: learner name -> how many.
    """
    times = {name: cost / devices[name] for name, cost in costs.items()}
    slowest = max(times.values())
    return {name: 1 - time / slowest if slowest else 0.0 for name, time in times.items()}


def division_lines(costs: dict, devices: dict, unit: str = "s") -> list[str]:
    """The division in words, a line a learner."""
    idle = idle_shares(costs, devices)
    return [
        f"{name}: {n} worker{'s' * (n > 1)}, a step {costs[name] / n:.3g} {unit}, idle {100 * idle[name]:.0f} %"
        for name, n in devices.items()
    ]


def fixed_workers(config: RunConfig) -> dict:
    """Learner name -> how many actors train it; 1 where that is for the run to find out (auto)."""
    return {name: 1 if lr.workers == "auto" else lr.workers for name, lr in config.base_learners.items()}


def units(learner: BaseLearnerConfig) -> float:
    """Estimate of a step's cost in units: a forward pass of the batch, a backward pass to images, one to weights.

    An attack of K steps takes 2 K, an update 3 for each batch that it is made on.
    """
    return attack_units(learner) + 3 * _update_batches(learner) * (2 if learner.awp else 1)


def last_evaluation_in_steps(setup, actors: int) -> float:
    """How many training steps take as long as the final table of a run, estimated by units.

    Args:
        setup: the prepared run.
        actors: that divide the test images; with 1 a step trains all learners, and evaluates after each epoch.
    """
    config = setup.config
    image = 2 * config.evaluation.attack.num_steps + 2  # clean, under attack, and once more to see what came of it
    steps = {name: units(lr) * config.training.batch_size for name, lr in config.base_learners.items()}
    models = 2 + len(steps)  # theta_g of the best and of the last epoch
    if actors > 1:
        workers = fixed_workers(config)
        slowest = max(cost / workers[name] for name, cost in steps.items())
        return image * models * len(setup.splits["test"]) / actors / slowest
    judged = 1 + len(steps) * config.evaluation.base_learners
    images = len(setup.splits[config.evaluation.select_on]) * judged / config.evaluation.every_epochs
    a_step = sum(steps.values()) + image * images / setup.plan.steps_per_epoch
    return image * models * len(setup.splits["test"]) / a_step


def attack_units(learner: BaseLearnerConfig) -> float:
    """Of that, what making the adversarial images takes."""
    attacks, objective = learner.all_attacks.values(), learner.objective.name
    each = [2 * attack.num_steps + (attack.algorithm == "apgd") for attack in attacks]
    if objective in BY_BETA and not learner.objective.beta:
        return 0.0
    if objective == "msd":
        return max(attack.num_steps for attack in attacks) * (2.0 + len(each))
    if objective in ("sat", "e_at"):
        return sum(each) / len(each)
    judged = len(each) if objective == "max" and len(each) > 1 else 0
    return float(sum(each) + judged + (objective == "trades"))


BY_BETA = ("adversarial", "rst", "trades")  # beta 0: natural training


def _update_batches(learner) -> int:
    objective, beta = learner.objective.name, getattr(learner.objective, "beta", None)
    if objective in ("adversarial", "rst"):
        return 1 + (0 < beta < 1)
    if objective == "trades":
        return 2 if beta else 1
    if objective == "avg":
        return len(learner.all_attacks)
    return 2 if objective in ("mart", "iat") else 1


def plan_lines(config: RunConfig) -> list[str]:
    """How the work is divided, estimated by units, for the plan; nothing where each learner works for itself."""
    learners, fixed = config.base_learners, fixed_workers(config)
    costs = {name: units(learner) for name, learner in learners.items()}
    lines = []
    if config.runtime.share_attack:
        actors, attacks = sum(fixed.values()), sum(map(attack_units, learners.values()))
        updates = max((costs[name] - attack_units(learner)) / fixed[name] for name, learner in learners.items())
        together = attacks / actors + updates
        lines.append(
            f"attacks shared by {actors} actors: a step {together:.3g} units, estimated, "
            f"{sum(costs.values()) / together:.2f} times faster than one device"
        )
    elif any(learner.workers == "auto" for learner in learners.values()):
        auto = {name: costs[name] for name, learner in learners.items() if learner.workers == "auto"}
        lines.append("workers: auto is measured at the start; by estimate, with 2, 4 or 8 devices for them:")
        for devices in (2, 4, 8):
            lines.append("; ".join(division_lines(auto, divide(auto, devices), "units")))
    elif set(fixed.values()) != {1}:
        lines += division_lines(costs, fixed, "units, estimated")
    return lines


def worker_problems(workers: dict, smallest_batch: int) -> list[str]:
    """Whether every worker has an example of every batch: a line for each learner that has too many.

    Args:
        workers: learner name -> how many.
        smallest_batch: examples of the shortest batch of an epoch.
    """
    return [
        f"base_learners.{name}.workers: expected at most the {smallest_batch} images of an epoch's last batch, got {n} "
        "(training.drop_last leaves it out)"
        for name, n in workers.items()
        if n > smallest_batch
    ]
