"""One run of APGD: its steps, its step sizes and the removal of broken examples (methods D4)."""

import torch

from genray.core import waiting
from genray.core.geometry import BALLS, l1_shrinkage

NUM_STEPS = 100
L1_STAGES = ((3, 30), (2, 30), (1, 40))  # (radius in epsilons, steps); only the last one's points count
MOMENTUM = 0.75  # weight of the new step against the one before
RISING_SHARE = 0.75  # rho: the step size stays if the loss rose in more than this share of the steps
FIRST_PERIOD, PERIOD_DECREASE, SHORTEST_PERIOD = 22, 3, 6  # steps between checkpoints, in % of all steps
L1_PERIOD = 4  # the same for l1
TINY = 1e-12
ROUNDING = 2**-22  # of pixels


class ApgdRun:
    """A run of APGD in linf or l2, or several at once; every tensor attribute has a row for each unbroken example.

    Of several runs, those after a run that breaks an example are invalid, because they would begin with fewer examples.

    Args:
        outcome: a `AttackBatch`; an `AttackState`, where breaks are recorded, if examples are to leave.
        at: (n,) positions of the examples to attack.
        target: (n,) classes.
        loss: of `LOSSES`.
        search: images -> logits, for gradients.
        number: of runs; `at` and `target` have the examples of one run after those of another.

    Attributes:
        valid: number of valid runs, from the first.
    """

    first_step = 2.0  # in epsilons

    def __init__(self, outcome, at, target, loss, search, number=1):
        self.outcome, self.at, self.target, self.loss, self.search = outcome, at, target, loss, search
        self.x, self.y = outcome.x[at], outcome.y[at]
        self.order, self.valid = torch.arange(len(at), device=at.device) // max(1, len(at) // number), number

    def run(self, noise):
        """Ascends from the point of the ball's surface in the direction of `noise` (n, d)."""
        epsilon = self.outcome.epsilon
        length = self.outcome.ball.length(noise)[:, None]
        self.ascend((self.x + epsilon * (noise / (length + TINY))).clamp_(0, 1), epsilon, NUM_STEPS)

    def ascend(self, start, epsilon, num_steps, exits=True):
        """Steps from `start` (n, d) in a ball of radius `epsilon`, a number or (n, 1); with `exits` broken examples are
        settled."""
        self.epsilon, self.point, self.num_steps = epsilon, start, num_steps
        self.step_size = torch.ones_like(start[:, :1]) * (self.first_step * epsilon)
        self._evaluate(exits)
        # The gradient as a copy: a compiled network overwrites what it gave at its next pass (CUDA graphs).
        self.best_point, self.best_gradient, self.best_loss = self.point, self.gradient.clone(), self.value
        self.begin()
        for i in range(num_steps):
            if len(self.at) == 0:
                return
            self.move(i)
            last = i + 1 == num_steps
            self._evaluate(exits, with_gradient=not last)
            better = self.value > self.best_loss
            self.best_loss = torch.where(better, self.value, self.best_loss)
            self._replace("best_", better, "")
            if not last:
                self.review(i)

    def _evaluate(self, exits, with_gradient=True):
        """The losses and gradients at the points, from one pass."""
        with torch.set_grad_enabled(with_gradient):
            point = self.point.detach().requires_grad_(with_gradient)
            logits = self.search(self.outcome.layout.images(point))
            value = self.loss(logits, self.y, self.target)
            if with_gradient:
                (self.gradient,) = torch.autograd.grad(value.sum(), point)
        self.value = value.detach()
        if exits:
            settled = self.outcome.settle(self.at, self.point, logits.argmax(1) != self.y)
            if settled is not None:
                staying, lost = settled
                self.valid = int(self.order[lost].min()) + 1
                self._keep(staying[self.order[staying] < self.valid])

    def _keep(self, rows):
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value[rows])

    def _replace(self, into, where, by):
        """Puts point and gradient of the prefix `by` in place of those of `into` in some examples."""
        for name in ("point", "gradient"):
            new, old = getattr(self, by + name), getattr(self, into + name)
            setattr(self, into + name, torch.where(where[:, None], new, old))

    def begin(self):
        """Initialises the step size rule before the first step."""
        self.previous_point = self.point
        # The package compares the first step's loss with 0.
        self.previous_loss, self.rises = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self.best_at_checkpoint, self.halved = self.best_loss, torch.ones_like(self.value, dtype=torch.bool)
        self.period = self._share_of_steps(FIRST_PERIOD)
        self.checkpoint = self.period - 1

    def _share_of_steps(self, percent):
        return max(percent * self.num_steps // 100, 1)

    def move(self, i):
        """Takes step i: a projected gradient step, averaged with the step before it."""
        share = MOMENTUM if i else 1.0
        direction = self.gradient.sign()
        if self.outcome.ball is BALLS["l2"]:
            direction = self.gradient / (self.outcome.ball.length(self.gradient)[:, None] + TINY)
        ahead = self._project(self.point + self.step_size * direction).sub_(self.point).mul_(share)
        memory = (self.point - self.previous_point).mul_(1 - share)
        self.previous_point = self.point
        self.point = self._project(ahead.add_(self.point).add_(memory))

    def _project(self, points):
        return self.outcome.ball.project(self.x, points, self.epsilon)

    def review(self, i):
        """Updates the step sizes after step i; at a checkpoint, stagnant examples return to the best point with half
        the step."""
        self.rises = self.rises + (self.value > self.previous_loss)
        self.previous_loss = self.value
        if i != self.checkpoint:
            return
        stagnant = self.rises <= RISING_SHARE * self.period
        stagnant |= ~self.halved & (self.best_at_checkpoint >= self.best_loss)
        self.step_size = torch.where(stagnant[:, None], self.step_size / 2, self.step_size)
        self._replace("", stagnant, "best_")
        self.halved, self.best_at_checkpoint, self.rises = stagnant, self.best_loss, torch.zeros_like(self.rises)
        decrease, shortest = self._share_of_steps(PERIOD_DECREASE), self._share_of_steps(SHORTEST_PERIOD)
        self.period = max(self.period - decrease, shortest)
        self.checkpoint += self.period


class L1ApgdRun(ApgdRun):
    """A run of APGD in l1: sparse steps without momentum, in balls of radius 3, 2 and 1 epsilon.

    The additions of a step are in the package's order: pixels that a step moved and the projection moved back count as
    changed unless they come back exactly, and that sets the sparsity.

    Args:
        first_sparsity: share of the pixels that the first step moves; None: as many as the start suggests.
    """

    first_step = 1.0

    def __init__(self, *args, first_sparsity=None):
        super().__init__(*args)
        self.first_sparsity = first_sparsity

    def run(self, noise):
        radius = L1_STAGES[0][0] * self.outcome.epsilon
        point = self._shrunk(self.x + noise, radius)
        for number, (radii, num_steps) in enumerate(L1_STAGES, 1):
            radius = radii * self.outcome.epsilon
            start = self._shrunk(point, radius).clamp_(0, 1)
            self.ascend(start, radius, num_steps, exits=number == len(L1_STAGES))
            point = self.best_point

    def _shrunk(self, point, radius):
        """A start inside the ball.

        Pixels that come back but for rounding are set back. In the package rounding decides whether they count as
        changed, which makes the first steps up to nine times less sparse, and weaker.
        """
        point = point + l1_shrinkage(self.x, point - self.x, radius)
        return torch.where((point - self.x).abs() <= ROUNDING, self.x, point)

    def begin(self):
        if self.first_sparsity is None:
            self.support = self._changed(self.point)
            self.sparsity = self.support / self.x.shape[1] / 1.5
        else:
            self.support = torch.full_like(self.value, self.x.shape[1])
            self.sparsity = torch.full_like(self.value, self.first_sparsity)

    def _changed(self, point):
        return (point != self.x).sum(1)

    def move(self, i):
        """Takes a step of equal length in the coordinates of the largest gradients."""
        size, d = self.gradient.abs(), self.x.shape[1]
        skipped = ((1.0 - self.sparsity) * d).clamp_(0, d - 1).long()
        kept = d - skipped
        largest = size.topk(int(kept.max()) if waiting.reads_are_free(kept) else d, dim=1).values
        threshold = largest.gather(1, kept[:, None] - 1)
        direction = self.gradient.sign().mul_(size >= threshold)
        direction = self.step_size * direction / (direction.abs().sum(1, keepdim=True) + 1e-10)
        move = (self.point + direction).sub_(self.x)
        self.point = self.x + move + l1_shrinkage(self.x, move, self.epsilon)

    def review(self, i):
        """Updates the step sizes after a step; at a checkpoint, examples with a sparser best point return to it with
        the full step."""
        if (i + 1) % self._share_of_steps(L1_PERIOD):
            return
        support = self._changed(self.best_point)
        sparser = support / self.support < 0.95
        step_size = torch.where(sparser[:, None], self.epsilon, self.step_size / 1.5)
        self.step_size = step_size.clamp_(self.epsilon / 10, self.epsilon)
        self.sparsity, self.support = support / self.x.shape[1] / 1.5, support
        self._replace("", sparser, "best_")
