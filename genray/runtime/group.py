"""All actors of one run: started together or not at all, watched, and ended on every path out."""

import time

import ray
from ray.util.placement_group import remove_placement_group

from genray.errors import GenrayError, LearnerError, PlacementError
from genray.learners.local_run import evaluation_threads, learner_threads
from genray.runtime.actors import LEARNER_OPTIONS, BaseLearnerActor, EvaluatorActor, GlobalLearnerActor, pack
from genray.runtime.placement import Place, Placement, reserve, strategy_for


class ActorGroup:
    """The base learners, the global learner and the evaluator of a run, in one placement group.

    Use as a context manager: whatever happens inside, the actors and the placement group are gone afterwards.

    Args:
        setup: the prepared run.
        placement: who goes where.
        states: learner name -> state to start from, or empty.
        on_wait: as in `reserve`.

    Raises:
        PlacementError: the group could not be placed or its actors did not start in time.
    """

    def __init__(self, setup, placement: Placement, states: dict, on_wait=None):
        self.setup, self.placement, self.states, self.on_wait = setup, placement, states, on_wait
        self.timeouts = setup.config.runtime
        self.group = self.global_learner = self.evaluator = None
        self.learners = {}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error):
        self._stop()

    def _start(self):
        deadline = time.monotonic() + self.timeouts.startup_timeout_s
        self.group = reserve(self.placement, self.timeouts.startup_timeout_s, self.on_wait)
        small, arrays = pack(self.setup)
        arrays, small = ray.put(arrays), ray.put(small)
        for name, place in self.placement.learners.items():
            threads = learner_threads(self.setup.config, name)
            create = self._creator(BaseLearnerActor, place, **LEARNER_OPTIONS)
            self.learners[name] = create(name, small, arrays, threads, self.states.get(name))
        self.global_learner = self._creator(GlobalLearnerActor, self.placement.global_learner)(small)
        threads = evaluation_threads(self.setup.config)
        self.evaluator = self._creator(EvaluatorActor, self.placement.evaluator)(small, arrays, threads)
        self.whereabouts = self._await_start(max(1.0, deadline - time.monotonic()))

    def _creator(self, cls, place: Place, **options):
        actor = ray.remote(max_restarts=0, max_task_retries=0, **options)(cls)
        strategy = strategy_for(self.group, place)
        return actor.options(num_cpus=place.num_cpus, num_gpus=place.num_gpus, scheduling_strategy=strategy).remote

    def _await_start(self, timeout_s) -> dict:
        waiting = {name: actor.whereabouts.remote() for name, actor in self.workers.items()}
        done, late = ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=timeout_s)
        if late:
            names = ", ".join(name for name, ref in waiting.items() if ref in late)
            raise PlacementError(
                f"{names}: not started within runtime.startup_timeout_s ({self.timeouts.startup_timeout_s:g} s)"
            )
        return {name: fetch(ref, name) for name, ref in waiting.items()}

    @property
    def workers(self) -> dict:
        """Every actor that holds a network, by name."""
        return {**self.learners, "evaluator": self.evaluator}

    def _stop(self):
        for actor in [*self.learners.values(), self.global_learner, self.evaluator]:
            if actor is not None:
                ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)
        self.learners, self.group, self.global_learner, self.evaluator = {}, None, None, None


def fetch(ref, who: str):
    """The value of a reference, with a failure turned into an error that names who failed.

    Raises:
        GenrayError: the actor's own error, or LearnerError where its process died.
    """
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, GenrayError):
            raise cause from None
        raise LearnerError(f"{who}: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayActorError as error:
        raise LearnerError(f"{who}: its process died: {_last_line(error)}") from None


def _last_line(error) -> str:
    """The part of a Ray error that says what happened: the cause in an actor's constructor, else its beginning."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    in_constructor = "creation task" in lines[0]
    return lines[-1] if in_constructor else " ".join(lines)[:300]
