"""All actors of one run: started together or not at all, and ended whenever the context exits."""

import secrets
import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from genray.errors import PlacementError
from genray.parallel.torch_groups import LOOPBACK, group_specs_of, worker_ranks
from genray.run.devices import evaluation_threads, learner_threads
from genray.runtime.ray.actors import ACTOR_OPTIONS, BaseLearnerActor, EvaluatorActor, GlobalLearnerActor, pack
from genray.runtime.ray.cluster import within
from genray.runtime.ray.fetch import fetch
from genray.runtime.ray.placement import ActorPlacement, Placement, reserve, strategy_for
from genray.runtime.ray.worker_group import WorkerGroup

STOP_TIMEOUT_S = 15


class ActorGroup:
    """The base learners, the global learner and the evaluator of a run, in one placement group.

    Use as a context manager: whatever happens inside, the actors and the placement group are gone afterwards.

    Args:
        setup: the prepared run.
        placement: bundle and resources of each actor.
        states: learner name -> state to start from, or empty.
        on_wait: as in `reserve`.
        splits: reference to the splits of `pack`; None puts them into the object store.

    Raises:
        PlacementError: the group could not be placed or its actors did not start in time.
        LostError: a process died meanwhile.
    """

    global_learner: Any  # handles of actors
    evaluator: Any

    def __init__(self, setup, placement: Placement, states: dict, on_wait=None, splits=None):
        self.setup, self.placement, self.states, self.on_wait = setup, placement, states, on_wait
        self.splits = splits
        self.timeouts = setup.config.runtime
        self.group = self.global_learner = self.evaluator = None
        self.learners, self.ranks, self.actors, self.in_step = {}, [], [], False
        self.namespace = f"genray-{secrets.token_hex(4)}"  # of the actors' names, which other runs may have too

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
        name = f"{self.setup.config.name} {self.namespace}"
        self.group = self.placement.group or reserve(
            self.placement, self.timeouts.startup_timeout_s, self.on_wait, name
        )
        small, splits = pack(self.setup)
        splits, small = self.splits or ray.put(splits), ray.put(small)
        workers = {name: len(places) for name, places in self.placement.learners.items()}
        self.ranks = worker_ranks(workers, self.timeouts.share_attack)
        for worker in self.ranks:
            threads = learner_threads(self.setup.config, self.setup.architecture, worker.learner)
            place = self.placement.learners[worker.learner][worker.rank]
            create = self._creator(BaseLearnerActor, place, worker.name)
            self.actors.append(create(worker, small, splits, threads, self.states.get(worker.learner)))
        for name in workers:
            actors = [actor for actor, worker in zip(self.actors, self.ranks) if worker.learner == name]
            self.learners[name] = WorkerGroup(actors, f"{self.setup.config.name}: {name}")
        self.global_learner = self._creator(GlobalLearnerActor, self.placement.global_learner, "global learner")(small)
        threads = evaluation_threads(self.setup.config, self.setup.architecture)
        self.evaluator = self._creator(EvaluatorActor, self.placement.evaluator, "evaluator")(small, splits, threads)
        asked = {name: actor.whereabouts.remote() for name, actor in self.workers.items()}
        self.whereabouts = self._answers(asked, max(1.0, deadline - time.monotonic()), "not started within {}")
        self._connect(max(1.0, deadline - time.monotonic()))

    def _creator(self, cls, place: ActorPlacement, who: str):
        actor = ray.remote(max_restarts=0, max_task_retries=0, **ACTOR_OPTIONS)(cls)
        strategy = strategy_for(self.group, place)
        named = {"name": f"{self.setup.config.name}: {who}", "namespace": self.namespace}
        return actor.options(
            num_cpus=place.num_cpus, num_gpus=place.num_gpus, scheduling_strategy=strategy, **named
        ).remote

    def _answers(self, asked, timeout_s, problem) -> dict:
        """Actor name -> answer; PlacementError with `problem` if an actor does not answer in time."""
        _, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
        if late:
            names = ", ".join(name for name, ref in asked.items() if ref in late)
            limit = f"runtime.startup_timeout_s ({self.timeouts.startup_timeout_s:g} s)"
            raise PlacementError(f"{names}: {problem.format(limit)}")
        return {name: self.fetch(ref, name) for name, ref in asked.items()}

    def _connect(self, timeout_s):
        """Connects the process groups of the learners' actors."""
        there = [self.whereabouts[name] for name in self._names()]
        found = group_specs_of(self.ranks, there)
        self.in_step = bool(found)
        if not found:
            return
        # Actors on one machine communicate over loopback, so that nothing else listens on the network.
        one_node = len({where["node"] for where in there}) == 1
        addresses = [LOOPBACK if one_node else where["address"] for where in there]
        meeting = self.actors[0].open_store.remote(addresses[0])
        joined = {
            worker.who: actor.join.remote(found, meeting, address)
            for worker, actor, address in zip(self.ranks, self.actors, addresses)
        }
        self._answers(joined, timeout_s, "could not connect within {}; their nodes have to reach each other")

    def _names(self):
        """Names of the learners' actors, without `base_learners.`."""
        return [worker.name for worker in self.ranks]

    @property
    def workers(self) -> dict:
        """Every actor that holds a network, by name."""
        return {**dict(zip(self._names(), self.actors)), "evaluator": self.evaluator}

    @property
    def everyone(self) -> dict:
        """Every actor, by its name in messages."""
        learners = {worker.who: actor for worker, actor in zip(self.ranks, self.actors)}
        return {**learners, "global learner": self.global_learner, "evaluator": self.evaluator}

    def fetch(self, ref, who: str):
        """As the function `fetch`, with the run's time-out and the actors' names."""
        names = {actor._actor_id.hex(): name for name, actor in self.everyone.items()}
        return fetch(ref, who, timeout_s=self.timeouts.stall_timeout_s, names=names)

    def _stop(self):
        within(STOP_TIMEOUT_S, "the end of the actors", self._end_actors)
        self.learners, self.actors, self.group, self.global_learner, self.evaluator = {}, [], None, None, None

    def _end_actors(self):
        for actor in [*self.actors, self.global_learner, self.evaluator]:
            if actor is not None:
                with suppress(ValueError):  # never started
                    ray.kill(actor)
        if self.group is not None and self.placement.group is None:
            remove_placement_group(self.group)
