"""Turns finished windows into metrics, the best model, checkpoints and the final record."""

import json
import time
from collections import defaultdict
from dataclasses import asdict

import numpy as np

from genray.config import to_dict
from genray.core.flat import FlatWeights
from genray.errors import RunFolderError, StorageError
from genray.evaluation import accuracy, final_attacks, pgd_name
from genray.learners.window_statistics import WindowStats
from genray.recording.model_description import describe_model
from genray.recording.progress import Progress
from genray.recording.run_folder import LEARNERS, RunFolder, decode_state, encode_state, versions
from genray.recording.table import results_table
from genray.recording.tensorboard import EventFile
from genray.recording.trackers import Trackers, final_scalars, scalars
from genray.recording.training_checks import TrainingChecks
from genray.recording.writer import Writer
from genray.records import RADII, TIMES
from genray.run.cost import run_cost, table_in_steps
from genray.run.setup import RunSetup
from genray.types import ThreatModel, WeightSnapshot, fraction_text


class RunRecorder:
    """Records one run; both runtimes make the same calls in the same order.

    Files are written in another thread (see `Writer`); the newest state is kept in memory too, so that a run can go
    back to it without the disk.

    Args:
        setup: the run.
        folder: of the run.
        progress: the display.
        state: the checkpoint of a resumed run.
        on_epoch: called with the record of each finished epoch; with those that are replayed after a fault, too.
    """

    def __init__(
        self, setup: RunSetup, folder: RunFolder, progress: Progress, state: dict | None = None, on_epoch=None
    ):
        self.setup, self.folder, self.progress, self.on_epoch = setup, folder, progress, on_epoch
        self.writer = Writer(progress.say)
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.devices: list[str] | None = None
        self.trackers: Trackers | None = None
        self.checks = _checks(setup)
        self.newest = None
        if state:
            self.newest = encode_state(state)
            books = json.loads(state["books"])
            self.seconds_before = books["wall_s"]
            for name in books.get("rollbacks", {}):  # of earlier versions
                progress.say(f"warning: base_learners.{name}: its rate had been lowered by rollbacks and is lr again")
        self.newest_step = state["step"] if state else 0
        self.go_back()

    def go_back(self) -> dict | None:
        """Resets the records to the newest state and returns it; None for the beginning of the run."""
        state = decode_state(self.newest) if self.newest else None
        books = json.loads(state["books"]) if state else {}
        self.records = books.get("records", [])
        parts = books.get("pending", {}).items()
        self.pending = defaultdict(list, {name: [WindowStats(**part) for part in listed] for name, listed in parts})
        self.best_score, self.best_epoch = books.get("best_score"), books.get("best_epoch", 0)
        self.best = WeightSnapshot(**state["best"]) if state and state["best"] else None
        self.redistributions = books.get("redistributions", 0)
        self.events = None
        return state

    def begin(self, devices: list[str]):
        """Begins training, or begins it again after `go_back`.

        Args:
            devices: names of the devices in use, for the records.

        Raises:
            RunFolderError: a new run's folder cannot be written.
            ConfigError: a tracker of `loggers` refuses to begin.
        """
        if self.devices is None:
            self._begin_trackers()
            self.began = time.perf_counter()
            try:
                if self.folder.replaces or not self.folder.storage.exists("config.yaml"):
                    self.folder.create(self.setup.config, devices, self.setup.identity)
                self.folder.write_tracked(self.trackers.ids)
            except StorageError as error:
                raise RunFolderError(str(error)) from None
        self.devices = devices
        if self.records:
            self._write_metrics()
        plan = self.setup.plan
        later = table_in_steps(run_cost(plan, self.setup.splits), plan, len(devices))
        self.progress.phase("training", plan.total_steps, self.newest_step, later=later)

    def _begin_trackers(self):
        config, resumed = self.setup.config, self.newest is not None
        before = {"ids": self.folder.read_tracked()} if resumed else {}
        if self.records:
            before["epoch"] = self.records[-1]["epoch"]
        self.trackers = Trackers(config.loggers, config.name, to_dict(config), self.progress.say, **before)

    # --- while training ---------------------------------------------------------------------------------------

    def window_done(self, window, stats: dict, scores: dict | None, theta_g=None, own=None):
        """Records one window.

        Args:
            window: the `Window`.
            stats: learner name -> `WindowStats`.
            scores: {"natural": (correct, examples), ...} of theta_g, where the window ended with an evaluation.
            theta_g: callable giving the evaluated `WeightSnapshot`; called only when it is the best so far.
            own: learner name -> scores of its own model, if the run evaluates them.
        """
        for name, stat in stats.items():
            self.pending[name].append(stat)
        self.redistributions += window.redistribute
        if scores is not None:
            self._choose(window, scores, theta_g)
        if window.stop % self.setup.plan.steps_per_epoch == 0:
            self._epoch_done(window, scores, own or {})

    def _choose(self, window, scores, theta_g):
        rates = {name: correct / examples for name, (correct, examples) in scores.items()}
        if rates["natural"] < self.setup.config.evaluation.natural_floor:
            return
        score = sum(rates.values())
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_epoch, self.best = score, window.epoch, theta_g()
            self.write_model("model.pt", self.best, window.epoch, rates)

    def _epoch_done(self, window, scores, own):
        plan, split = self.setup.plan, self.setup.config.evaluation.select_on
        record = {
            "epoch": window.epoch,
            "step": window.stop,
            "wall_s": round(self.wall_s(), 3),
            "redistributions": self.redistributions,
            "learners": {
                name: self._learner_record(name, parts)
                | {f"{split}_{key}": correct / examples for key, (correct, examples) in own.get(name, {}).items()}
                for name, parts in self.pending.items()
                if any(part.num_examples for part in parts)  # the learner trained in this epoch
            },
            "mixing_weights": {name: plan.mixing_weight(name, window.stop - 1) for name in self.pending},
            "global": {name: correct / examples for name, (correct, examples) in (scores or {}).items()} or None,
            "best_epoch": self.best_epoch,
        }
        self.pending.clear()
        self.records.append(record)
        warnings = self.checks.warnings(self.records)
        if warnings:
            record["warnings"] = warnings
        for warning in warnings:
            self.progress.say(f"warning: {warning}")
        self._write_metrics()
        if "tensorboard" in self.setup.config.loggers:
            self.events = self.events or EventFile(self.folder.storage, self.writer, record["epoch"])
            self.events.add(record)
        self.trackers.log(scalars(record), record["epoch"])
        self.progress.steps(window.stop)
        self.progress.epoch(self._headline(record))
        if self.on_epoch:
            self.on_epoch(record)

    def _write_metrics(self):
        records = list(self.records)
        self.writer.put("metrics.jsonl", lambda: self.folder.write_metrics(records))

    def _learner_record(self, name, parts):
        examples, varied = sum(p.num_examples for p in parts), [p for p in parts if p.radius_mean is not None]
        steps = sum(p.stop - p.start for p in varied)
        return {
            "loss": sum(p.loss_sum for p in parts) / examples,
            "train_accuracy": sum(p.num_correct for p in parts) / examples,
            "learning_rate": parts[-1].learning_rate,
            **{name: round(sum(getattr(p, name) for p in parts), 4) for name in TIMES},
            **{name: sum(getattr(p, name) * (p.stop - p.start) for p in varied) / steps for name in RADII if varied},
        }

    def _headline(self, record):
        parts = [f"epoch {record['epoch']}/{self.setup.config.training.epochs}"]
        if record["global"]:
            rates = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in record["global"].items())
            parts.append(f"theta_g {self.setup.config.evaluation.select_on} {rates}")
        parts += [f"{name} loss {values['loss']:.3f}" for name, values in record["learners"].items()]
        return "  ".join(parts)

    def wall_s(self) -> float:
        """Seconds of training so far, over all resumptions."""
        return self.seconds_before + time.perf_counter() - self.began

    # --- weights ------------------------------------------------------------------------------------------------

    def write_model(self, name, snapshot, epoch, rates=None, learner=None):
        """Writes a snapshot as a state dict with the metadata to build and evaluate the model."""
        network = self.setup.build_network()
        FlatWeights(network).load(snapshot)
        description = {
            **describe_model(self.setup, learner),
            "epoch": epoch,
            "step": snapshot.step,
            "selected_on": self.setup.config.evaluation.select_on,
            "selection": rates or {},
        }
        state = {key: value.clone() for key, value in network.state_dict().items()}
        self.writer.put(name, lambda: self.folder.write_model(name, state, description))

    def write_state(self, window, learner_states: dict, theta_g):
        """A full checkpoint at the end of a window; from now on the run goes back to this one."""
        books = {
            "records": self.records,
            "pending": {name: [asdict(part) for part in parts] for name, parts in self.pending.items()},
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "redistributions": self.redistributions,
            "wall_s": self.wall_s(),
        }
        state = {
            "step": window.stop,
            "next_window": window.index + 1,
            "learners": learner_states,
            "theta_g": vars(theta_g),
            "best": vars(self.best) if self.best else None,
            "books": json.dumps(books),
        }
        if self.setup.initial is not None:  # whose file may be gone when the run is resumed
            state["initial"] = self.setup.initial_for_checkpoint
        self.newest = None  # frees its memory first: encoding takes as much again
        step, data, keep = window.stop, encode_state(state), self.setup.config.checkpoint.keep
        self.newest, self.newest_step = data, step
        self.writer.put("checkpoint", lambda: self.folder.write_state(step, data, keep))

    def save(self):
        """Waits for the last checkpoint of a run that ends early, at most runtime.grace_period_s, and as long for the
        trackers."""
        try:
            self.writer.flush(self.setup.config.runtime.grace_period_s)
        except StorageError as error:
            self.progress.say(f"warning: {error}")
        if self.trackers is not None:
            self.trackers.end(None, self.setup.config.runtime.grace_period_s)

    def models_to_judge(self, last, learners: dict) -> dict:
        """The models of the final table: the chosen theta_g (the last one if none was evaluated), the last one and
        every base learner. All are written, for mixtures after the run too.

        Args:
            last: theta_g at the end, as evaluated.
            learners: name -> `WeightSnapshot` of its own model.
        """
        epochs = self.setup.config.training.epochs
        self.write_model("model_last.pt", last, epochs)
        for name, snapshot in learners.items():
            self.write_model(f"{LEARNERS}/{name}.pt", snapshot, epochs, learner=name)
        if self.best is None:
            floor = self.setup.config.evaluation.natural_floor
            self.progress.say(f"no epoch reached evaluation.natural_floor ({floor:g}); model.pt is the last theta_g")
            self.best, self.best_epoch = last, epochs
            self.write_model("model.pt", last, epochs)
        return {"global": self.best, "global_last": last, **learners}

    # --- at the end ---------------------------------------------------------------------------------------------

    def finish(self, flags: dict) -> dict:
        """Writes and returns `results.json`.

        Args:
            flags: model name ("global", "global_last", each learner) -> {"natural": (N,) bool, "pgd20": ...} on test.

        Raises:
            StorageError: not everything could be written within runtime.storage_timeout_s.
        """
        models = {}
        for name, by_attack in flags.items():
            models[name] = {attack: accuracy(values) for attack, values in by_attack.items()}
            if len(by_attack) > 2:  # several attacks
                models[name]["union"] = accuracy(np.logical_and.reduce(list(by_attack.values())))
        results = {
            "models": models,
            "protocol": self._protocol(),
            "best_epoch": self.best_epoch,
            "versions": versions(self.devices),
            "seed": self.setup.config.seed,
            "wall_s": round(self.wall_s(), 1),
            "warnings": sum((record.get("warnings", []) for record in self.records), [*self.setup.warnings]),
        }
        self.writer.put("results.json", lambda: self.folder.write_results(results))
        try:
            self.writer.flush(self.setup.config.runtime.storage_timeout_s)
        except StorageError:
            self.progress.say(results_table(results))  # the figures are not lost with the files
            raise
        self.trackers.end(final_scalars(results), self.setup.config.runtime.grace_period_s)
        return {**results, "folder": self.folder.location}

    def _protocol(self):
        attack, config = self.setup.config.evaluation.attack, self.setup.config
        extra, others = self.setup.extra, list(final_attacks(config).items())[1:]
        return {
            "data": config.data.source,
            "fingerprint": self.setup.identity["test"]["fingerprint"],
            **({"extra": extra} if extra else {}),
            "split": "test",
            "examples": len(self.setup.splits["test"]),
            **_ball(attack),
            "num_steps": attack.num_steps,
            **({"other_norms": {name: _ball(other) for name, other in others}} if others else {}),
            "attack": f"{pgd_name(attack)}: PGD on cross-entropy, random start, 1 restart, last iterate",
            "selected_on": config.evaluation.select_on,
            "interval": "95 % Wilson",
        }


def _checks(setup) -> TrainingChecks:
    config = setup.config
    return TrainingChecks(
        config.training.epochs,
        len(setup.class_names),
        len(setup.splits[config.evaluation.select_on]),
        any(learner.is_robust for learner in config.base_learners.values()),
        setup.plan.num_redistributions > 0,
    )


def _ball(attack):
    return {
        "threat_model": str(ThreatModel(attack.norm, attack.epsilon)),
        "norm": attack.norm,
        "epsilon": fraction_text(attack.epsilon),
        "epsilon_decimal": float(attack.epsilon),
        "step_size": fraction_text(attack.step_size),
        "step_size_decimal": float(attack.step_size),
    }
