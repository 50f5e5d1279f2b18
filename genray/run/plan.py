"""Steps, windows and schedules of a run, from its configuration and the number of its training images."""

from dataclasses import dataclass
from functools import cached_property

from genray.config.schema import RunConfig
from genray.core.schedules import RedistributionRule, Window, piecewise_linear, plan_windows


@dataclass(frozen=True)
class RunPlan:
    """Attributes:
    config: the run's configuration.
    num_train: training images an epoch, validation part excluded.
    steps_per_epoch, total_steps: optimiser steps of every base learner.
    windows: in order; they tile the run.
    """

    config: RunConfig
    num_train: int
    steps_per_epoch: int
    total_steps: int
    windows: tuple[Window, ...]

    @property
    def smallest_batch(self) -> int:
        """Images of an epoch's last batch."""
        size = self.config.training.batch_size
        return min(size, self.num_train - (self.steps_per_epoch - 1) * size)

    @property
    def workers(self) -> dict[str, int]:
        """Learner name -> number of actors that train it; 1 for `auto`, which is measured at the start."""
        return {name: 1 if lr.workers == "auto" else lr.workers for name, lr in self.config.base_learners.items()}

    def position(self, step: int) -> float:
        """The position of step `step` (from 0) at which schedules are evaluated, as a fraction of the run."""
        if self.config.training.schedules_by == "epoch":
            return (step // self.steps_per_epoch + 1) / self.config.training.epochs
        return step / self.total_steps

    def learning_rate(self, learner: str, step: int) -> float:
        return piecewise_linear(self._knots["lr", learner], self.position(step))

    def mixing_weight(self, learner: str, step: int) -> float:
        """w_k(s): the learner's share of theta_g at step s (gamma for the robust one).

        Before a learner's first step its weight is that of the learner it starts from.
        """
        return self._weight(learner, step) if step >= self._interval(learner)[0] else 0.0

    def _weight(self, learner, step):
        waiting = [n for n, of in self._sources.items() if of == learner and step < self._interval(n)[0]]
        own = piecewise_linear(self._knots["mixing", learner], self.position(step))
        return own + sum(self._weight(name, step) for name in waiting)

    def trains(self, learner: str, step: int) -> bool:
        """Whether the learner takes step `step`: from `from_epoch` on and before `until_epoch`."""
        start, stop = self._interval(learner)
        return start <= step < stop

    def takes_global(self, learner: str, step: int) -> bool:
        """Whether the learner loads theta_g after `step` steps: not before its first, nor once it has ended early."""
        start, stop = self._interval(learner)
        return start <= step and (step < stop or stop == self.total_steps)

    def epochs_trained(self, learner: str) -> int:
        """Number of epochs in which the learner takes steps."""
        start, stop = self._interval(learner)
        return (stop - start) // self.steps_per_epoch

    def hand_overs(self, step: int) -> list[tuple[str, str, str]]:
        """(learner, the other learner, "start_from" or "load_target"): whose averaged weights are loaded after `step`
        finished steps.

        A target is replaced at the learner's first step, and at the end of each epoch in which the other has trained:
        wherever checkpoints are.
        """
        learners = self.config.base_learners.items()
        first = [name for name in self.config.base_learners if 0 < step == self._interval(name)[0]]
        starts = [(name, self._sources[name], "start_from") for name in first]
        if step % self.steps_per_epoch:
            return starts
        targets = {name: lr.target.learner for name, lr in learners if lr.target is not None}
        return starts + [
            (name, of, "load_target")
            for name, of in targets.items()
            if of is not None and self.trains(name, step) and (name in first or self.trains(of, step - 1))
        ]

    def _interval(self, learner):
        """(first step, the step after the last)."""
        config, epochs = self.config.base_learners[learner], self.config.training.epochs
        until = epochs if config.until_epoch is None else config.until_epoch
        return config.from_epoch * self.steps_per_epoch, until * self.steps_per_epoch

    @cached_property
    def _sources(self):
        learners = self.config.base_learners.items()
        return {name: learner.starts_from for name, learner in learners if learner.starts_from is not None}

    def tau(self, learner: str, step: int) -> float:
        """The learner's tau at step `step`: attack steps after a misclassification (FAT)."""
        return piecewise_linear(self._knots["tau", learner], self.position(step))

    def attack_scale(self, learner: str, attack: str, step: int) -> float:
        """The factor on epsilon and step size of one of the learner's attacks at step `step`."""
        return piecewise_linear(self._knots["scale", learner, attack], self.position(step))

    @cached_property
    def _knots(self):
        """All schedules as floats, because they are read every step."""
        rates = {("lr", name): learner.lr for name, learner in self.config.base_learners.items()}
        weights = {("mixing", name): w for name, w in self.config.global_learner.mixing_weights.items()}
        taus = {
            ("tau", name): learner.attack.tau
            for name, learner in self.config.base_learners.items()
            if learner.attack is not None and learner.attack.tau is not None
        }
        scales = {
            ("scale", name, key): attack.scale
            for name, learner in self.config.base_learners.items()
            for key, attack in learner.all_attacks.items()
            if attack.scale is not None
        }
        every: dict = rates | weights | taus | scales
        return {k: tuple((float(at), float(v)) for at, v in s.knots) for k, s in every.items()}

    @property
    def num_redistributions(self) -> int:
        return sum(w.redistribute for w in self.windows)


def make_plan(config: RunConfig, num_train: int) -> RunPlan:
    """The plan of a run with `num_train` training images an epoch."""
    training, glob = config.training, config.global_learner
    full, rest = divmod(num_train, training.batch_size)
    steps_per_epoch = full if training.drop_last and full else full + bool(rest)
    rule = RedistributionRule(glob.warmup_epochs, glob.sync_every, glob.sync_unit)
    learners = config.base_learners.values()
    handed = {lr.from_epoch for lr in learners if lr.starts_from is not None}
    if any(lr.target is not None and lr.target.learner for lr in learners):
        handed.update(range(1, training.epochs))
    windows = plan_windows(
        epochs=training.epochs,
        steps_per_epoch=steps_per_epoch,
        rule=rule,
        evaluate_every=config.evaluation.every_epochs,
        checkpoint_every=config.checkpoint.every_epochs,
        checkpoint_steps=config.checkpoint.every_steps,
        boundaries=frozenset(epoch * steps_per_epoch for epoch in handed),
    )
    return RunPlan(config, num_train, steps_per_epoch, training.epochs * steps_per_epoch, tuple(windows))
