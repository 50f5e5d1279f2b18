"""The newest numbers of a run as gauges of Ray's metrics, which the nodes of a cluster export to Prometheus."""

from ray.util.metrics import Gauge

# name -> (meaning, tags); Ray's exporter writes `ray_` before each name.
GAUGES = {
    "genray_step": ("finished steps", ("run", "learner")),
    "genray_total_steps": ("steps of the whole run", ("run",)),
    "genray_loss": ("mean training loss of the newest window", ("run", "learner")),
    "genray_accuracy": (
        "newest accuracy of theta_g on the images that its best epoch is chosen by, a fraction; attack natural: none",
        ("run", "attack"),
    ),
    "genray_seconds_per_step": (
        "seconds a step of the newest window: in all, and of these crafting adversarial images, averaging weights; "
        "beside them transfer of weights, and waiting for other learners",
        ("run", "learner", "part"),
    ),
}
PARTS = {
    "all": "seconds",
    "attack": "attack_seconds",
    "averaging": "averaging_seconds",
    "transfer": "transfer_seconds",
    "waiting": "waiting_seconds",
}


class RunGauges:
    """Sets the gauges of one run, from its driver.

    Ray exports only what was set since its last export and forgets the rest after two of them (20 s), so `steps`,
    which the driver calls every second or so, sets all gauges again.

    Args:
        run: name of the run.
        total_steps: of the run.
    """

    def __init__(self, run: str, total_steps: int):
        self.run = run
        self.gauges = {name: Gauge(name, description=text, tag_keys=tags) for name, (text, tags) in GAUGES.items()}
        self.newest: dict[tuple, float] = {}  # (name, *tags) -> value
        self._set("genray_total_steps", total_steps)

    def _set(self, name, value, **tags):
        tags = {"run": self.run, **tags}
        self.newest[name, *tags.items()] = float(value)
        self.gauges[name].set(float(value), tags=tags)

    def steps(self, steps: dict[str, int]):
        """Learner name -> finished steps."""
        for learner, step in steps.items():
            self._set("genray_step", step, learner=learner)
        for (name, *tags), value in self.newest.items():
            self.gauges[name].set(value, tags=dict(tags))

    def window_done(self, stats: dict, scores: dict | None):
        """Arguments as of `RunRecorder.window_done`."""
        for learner, stat in stats.items():
            if stat.num_examples:  # it trained in this window
                self._set("genray_loss", stat.loss_sum / stat.num_examples, learner=learner)
                for part, field in PARTS.items():
                    seconds = getattr(stat, field) / (stat.stop - stat.start)
                    self._set("genray_seconds_per_step", seconds, learner=learner, part=part)
        for attack, (correct, examples) in (scores or {}).items():
            self._set("genray_accuracy", correct / examples, attack=attack)
