"""Generalist on Ray: the driver submits windows ahead and monitors; weights go from actor to actor."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray

from genray.errors import LostError, PlacementError
from genray.evaluation import chunks, join_flags
from genray.runtime.protocols import Progress, Recorder
from genray.runtime.ray.actor_group import ActorGroup
from genray.runtime.ray.actors import pack
from genray.runtime.ray.allocation import DeviceAllocator
from genray.runtime.ray.cluster import check_cores, connected
from genray.runtime.ray.gauges import RunGauges
from genray.runtime.ray.placement import free_resources, make_placement, placement_in_trial
from genray.runtime.recovery import run_with_recovery
from genray.types import WeightSnapshot

POLL_S = 0.2
STATE_COPIES = 5  # weights, average, share and up to two optimiser moments
BYTES_PER_GIB = 2**30


def run_on_ray(recorder: Recorder, progress: Progress, address: str | None = None) -> dict:
    """Trains all base learners at the same time, each in its own actor, and evaluates the result.

    Args:
        recorder: holds the setup and the start state; records every window.
        progress: the display.
        address: None for a private Ray on this machine, "auto" or "host:port" for a cluster.

    Returns:
        The final record (`results.json`).

    Raises:
        PlacementError, LearnerError, NonFiniteError: the cluster, processes or a learner's numbers fail.
    """
    config = recorder.setup.config
    each = {name: learner.resources.num_cpus for name, learner in config.base_learners.items()}
    wanted = sum(n * each[name] for name, n in recorder.setup.plan.workers.items())
    check_cores({config.name: max(each.values())}, address)
    with connected(address, num_cpus=wanted) as may_grow:
        attempts = _Attempts(recorder, progress, may_grow)
        return run_with_recovery(attempts.run, recorder, progress)


class _Attempts:
    """Trains with a new `ActorGroup` in each attempt, on the resources that are free at that time."""

    def __init__(self, recorder, progress, may_grow):
        self.recorder, self.progress, self.may_grow = recorder, progress, may_grow
        self.lost = None  # placement of the group of the last attempt
        self.splits = ray.put(pack(recorder.setup)[1])  # once for all attempts
        self.allocator = DeviceAllocator(progress)
        plan = recorder.setup.plan
        # Nobody reads those of a private Ray.
        self.gauges = RunGauges(plan.config.name, plan.total_steps) if may_grow else None

    def run(self, state):
        setup = self.recorder.setup
        try:
            placement = self._place(setup)
            states = state["learners"] if state else {}
            # After a loss a node may come back, even to a cluster without an autoscaler.
            on_wait = self.progress.say if self.may_grow or self.lost else None
            with ActorGroup(setup, placement, states, on_wait, self.splits) as group:
                self.lost = placement
                self.recorder.begin([f"{name}: {w['name']}" for name, w in group.whereabouts.items()])
                theta_g = Pipeline(setup, group, self.recorder, self.progress, state, self.gauges).run()
                return _judge(setup, group, self.recorder, self.progress, theta_g)
        except PlacementError as error:
            if self.lost is None:
                raise
            raise LostError("the cluster", str(error)) from None

    def _place(self, setup):
        in_trial = placement_in_trial(setup.plan, setup.weight_bytes)
        if in_trial is not None:
            return in_trial
        free = free_resources(self.lost, setup.config.runtime.startup_timeout_s)
        return make_placement(setup.plan, setup.weight_bytes, free, self.allocator.workers(setup, free))


@dataclass
class InFlight:
    """A submitted window and the references to its results.

    Attributes:
        stats: learner name -> stats of each of its workers.
    """

    window: object
    nbytes: int
    stats: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)
    theta_g: Any = None
    scores: object = None
    shipped: object = None
    own: dict = field(default_factory=dict)

    def refs(self) -> dict:
        """Reference -> actor name, for all results that the window is recorded with."""
        refs = {ref: f"base_learners.{name}" for name, of_workers in self.stats.items() for ref in of_workers}
        refs |= {ref: f"base_learners.{name}" for name, ref in self.states.items()}
        refs |= {self.theta_g: "global learner", self.scores: "evaluator"}
        refs |= dict.fromkeys(self.own.values(), "evaluator")
        return {ref: who for ref, who in refs.items() if ref is not None}


class Pipeline:
    """Submits windows ahead and records them in order as they finish.

    Calls on one learner are chained (`WorkerGroup`), so a learner waits for another only where theta_g is handed back
    (and in every step, where learners share their attacks).
    """

    def __init__(self, setup, group: ActorGroup, recorder, progress, state, gauges: RunGauges | None = None):
        self.setup, self.group, self.recorder, self.progress, self.gauges = setup, group, recorder, progress, gauges
        self.waiting = deque(setup.plan.windows[state["next_window"] if state else 0 :])
        self.in_flight = deque()
        self.theta_g = WeightSnapshot(**state["theta_g"]) if state else None
        self.budget = setup.config.runtime.max_ahead_gib * BYTES_PER_GIB
        self.unit = setup.weight_bytes
        self.watch = ActorMonitor(group, setup.config.runtime.stall_timeout_s, progress)

    def run(self):
        """Runs all windows; returns theta_g at the end (a reference, or the snapshot of a finished checkpoint)."""
        while self.waiting or self.in_flight:
            self._submit_ahead()
            head = self.in_flight[0]
            refs = head.refs()
            ready, late = ray.wait(list(refs), num_returns=len(refs), timeout=POLL_S, fetch_local=False)
            if late and self.group.in_step:
                self._raise_failures(head, ready)
            if not late:
                flight = self.in_flight.popleft()
                self._book(flight)
                self.watch.finished(flight.window)
            self.watch.look([refs[ref] for ref in late])
            if self.gauges is not None:
                self.gauges.steps({who.removeprefix("base_learners."): n for who, n in self.watch.steps.items()})
        return self.theta_g

    def _raise_failures(self, head, ready):
        """Raises the error of a failed worker: the other ranks of its process group wait and never become ready."""
        for name, of_workers in head.stats.items():
            for ref in of_workers:
                if ref in ready:
                    self.group.fetch(ref, f"base_learners.{name}")

    def _submit_ahead(self):
        """Submits windows within the budget of the object store, two at least."""
        while self.waiting:
            nbytes = self._bytes_of(self.waiting[0])
            if len(self.in_flight) >= 2 and nbytes + sum(f.nbytes for f in self.in_flight) > self.budget:
                return
            self.in_flight.append(self._submit(self.waiting.popleft(), nbytes))

    def _bytes_of(self, window):
        learners = len(self.group.learners)
        copies = (learners + 2) * window.hands_over + STATE_COPIES * learners * window.checkpoint
        copies += learners * (window.evaluate and self.setup.config.evaluation.base_learners)
        copies += len({of for _, of, _ in self.setup.plan.hand_overs(window.stop)})
        return copies * self.unit

    def _submit(self, window, nbytes) -> InFlight:
        flight, contributions, own = InFlight(window, nbytes), [], {}
        evaluation = self.setup.config.evaluation
        for name, learner in self.group.learners.items():
            flight.stats[name], contribution = learner.run_window(window.start, window.stop, window.hands_over)
            contributions.append(contribution)
            if window.evaluate and evaluation.base_learners:
                own[name] = learner.model_snapshot()
        if window.hands_over:
            combine = self.group.global_learner.combine.options(name=self._task("GlobalLearnerActor.combine", window))
            flight.theta_g = combine.remote(*contributions)
        handed = self.setup.plan.hand_overs(window.stop)
        averages = {of: own.get(of) or self.group.learners[of].model_snapshot() for _, of, _ in handed}
        if window.redistribute:
            for learner in self.group.learners.values():
                learner.load("load_global", flight.theta_g)
        for name, of, kind in handed:
            self.group.learners[name].load(kind, averages[of])
        if window.checkpoint:
            for name, learner in self.group.learners.items():
                flight.states[name] = learner.state_dict()
        if window.evaluate:
            evaluator, split = self.group.evaluator, evaluation.select_on
            evaluate = evaluator.evaluate.options(name=self._task("EvaluatorActor.evaluate", window))
            flight.scores, flight.shipped = evaluate.remote(flight.theta_g, split)
            flight.own = {name: evaluator.evaluate_own.remote(snapshot, split) for name, snapshot in own.items()}
        return flight

    def _task(self, method, window):
        """Name of a task in Ray's dashboard and, while it runs, of its process."""
        return f"{method} {self.setup.config.name}, step {window.stop}"

    def _book(self, flight: InFlight):
        """Records a finished window; in order, so that of several failures the same one is always raised first."""
        fetch = self.group.fetch
        stats = {name: fetch(refs[0], f"base_learners.{name}") for name, refs in flight.stats.items()}
        self.theta_g = flight.theta_g or self.theta_g
        scores = fetch(flight.scores, "evaluator") if flight.scores is not None else None
        own = {name: fetch(ref, "evaluator") for name, ref in flight.own.items()}
        shipped = lambda: _owned(fetch(flight.shipped, "evaluator"))  # noqa: E731
        if self.gauges is not None:
            self.gauges.window_done(stats, scores)
        self.recorder.window_done(flight.window, stats, scores, shipped, own)
        if flight.states:
            states = {name: fetch(ref, f"base_learners.{name}") for name, ref in flight.states.items()}
            self.recorder.write_state(flight.window, states, fetch(self.theta_g, "global learner"))


