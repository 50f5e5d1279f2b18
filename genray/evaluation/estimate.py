"""Estimates the time of an evaluation: cost of the attacks, number of examples that reach each, measured speed.

An attack's cost for an example that resists is known in forward passes. Unknown are the seconds of a pass, the number
of examples that resist the members before it, and how early the others are broken. A short attack gives a first
estimate of all three; measurements of finished tasks replace it.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from genray.attacks import ExampleDraw, GradientAttack, temporary_mode
from genray.attacks.auto import MEMBERS, frozen
from genray.core.determinism import full_precision
from genray.evaluation.contract import device_of
from genray.evaluation.engines import copies_kept, lean_copy
from genray.evaluation.job import NATURAL, STAGE, BlockResult, Request, Task, as_pixels, fitting_threads
from genray.evaluation.robust import correct_flags
from genray.evaluation.suite import CASCADE, OWN, build_evaluation_attack

FORWARDS_A_PASS = 3  # a backward pass to the images costs about two forward passes
PILOT_STEPS, LEAST_PILOTS, MOST_PILOTS = 10, 10, 100
PILOT_FLOPS = 3e10  # of one forward pass of the examples of the pilot
UNSEEN = 0.6  # share of the correctly classified that resist the first member, without a pilot
PRIOR_EXAMPLES = 20  # weight of the prior, in examples
# Share of the examples that resist a member, of those that reach it; for the first one, the pilot measures it.
LEFT_BY = {"fab_t": 0.99, "square": 0.99}
LEFT_BY_TARGETS = 0.2  # APGD-T: the share of the first member to this power: 0.92 for robust networks, less for weak
# Cost of a broken example in that of one that resists: our code stops at once, the package completes its run.
COST_OF_THE_FALLEN = {"genray": 0.2, "genray-bf16": 0.2, "pyautoattack": 0.6}
WEIGHT = {}  # (engine, member) -> seconds of a pass, in those of APGD's
PATIENCE_S = 5.0  # a smaller delay of a task is ignored


def resisting_cost(request: Request, num_examples: int, num_classes: int) -> float:
    """Forward passes of an evaluation if every image resists."""
    return sum(num_examples * _price(request, norm, attack, num_classes) for norm, attack in _kinds(request))


def _kinds(request):
    """(norm, attack) of all tasks, cascade members included, in about the order of execution."""
    found, later = [("none", NATURAL)], {member: [] for member in CASCADE}
    for threat in request.threats:
        for attack in request.columns(threat.norm):
            if attack == "aa":
                for member in CASCADE:
                    later[member].append((threat.norm, f"{STAGE}{member}"))
            else:
                found.append((threat.norm, attack))
    return found + [key for keys in later.values() for key in keys]


def _price(request, norm, attack, num_classes) -> float:
    """Forward passes of an example that resists, with the one that judges it."""
    if attack == NATURAL:
        return 1.0
    _, described = build_evaluation_attack(attack.removeprefix(STAGE), request.settings(norm, num_classes))
    return 1.0 + FORWARDS_A_PASS * described.passes + described.queries


@dataclass(frozen=True)
class Look:
    """Measurements by a short attack before an evaluation.

    Attributes:
        seconds: of a forward pass of one example in a block.
        standing: norm -> share of the correctly classified examples that resist.
    """

    seconds: float
    standing: dict


def look(model, images, labels, request: Request) -> Look | None:
    """Attacks a few examples with PGD-10; None if no gradient-based member of AutoAttack is asked for.

    Args:
        model, images, labels, request: of the evaluation.
    """
    names = {name for threat in request.threats for name in request.columns(threat.norm)} - set(OWN)
    if names <= {"square"}:  # Square also runs on models without gradients
        return None
    device = device_of(model)
    with ExitStack() as state:
        fit, flops = state.enter_context(fitting_threads(model, images, device))
        for keep in (torch.no_grad(), temporary_mode(model, training=False), full_precision(), frozen(model)):
            state.enter_context(keep)
        state.enter_context(copies_kept(model))
        fit(min(request.block_size, len(labels)))
        number = int(min(request.block_size, MOST_PILOTS, max(LEAST_PILOTS, PILOT_FLOPS / flops)))
        x, y = as_pixels(images[:number]).to(device), labels[:number].to(device)
        right = correct_flags(model, x, y).to(device)
        x, y, standing, seconds = x[right], y[right], {}, 0.0
        if len(x) == 0:
            return None
        for threat in request.threats:
            attacked = lean_copy(model) if request.engine_of(threat.norm).startswith("genray") else model
            attack = GradientAttack(threat.norm, threat.radius, threat.radius / 4, PILOT_STEPS)
            x = x if attacked is model else x.contiguous(memory_format=torch.channels_last)
            attacked(x)  # the first pass of a model takes longer
            began = time.perf_counter()
            found = attack(attacked, x, y, ExampleDraw(request.seed, "look", list(range(len(x)))))
            standing[threat.norm] = float(correct_flags(model, found, y).float().mean())  # waits for a GPU
            seconds = seconds or time.perf_counter() - began
    return Look(seconds / (len(x) * (FORWARDS_A_PASS * PILOT_STEPS + 1)), standing)


@dataclass
class TaskTimes:
    """All tasks of an attack in a norm: the expectation, and the measurements of finished ones.

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
        self.clock, self.moved, self.seen, self.right = clock, None, None, {}
        self.kinds = {key: self._kind(*key, num_classes) for key in _kinds(request)}
        self.natural = self.kinds["none", NATURAL]

    def _kind(self, norm, attack, num_classes):
        name, price = attack.removeprefix(STAGE), _price(self.request, norm, attack, num_classes)
        if name not in MEMBERS:
            return TaskTimes(price)
        engine = self.request.engine_of(norm)
        leaves = LEFT_BY.get(name, UNSEEN) if attack.startswith(STAGE) else UNSEEN
        return TaskTimes(price * WEIGHT.get((engine, name), 1.0), COST_OF_THE_FALLEN[engine], leaves)

    def saw(self, seen: Look | None):
        """Takes the pilot's measurements; the first task begins now."""
        self.seen, self.moved = seen, self.clock()
        for (norm, _), kind in self.kinds.items():
            if seen and kind.leaves == UNSEEN:
                kind.leaves = seen.standing[norm]

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
        kind, flags = self.kinds[task.norm, task.attack], result.flags[task.attack]
        later_member = task.attack.startswith(STAGE) and task.attack != f"{STAGE}{CASCADE[0]}"
        attacked = len(flags) if task.attack == NATURAL or later_member else self.right.get(task.block, len(flags))
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
        """Seconds of an example's forward pass: by finished tasks, else by the pilot or the clean images."""
        passes = seconds = 0.0
        for kind in self.kinds.values():
            if kind.attacked and kind is not self.natural:
                passes, seconds = passes + kind.attacked * kind.passes, seconds + kind.seconds
        if passes:
            return seconds / passes
        if self.seen:
            return self.seen.seconds
        return self.natural.seconds / self.natural.attacked if self.natural.attacked else None

    def _attacked_later(self) -> dict:
        """(norm, attack) -> expected number of examples that are still to be attacked."""
        natural = self.natural
        clean = self.num_examples - natural.attacked
        share = natural.stood / natural.attacked if natural.attacked else 1.0
        right = natural.stood + clean * share
        reach, found = {}, {}
        for norm, attack in self.kinds:
            kind = self.kinds[norm, attack]
            of_all = self.num_examples if kind is natural else right
            wanted = reach.get(norm, right) if attack.startswith(STAGE) else of_all
            found[norm, attack] = max(0.0, wanted - kind.attacked)
            if attack == f"{STAGE}apgd_t":
                kind.leaves = self.kinds[norm, f"{STAGE}{CASCADE[0]}"].survival ** LEFT_BY_TARGETS
            if attack.startswith(STAGE):
                reach[norm] = kind.stood + found[norm, attack] * kind.survival
        return found
