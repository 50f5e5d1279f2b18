"""Estimates the time of an evaluation: cost of the attacks, number of examples that reach each, measured speed.

An attack's cost for an example that resists is known in forward passes. Unknown are the seconds of a pass, the number
of examples that resist the members before it, and how early the others are broken. The first estimate takes the seconds
of the clean images and usual values of the others; measurements of finished tasks replace them.
"""

import time
from dataclasses import dataclass
from itertools import zip_longest

from genray.attacks.auto import MEMBERS
from genray.attacks.transfer import STEPS, is_transfer
from genray.evaluation.job import NATURAL, STAGE, BlockResult, Request, Task
from genray.evaluation.suite import CASCADE, build_evaluation_attack

FORWARDS_A_PASS = 3  # a backward pass to the images costs about two forward passes
FIRST_LEAVES = 0.6  # share of the correctly classified examples that resist the first member
PRIOR_EXAMPLES = 20  # weight of the prior, in examples
# Share of the examples that resist a member, of those that reach it.
LEFT_BY = {"fab_t": 0.99, "square": 0.99}
LEFT_BY_TARGETS = 0.2  # APGD-T: the share of the first member to this power: 0.92 for robust networks, less for weak
# Cost of a broken example in that of one that resists: our code stops at once, the package completes its run.
COST_OF_THE_FALLEN = {"genray": 0.2, "genray-bf16": 0.2, "pyautoattack": 0.6}
PATIENCE_S = 5.0  # a smaller delay of a task is ignored


def resisting_cost(request: Request, num_examples: int, num_classes: int) -> float:
    """Forward passes of an evaluation if every image resists."""
    return sum(num_examples * _price(request, ball, attack, num_classes) for ball, attack in _kinds(request))


def _kinds(request) -> dict:
    """(ball, attack) of all tasks, cascade members included, in about the order of execution -> the stage before."""
    chains = request.chains()
    found: dict[tuple[str, str], tuple[str, str] | None] = {("none", NATURAL): None}
    for stages in zip_longest(*chains):
        found |= {stage: chain[chain.index(stage) - 1] if stage != chain[0] else None
                  for chain, stage in zip(chains, stages) if stage is not None}  # fmt: skip
    return found


def _price(request, ball, attack, num_classes) -> float:
    """Forward passes of an example that resists, with the one that judges it."""
    if attack == NATURAL:
        return 1.0
    if is_transfer(attack):  # of one network; a grid is planned before the networks are read
        return 1.0 + FORWARDS_A_PASS * STEPS
    _, described = build_evaluation_attack(attack.removeprefix(STAGE), request.settings(ball, num_classes))
    return 1.0 + FORWARDS_A_PASS * described.passes + described.queries


@dataclass
class TaskTimes:
    """All tasks of an attack in a ball: the expectation, and the measurements of finished ones.

    Attributes:
        price: forward passes of an example that resists.
        fallen: share of `price` that a broken example costs.
        leaves: expected share of examples that resist.
        attacked, stood, seconds: examples of finished tasks, those that resisted, and time.
    """

    price: float
    fallen: float = 1.0
    leaves: float = 1.0
    attacked: int = 0
    stood: int = 0
    seconds: float = 0.0

    @property
    def survival(self) -> float:
        return (self.stood + PRIOR_EXAMPLES * self.leaves) / (self.attacked + PRIOR_EXAMPLES)

    @property
    def passes(self) -> float:
        """Mean forward passes of an example, broken or not."""
        return self.price * (self.survival + (1 - self.survival) * self.fallen)


