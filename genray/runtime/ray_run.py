"""Generalist on Ray: the driver submits windows ahead and only watches; learners and theta_g talk to each other."""

import time
from collections import deque
from dataclasses import dataclass, field

import ray
from ray.util import ActorPool

from genray.errors import LearnerError
from genray.evaluation import chunks, join_flags
from genray.runtime.cluster import connected
from genray.runtime.group import ActorGroup, fetch
from genray.runtime.placement import make_placement
from genray.types import WeightSnapshot

POLL_S = 0.2
STATE_COPIES = 5  # weights, average, share and up to two optimiser moments
BYTES_PER_GIB = 2**30


def run_on_ray(setup, make_recorder, progress, state: dict | None = None, address: str | None = None) -> dict:
    """Trains all base learners at the same time, each in its own actor, and evaluates the result.

    Args:
        setup: the prepared run.
        make_recorder: devices -> `RunRecorder`; called once the actors stand, before the first step.
        progress: a `Progress`.
        state: a checkpoint to go on from.
        address: None for a private Ray on this machine, "auto" or "host:port" for a cluster.

    Returns:
        The final record (`results.json`).

    Raises:
        PlacementError, LearnerError, NonFiniteError: the cluster, an actor's process or a learner's numbers fail.
    """
    wanted = sum(learner.resources.num_cpus for learner in setup.config.base_learners.values())
    with connected(address, num_cpus=wanted) as may_grow:
        placement = make_placement(setup.plan, setup.weight_bytes, ray.available_resources())
        states = state["learners"] if state else {}
        with ActorGroup(setup, placement, states, on_wait=progress.say if may_grow else None) as group:
            recorder = make_recorder([f"{name}: {w['name']}" for name, w in group.whereabouts.items()])
            pipeline = Pipeline(setup, group, recorder, progress, state)
            theta_g = pipeline.run()
            return _judge(setup, group, recorder, progress, theta_g)


@dataclass
class InFlight:
    """A submitted window and the references to what comes of it."""

    window: object
    nbytes: int
    stats: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)
    theta_g: object = None
    scores: object = None
    shipped: object = None

    def refs(self) -> list:
        return [r for r in [*self.stats.values(), *self.states.values(), self.theta_g, self.scores] if r is not None]


class Pipeline:
    """Submits windows ahead, books them in order as they finish.

    Calls on one learner are chained by references: each takes a (tiny) result of the call before it as `after`, so
    their order is the algorithm's, and a learner waits for another only where theta_g is handed back.
    """

    def __init__(self, setup, group: ActorGroup, recorder, progress, state):
        self.setup, self.group, self.recorder, self.progress = setup, group, recorder, progress
        self.after = dict.fromkeys(group.learners)
        self.waiting = deque(setup.plan.windows[state["next_window"] if state else 0 :])
        self.in_flight = deque()
        self.theta_g = WeightSnapshot(**state["theta_g"]) if state else None
        self.budget = setup.config.runtime.max_ahead_gib * BYTES_PER_GIB
        self.unit = setup.weight_bytes
        self.watch = Watch(group, setup.config.runtime.stall_timeout_s, progress)

    def run(self):
        """Runs all windows; returns theta_g at the end (a reference, or the snapshot of a finished checkpoint)."""
        while self.waiting or self.in_flight:
            self._submit_ahead()
            head = self.in_flight[0]
            refs = head.refs()
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_S, fetch_local=False)
            if len(ready) == len(refs):
                flight = self.in_flight.popleft()
                self._book(flight)
                self.watch.finished(flight.window)
            self.watch.look()
        return self.theta_g

    def _submit_ahead(self):
        """Keeps windows in flight as far as the object store's budget goes, two at least."""
        while self.waiting:
            nbytes = self._bytes_of(self.waiting[0])
            if len(self.in_flight) >= 2 and nbytes + sum(f.nbytes for f in self.in_flight) > self.budget:
                return
            self.in_flight.append(self._submit(self.waiting.popleft(), nbytes))

    def _bytes_of(self, window):
        copies = (len(self.after) + 2) * window.hands_over + STATE_COPIES * len(self.after) * window.checkpoint
        return copies * self.unit

    def _submit(self, window, nbytes) -> InFlight:
        flight, contributions = InFlight(window, nbytes), []
        for name, learner in self.group.learners.items():
            flight.stats[name], contribution = learner.run_window.remote(
                window.start, window.stop, window.hands_over, after=self.after[name]
            )
            self.after[name] = flight.stats[name]
            contributions.append(contribution)
        if window.hands_over:
            flight.theta_g = self.group.global_learner.combine.remote(*contributions)
        if window.redistribute:
            for name, learner in self.group.learners.items():
                self.after[name] = learner.load_global.remote(flight.theta_g, after=self.after[name])
        if window.checkpoint:
            for name, learner in self.group.learners.items():
                self.after[name], flight.states[name] = learner.state_dict.remote(after=self.after[name])
        if window.evaluate:
            split = self.setup.config.evaluation.select_on
            flight.scores, flight.shipped = self.group.evaluator.evaluate.remote(flight.theta_g, split)
        return flight

    def _book(self, flight: InFlight):
        stats = {name: fetch(ref, f"base_learners.{name}") for name, ref in flight.stats.items()}
        self.theta_g = flight.theta_g or self.theta_g
        scores = fetch(flight.scores, "evaluator") if flight.scores is not None else None
        self.recorder.window_done(flight.window, stats, scores, lambda: _owned(fetch(flight.shipped, "evaluator")))
        if flight.states:
            states = {name: fetch(ref, f"base_learners.{name}") for name, ref in flight.states.items()}
            self.recorder.write_state(flight.window, states, fetch(self.theta_g, "global learner"))