class ActorMonitor:
    """Polls the actors while the driver waits: shows the learners' progress, raises for dead and stalled actors."""

    def __init__(self, group: ActorGroup, stall_timeout_s: float, progress):
        self.group, self.stall_timeout_s, self.progress = group, stall_timeout_s, progress
        self.asked, self.steps = {}, {f"base_learners.{name}": 0 for name in group.learners}
        self.last_move = time.monotonic()

    def finished(self, window):
        """Counts the steps of a finished window, which the last answers may not include."""
        self.steps = {who: max(step, window.stop) for who, step in self.steps.items()}
        self.last_move = time.monotonic()

    def look(self, awaited=()):
        """Asks every actor for its step; a pending request is kept, not sent again.

        Args:
            awaited: names of the actors whose results the driver waits for, for the message.
        """
        for who, actor in self.group.everyone.items():
            if who not in self.asked:
                self.asked[who] = actor.status.remote()
            ready, _ = ray.wait([self.asked[who]], timeout=0)
            if ready:
                step = self.group.fetch(self.asked.pop(who), who)
                if step > self.steps.get(who, step):
                    self.steps[who], self.last_move = step, time.monotonic()
        self.progress.steps(min(self.steps.values()))
        if time.monotonic() - self.last_move > self.stall_timeout_s:
            self._stalled(awaited)

    def _stalled(self, awaited):
        stands = ", ".join(f"{who} at step {step}" for who, step in self.steps.items())
        raise LostError(
            ", ".join(dict.fromkeys(awaited)) or "the learners",
            f"nothing moved for runtime.stall_timeout_s ({self.stall_timeout_s:g} s): {stands}; raise it if a step "
            "really takes that long",
        )