class TimeLeft:
    """Seconds until an evaluation ends, from the measurements so far; an update takes constant time.

    Args:
        request, num_examples, num_classes: the evaluation.
        together: tasks that run at the same time.
        clock: () -> seconds.
    """

    def __init__(self, request, num_examples, num_classes, together=1, clock=lambda: time.perf_counter()):
        self.request, self.num_examples, self.together = request, num_examples, together
        self.clock, self.moved, self.right = clock, None, {}
        self.before = _kinds(request)
        self.kinds = {key: self._kind(*key, num_classes) for key in self.before}
        self.natural = self.kinds["none", NATURAL]

    def _kind(self, ball, attack, num_classes):
        name, price = attack.removeprefix(STAGE), _price(self.request, ball, attack, num_classes)
        if name not in MEMBERS:
            return TaskTimes(price)
        engine = self.request.engine_of(self.request.balls()[ball].norm)
        leaves = LEFT_BY.get(name, FIRST_LEAVES) if attack.startswith(STAGE) else FIRST_LEAVES
        return TaskTimes(price, COST_OF_THE_FALLEN[engine], leaves)

    def stored(self, results: dict):
        """Adds stored results; returns them."""
        for task, result in results.items():
            self._count(task, result)
        return results

    def finished(self, task: Task, result: BlockResult):
        """Adds a result; its task ended now."""
        self._count(task, result)
        self.moved = self.clock()

    def _count(self, task, result):
        key, flags = (task.ball, task.attack), result.flags[task.attack]
        kind, is_later = self.kinds[key], self.before[key] is not None
        attacked = len(flags) if task.attack == NATURAL or is_later else self.right.get(task.block, len(flags))
        kind.attacked += attacked
        kind.stood += int(flags.sum())
        kind.seconds += result.seconds
        if task.attack == NATURAL:
            self.right[task.block] = int(flags.sum())

    # --- estimates --------------------------------------------------------------------------------------------------

    def share(self) -> float:
        """Finished fraction of the work, 0 to 1."""
        done = sum(kind.seconds for kind in self.kinds.values())
        left = self.left()
        return 0.0 if left is None else done / max(done + left * self.together, 1e-9)

    def left(self) -> float | None:
        """Remaining seconds; None until the model's speed is measured."""
        second = self._seconds_a_pass()
        if second is None:
            return None
        total, current = 0.0, None
        for key, number in self._attacked_later().items():
            kind = self.kinds[key]
            each = kind.seconds / kind.attacked if kind.attacked else second * kind.passes
            together = min(self.together, -(-number // self.request.block_size))
            total += number * each / max(1, together)
            current = min(number, self.request.block_size) * each if current is None and number >= 1 else current
        if self.moved is None or current is None:
            return total
        since = self.clock() - self.moved
        # If the current task takes longer than expected, so will the others.
        slower = max(1.0, (since + PATIENCE_S) / (current + PATIENCE_S))
        return max(0.0, total - min(since, current)) * slower

    def _seconds_a_pass(self):
        """Seconds of an example's forward pass: by finished attacks, else by the clean images."""
        passes = seconds = 0.0
        for kind in self.kinds.values():
            if kind.attacked and kind is not self.natural:
                passes, seconds = passes + kind.attacked * kind.passes, seconds + kind.seconds
        if passes:
            return seconds / passes
        return self.natural.seconds / self.natural.attacked if self.natural.attacked else None

    def _attacked_later(self) -> dict:
        """(ball, attack) -> expected number of examples that are still to be attacked."""
        natural = self.natural
        clean = self.num_examples - natural.attacked
        share = natural.stood / natural.attacked if natural.attacked else 1.0
        right = natural.stood + clean * share
        reach, found = {}, {}  # type: ignore[var-annotated]
        for (ball, attack), before in self.before.items():
            key = ball, attack
            kind = self.kinds[key]
            wanted = self.num_examples if kind is natural else right if before is None else reach[before]
            found[key] = max(0.0, wanted - kind.attacked)
            if attack == f"{STAGE}apgd_t":
                kind.leaves = self.kinds[ball, f"{STAGE}{CASCADE[0]}"].survival ** LEFT_BY_TARGETS
            reach[key] = kind.stood + found[key] * kind.survival
        return found