class Watch:
    """Looks after the learners while the driver waits: shows their progress, notices the dead and the stuck."""

    def __init__(self, group: ActorGroup, stall_timeout_s: float, progress):
        self.group, self.stall_timeout_s, self.progress = group, stall_timeout_s, progress
        self.asked, self.steps = {}, dict.fromkeys(group.learners, 0)
        self.last_move = time.monotonic()

    def finished(self, window):
        """Every learner has done this window, whatever its last answer was."""
        self.steps = {name: max(step, window.stop) for name, step in self.steps.items()}
        self.last_move = time.monotonic()

    def look(self):
        """Asks every learner for its step; an answer that is late is kept and awaited, not asked for again."""
        for name, learner in self.group.learners.items():
            if name not in self.asked:
                self.asked[name] = learner.status.remote()
            ready, _ = ray.wait([self.asked[name]], timeout=0)
            if ready:
                step = fetch(self.asked.pop(name), f"base_learners.{name}")
                if step > self.steps[name]:
                    self.steps[name], self.last_move = step, time.monotonic()
        self.progress.steps(min(self.steps.values()))
        if time.monotonic() - self.last_move > self.stall_timeout_s:
            stands = ", ".join(f"{name} at step {step}" for name, step in self.steps.items())
            raise LearnerError(
                f"no learner moved for runtime.stall_timeout_s ({self.stall_timeout_s:g} s): {stands}; "
                "look at the machines, or raise it if a step really takes that long"
            )


def _judge(setup, group, recorder, progress, theta_g):
    """The final table: all models on the test images, spread over all actors."""
    last = _owned(fetch(group.evaluator.finalize.remote(theta_g), "evaluator"))
    own = {name: _owned(fetch(lr.model_snapshot.remote(), name)) for name, lr in group.learners.items()}
    judged = recorder.models_to_judge(last, own)
    size = len(setup.splits["test"])
    ranges = chunks(size, setup.config.evaluation.batch_size)
    shared = {name: ray.put(snapshot) for name, snapshot in judged.items()}
    tasks = [(name, *chunk) for name in judged for chunk in ranges]
    progress.phase(f"evaluating {len(judged)} models on {size} test images,", len(tasks), unit="chunks")
    pool = ActorPool(list(group.workers.values()))
    results = pool.map(lambda actor, task: actor.evaluate_chunk.remote(shared[task[0]], "test", *task[1:]), tasks)
    flags = {name: [] for name in judged}
    for (name, _, _), chunk in zip(tasks, results):
        flags[name].append(chunk)
        progress.steps(progress.done + 1)
    return recorder.finish({name: join_flags(parts) for name, parts in flags.items()})


def _owned(snapshot: WeightSnapshot) -> WeightSnapshot:
    """A copy outside the object store, so that keeping it pins nothing there."""
    return WeightSnapshot(snapshot.step, snapshot.weights.copy(), snapshot.counters.copy())