def _judge(setup, group, recorder, progress, theta_g):
    """The final table: all models on the test images, spread over all actors."""
    last = _owned(group.fetch(group.evaluator.finalize.remote(theta_g), "evaluator"))
    snapshots = {name: learner.model_snapshot() for name, learner in group.learners.items()}
    own = {name: _owned(group.fetch(ref, f"base_learners.{name}")) for name, ref in snapshots.items()}
    judged = recorder.models_to_judge(last, own)
    size = len(setup.splits["test"])
    ranges = chunks(size, setup.config.evaluation.batch_size)
    tasks = [(name, *chunk) for name in judged for chunk in ranges]
    progress.phase(f"evaluating {len(judged)} models on {size} test images,", len(tasks), unit="chunks")
    parts = _evaluate_all(group, {name: ray.put(snapshot) for name, snapshot in judged.items()}, tasks, progress)
    return recorder.finish({n: join_flags([parts[task] for task in tasks if task[0] == n]) for n in judged})


def _evaluate_all(group, snapshots, tasks, progress) -> dict:
    """Flags of each (model, start, stop); every worker gets its next one when it finishes one."""
    queue, running, done = deque(tasks), {}, {}

    def hand_out(who):
        if queue:
            name, *chunk = task = queue.popleft()
            running[group.workers[who].evaluate_chunk.remote(snapshots[name], "test", *chunk)] = (who, task)

    for who in group.workers:
        hand_out(who)
    timeout_s = group.timeouts.stall_timeout_s
    while running:
        ready, _ = ray.wait(list(running), timeout=timeout_s)
        if not ready:
            late = ", ".join(who for who, _ in running.values())
            raise LostError(late, f"no test images evaluated within runtime.stall_timeout_s ({timeout_s:g} s)")
        who, task = running.pop(ready[0])
        done[task] = group.fetch(ready[0], who)
        hand_out(who)
        progress.steps(len(done))
    return done


def _owned(snapshot: WeightSnapshot) -> WeightSnapshot:
    """A copy outside the object store, so that it pins no object there."""
    return WeightSnapshot(snapshot.step, snapshot.weights.copy(), snapshot.counters.copy())
