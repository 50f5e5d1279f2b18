"""All actors of one run: started together or not at all, watched, and ended on every path out."""

import time
from contextlib import suppress

import ray
from ray.util.placement_group import remove_placement_group

from genray.errors import PlacementError
from genray.learners.local_run import evaluation_threads, learner_threads
from genray.runtime.actors import ACTOR_OPTIONS, BaseLearnerActor, EvaluatorActor, GlobalLearnerActor, pack
from genray.runtime.cluster import within
from genray.runtime.fetch import fetch
from genray.runtime.placement import Place, Placement, reserve, strategy_for

STOP_TIMEOUT_S = 15


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
        LostError: a process died meanwhile.
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
        self.group = self.placement.group or reserve(self.placement, self.timeouts.startup_timeout_s, self.on_wait)
        small, arrays = pack(self.setup)
        arrays, small = ray.put(arrays), ray.put(small)
        for name, place in self.placement.learners.items():
            threads = learner_threads(self.setup.config, name)
            create = self._creator(BaseLearnerActor, place)
            self.learners[name] = create(name, small, arrays, threads, self.states.get(name))
        self.global_learner = self._creator(GlobalLearnerActor, self.placement.global_learner)(small)
        threads = evaluation_threads(self.setup.config)
        self.evaluator = self._creator(EvaluatorActor, self.placement.evaluator)(small, arrays, threads)
        self.whereabouts = self._await_start(max(1.0, deadline - time.monotonic()))

    def _creator(self, cls, place: Place):
        actor = ray.remote(max_restarts=0, max_task_retries=0, **ACTOR_OPTIONS)(cls)
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
        return {name: self.fetch(ref, name) for name, ref in waiting.items()}

    @property
    def workers(self) -> dict:
        """Every actor that holds a network, by name."""
        return {**self.learners, "evaluator": self.evaluator}

    @property
    def everyone(self) -> dict:
        """Every actor by the name it has in messages."""
        learners = {f"base_learners.{name}": actor for name, actor in self.learners.items()}
        return {**learners, "global learner": self.global_learner, "evaluator": self.evaluator}

    def fetch(self, ref, who: str):
        """As `fetch`, with the run's time-out and names."""
        names = {actor._actor_id.hex(): name for name, actor in self.everyone.items()}
        return fetch(ref, who, timeout_s=self.timeouts.stall_timeout_s, names=names)

    def _stop(self):
        within(STOP_TIMEOUT_S, "the end of the actors", self._end_actors)
        self.learners, self.group, self.global_learner, self.evaluator = {}, None, None, None

    def _end_actors(self):
        for actor in [*self.learners.values(), self.global_learner, self.evaluator]:
            if actor is not None:
                with suppress(ValueError):  # never started
                    ray.kill(actor)
        if self.group is not None and self.placement.group is None:
            remove_placement_group(self.group)
