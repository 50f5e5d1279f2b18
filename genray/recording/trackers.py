"""MLflow and Weights & Biases: the epochs of a run, or of each trial of a grid, beside the run's own files.

Both read their settings and accounts from their own variables of the environment (`MLFLOW_...`, `WANDB_...`).
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

from genray.errors import ConfigError, StorageError, one_line
from genray.recording.writer import Writer
from genray.storage import without_secrets

PROJECT = "genray"
END_TIMEOUT_S = 20.0
LONGEST_PARAM, PARAMS_A_CALL = 6000, 100  # limits of MLflow


def check_trackers(names: Iterable[str]):
    """Checks that the packages of trackers are installed.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in names if name in TRACKERS and find_spec(name) is None]
    if missing:
        raise ConfigError([f"loggers.{n}: {n} is not installed; pip install 'genray[{n}]'" for n in missing])


def scalars(record: dict) -> dict[str, float]:
    """The numbers of an epoch's record by the names that TensorBoard and the trackers show."""
    found = {f"global/{name}": rate for name, rate in (record["global"] or {}).items()}
    found |= {f"mixing_weight/{name}": weight for name, weight in record["mixing_weights"].items()}
    for learner, values in record["learners"].items():
        found |= {f"{learner}/{name}": value for name, value in values.items()}
    return found


def final_scalars(results: dict) -> dict[str, float]:
    """The accuracies of theta_g on the test images, of a run's results."""
    return {f"test_{name}": record["value"] for name, record in results["models"]["global"].items()}


class Tracker(Protocol):
    """Attributes:
    id: of the run in the tracker; a later process goes on with it.
    """

    id: str

    def log(self, values: dict[str, float], step: int) -> None: ...
    def end(self, succeeded: bool) -> None: ...


class MLflowRun:
    """A run in MLflow; the arguments are those of `Trackers`, and `id` of the run to go on with."""

    def __init__(self, name: str, config: dict, group: str | None, id: str | None):
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if id is not None:
            self.client.update_run(id, status="RUNNING")
            self.id = id
            return
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", group or PROJECT))
        self.id = self.client.create_run(experiment, run_name=name).info.run_id
        self._log_config(config)

    def _experiment(self, name):
        found = self.client.get_experiment_by_name(name)
        return self.client.create_experiment(name) if found is None else found.experiment_id

    def _log_config(self, config):
        from mlflow.entities import Param

        params = [Param(key, text[:LONGEST_PARAM]) for key, text in _flat(config)]
        for start in range(0, len(params), PARAMS_A_CALL):
            self.client.log_batch(self.id, params=params[start : start + PARAMS_A_CALL])

    def log(self, values, step):
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def end(self, succeeded):
        self.client.set_terminated(self.id, "FINISHED" if succeeded else "FAILED")

    def __str__(self):
        from mlflow import get_tracking_uri

        return f"mlflow: run {self.id} in {without_secrets(get_tracking_uri())}"


class WandbRun:
    """A run in Weights & Biases; arguments as of `MLflowRun`."""

    def __init__(self, name: str, config: dict, group: str | None, id: str | None):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=os.environ.get("WANDB_RUN_GROUP", group),
            name=name,
            config=config,
            id=id,
            resume="allow",
            reinit="create_new",  # trials of a grid are tracked at the same time
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.id = self.run.id

    def log(self, values, step):
        self.run.log(values, step=step)

    def end(self, succeeded):
        self.run.finish(exit_code=0 if succeeded else 1)

    def __str__(self):
        where = self.run.settings.sync_dir if self.run.offline else self.run.url
        return f"wandb: run {self.id} in {without_secrets(str(where))}"


TRACKERS: dict[str, Any] = {"mlflow": MLflowRun, "wandb": WandbRun}


class Trackers:
    """Sends the numbers of one run to its trackers, in another thread: one that does not answer delays no training and
    ends no run.

    Args:
        names: of `TRACKERS`; others are left out.
        name: of the run.
        config: its configuration, as plain data.
        say: prints a line.
        group: of the run: its grid; None for none.
        ids: tracker -> id of the run there to go on with.
        epoch: the last one that was trained before.

    Raises:
        ConfigError: a tracker refuses to begin.
    """

    def __init__(
        self, names: Iterable[str], name: str, config: dict, say, group: str | None = None, ids=None, epoch: int = 0
    ):
        self.say, self.writer, self.last_step = say, Writer(say), epoch
        self.runs: dict[str, Tracker] = {}
        self.waiting: dict[str, deque] = {}  # tracker -> (values, step) that it does not have yet
        for tracker in (name for name in names if name in TRACKERS):
            try:
                run = TRACKERS[tracker](name, _without_secrets(config), group, (ids or {}).get(tracker))
            except Exception as error:  # libraries, servers and networks raise many kinds
                self.end(None)
                raise ConfigError(f"loggers.{tracker}: no run can be begun: {one_line(error)}") from None
            self.runs[tracker], self.waiting[tracker] = run, deque()
            say(str(run))

    @property
    def ids(self) -> dict[str, str]:
        return {name: run.id for name, run in self.runs.items()}

    def log(self, values: dict[str, float], step: int):
        """Sends an epoch's numbers; epochs that are trained again after a fault are not sent again."""
        if step > self.last_step:
            self._send(values, step)

    def end(self, test: dict[str, float] | None, timeout_s: float = END_TIMEOUT_S):
        """Ends the runs.

        Args:
            test: accuracies on the test images; None for a run that has failed.
            timeout_s: limit of the wait for the trackers.
        """
        if test is not None:
            self._send(test, self.last_step)
        for name, run in self.runs.items():
            self.writer.put(name, lambda name=name, run=run: (self._log_waiting(name), run.end(test is not None)))
        try:
            self.writer.flush(timeout_s)
        except StorageError as error:
            self.say(f"warning: loggers: {error}")
        self.runs = {}

    def _send(self, values, step):
        self.last_step = step
        for name in self.runs:
            self.waiting[name].append((values, step))
            self.writer.put(name, lambda name=name: self._log_waiting(name))

    def _log_waiting(self, name):
        waiting = self.waiting[name]
        while waiting:
            self.runs[name].log(*waiting[0])
            waiting.popleft()


def _flat(plain: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value as text) of everything in plain data that is no mapping."""
    if isinstance(plain, dict) and plain:
        for key, value in plain.items():
            yield from _flat(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, plain if isinstance(plain, str) else json.dumps(plain)


def _without_secrets(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _without_secrets(value) for key, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [_without_secrets(value) for value in plain]
    return without_secrets(plain) if isinstance(plain, str) else plain
