"""The actors of one base learner."""

import ray


class WorkerGroup:
    """Makes the same calls on every worker of a learner; all hold the same state, so the first one answers.

    Calls on an actor are chained by references: each takes a (tiny) result of the call before it as `after`, so their
    order is the algorithm's.

    Args:
        actors: `BaseLearnerActor` handles, in the order of their ranks.
        title: run and learner, for the names of tasks.
    """

    def __init__(self, actors: list, title: str):
        self.actors, self.after, self.title = actors, [None] * len(actors), title

    @property
    def first(self):
        return self.actors[0]

    def run_window(self, start: int, stop: int, hands_over: bool) -> tuple:
        """References: the stats of every worker, and the contribution of the first."""
        name = f"BaseLearnerActor.run_window {self.title}, steps {start + 1} to {stop}"
        made = [
            actor.run_window.options(name=name).remote(start, stop, hands_over and rank == 0, after=self.after[rank])
            for rank, actor in enumerate(self.actors)
        ]
        stats = [ref for ref, _ in made]
        self.after = list(stats)
        return stats, made[0][1]

    def load(self, method: str, snapshot):
        """Calls `load_global`, `start_from` or `load_target` of the actors."""
        self.after = [
            getattr(actor, method).remote(snapshot, after=after) for actor, after in zip(self.actors, self.after)
        ]

    def state_dict(self) -> ray.ObjectRef:
        self.after[0], state = self.first.state_dict.remote(after=self.after[0])
        return state

    def model_snapshot(self) -> ray.ObjectRef:
        self.after[0], snapshot = self.first.model_snapshot.remote(after=self.after[0])
        return snapshot
