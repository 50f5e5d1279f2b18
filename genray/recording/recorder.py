"""Turns finished windows into metrics, the best model, checkpoints and the final record."""

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tensorboardX import SummaryWriter

from genray.core.flat import FlatWeights
from genray.evaluation import Accuracy, pgd_name
from genray.learners.pseudo_labels import unlabeled_record
from genray.learners.setup import RunSetup
from genray.recording.progress import Progress
from genray.recording.run_folder import LEARNERS, RunFolder, versions
from genray.types import ThreatModel, WeightSnapshot, fraction_text


class RunRecorder:
    """Keeps the books of one run; both runtimes call it with the same things in the same order.

    Args:
        setup: the run.
        folder: where everything goes.
        progress: what the user sees.
        devices: names of the devices in use, for the records.
    """

    def __init__(self, setup: RunSetup, folder: RunFolder, progress: Progress, devices: list[str]):
        self.setup, self.folder, self.progress, self.devices = setup, folder, progress, devices
        self.records, self.pending = [], defaultdict(list)
        self.best_score, self.best_epoch, self.best = None, 0, None
        self.redistributions = 0
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.writer = _TensorBoard(folder)

    # --- while training ---------------------------------------------------------------------------------------

    def window_done(self, window, stats: dict, scores: dict | None, theta_g=None):
        """Books one window.

        Args:
            window: the `Window`.
            stats: learner name -> `WindowStats`.
            scores: {"natural": (correct, examples), ...} of theta_g, where the window ended with an evaluation.
            theta_g: callable giving the evaluated `WeightSnapshot`; called only when it is the best so far.
        """
        for name, stat in stats.items():
            self.pending[name].append(stat)
        self.redistributions += window.redistribute
        if scores is not None:
            self._choose(window, scores, theta_g)
        if window.stop % self.setup.plan.steps_per_epoch == 0:
            self._epoch_done(window, scores)

    def _choose(self, window, scores, theta_g):
        rates = {name: correct / examples for name, (correct, examples) in scores.items()}
        if rates["natural"] < self.setup.config.evaluation.natural_floor:
            return
        score = sum(rates.values())
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_epoch, self.best = score, window.epoch, theta_g()
            self.write_model("model.pt", self.best, window.epoch, rates)

    def _epoch_done(self, window, scores):
        plan = self.setup.plan
        record = {
            "epoch": window.epoch,
            "step": window.stop,
            "wall_s": round(self.wall_s(), 3),
            "redistributions": self.redistributions,
            "learners": {name: self._learner_record(name, parts) for name, parts in self.pending.items()},
            "mixing_weights": {name: plan.mixing_weight(name, window.stop - 1) for name in self.pending},
            "global": {name: correct / examples for name, (correct, examples) in (scores or {}).items()} or None,
            "best_epoch": self.best_epoch,
        }
        self.pending.clear()
        self.records.append(record)
        self.folder.write_metrics(self.records)
        self.writer.write(record)
        self.progress.steps(window.stop)
        self.progress.epoch(self._headline(record))

    @staticmethod
    def _learner_record(name, parts):
        examples = sum(p.num_examples for p in parts)
        return {
            "loss": sum(p.loss_sum for p in parts) / examples,
            "train_accuracy": sum(p.num_correct for p in parts) / examples,
            "learning_rate": parts[-1].learning_rate,
            "seconds": round(sum(p.seconds for p in parts), 4),
        }

    def _headline(self, record):
        parts = [f"epoch {record['epoch']}/{self.setup.config.training.epochs}"]
        parts += [f"{name} loss {values['loss']:.3f}" for name, values in record["learners"].items()]
        if record["global"]:
            rates = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in record["global"].items())
            parts.append(f"theta_g {self.setup.config.evaluation.select_on} {rates}")
        return "  ".join(parts)

    def wall_s(self) -> float:
        """Seconds of training so far, over all resumptions."""
        return self.seconds_before + time.perf_counter() - self.began

    # --- weights ------------------------------------------------------------------------------------------------

    def write_model(self, name, snapshot, epoch, rates=None):
        """Writes a snapshot as a plain state dict with what is needed to build and judge the model."""
        network = self.setup.build_network()
        FlatWeights(network).load(snapshot)
        description = {
            "architecture": {k: list(v) if isinstance(v, tuple) else v for k, v in self.setup.architecture.items()},
            "class_names": list(self.setup.class_names),
            "run": self.setup.config.name,
            "epoch": epoch,
            "step": snapshot.step,
            "seed": self.setup.config.seed,
            "selected_on": self.setup.config.evaluation.select_on,
            "selection": rates or {},
        }
        state = {key: value.clone() for key, value in network.state_dict().items()}
        self.folder.write_model(name, state, description)

    def write_state(self, window, learner_states: dict, theta_g):
        """A full checkpoint at the end of a window."""
        books = {
            "records": self.records,
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
        self.folder.write_state(state, self.setup.config.checkpoint.keep)

    def restore(self, state: dict):
        """Goes back to the books of a checkpoint."""
        books = json.loads(state["books"])
        self.records = books["records"]
        self.best_score, self.best_epoch = books["best_score"], books["best_epoch"]
        self.redistributions, self.seconds_before = books["redistributions"], books["wall_s"]
        self.best = WeightSnapshot(**state["best"]) if state["best"] else None
        self.folder.write_metrics(self.records)

    def models_to_judge(self, last, learners: dict) -> dict:
        """What the final table shows: the chosen theta_g (the last one where none could be chosen), the last one and
        every base learner. All are written, for mixtures after the run too.

        Args:
            last: theta_g at the end, as evaluated.
            learners: name -> `WeightSnapshot` of its own model.
        """
        epochs = self.setup.config.training.epochs
        self.write_model("model_last.pt", last, epochs)
        for name, snapshot in learners.items():
            self.write_model(f"{LEARNERS}/{name}.pt", snapshot, epochs)
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
        """
        models = {
            name: {attack: Accuracy.of(values).record() for attack, values in by_attack.items()}
            for name, by_attack in flags.items()
        }
        results = {
            "models": models,
            "protocol": self._protocol(),
            "best_epoch": self.best_epoch,
            "versions": versions(self.devices),
            "seed": self.setup.config.seed,
            "wall_s": round(self.wall_s(), 1),
        }
        self.folder.write_results(results)
        self.writer.close()
        return {**results, "folder": self.folder.location}

    def _protocol(self):
        attack, config = self.setup.config.evaluation.attack, self.setup.config
        unlabeled = unlabeled_record(self.setup)
        return {
            "data": config.data.source,
            **({"unlabeled": unlabeled} if unlabeled else {}),
            "split": "test",
            "examples": len(self.setup.splits["test"]),
            "threat_model": str(ThreatModel(attack.norm, attack.epsilon)),
            "norm": attack.norm,
            "epsilon": fraction_text(attack.epsilon),
            "epsilon_decimal": float(attack.epsilon),
            "step_size": fraction_text(attack.step_size),
            "step_size_decimal": float(attack.step_size),
            "num_steps": attack.num_steps,
            "attack": f"{pgd_name(attack)}: PGD on cross-entropy, random start, 1 restart, last iterate",
            "selected_on": config.evaluation.select_on,
            "interval": "95 % Wilson",
        }


class _TensorBoard:
    """Event files beside `metrics.jsonl`; for object storage they are made locally and uploaded."""

    def __init__(self, folder):
        self.storage = folder.storage
        self.temporary = None if self.storage.is_local else tempfile.TemporaryDirectory(prefix="genray-events-")
        self.directory = Path(self.temporary.name if self.temporary else self.storage.path("tensorboard"))
        self.events = None

    def write(self, record):
        epoch = record["epoch"]
        if self.events is None:  # a resumed run hides what an earlier process wrote beyond its checkpoint
            self.events = SummaryWriter(str(self.directory), purge_step=epoch)
        for name, rate in (record["global"] or {}).items():
            self.events.add_scalar(f"global/{name}", rate, epoch)
        for name, weight in record["mixing_weights"].items():
            self.events.add_scalar(f"mixing_weight/{name}", weight, epoch)
        for learner, values in record["learners"].items():
            for name, value in values.items():
                self.events.add_scalar(f"{learner}/{name}", value, epoch)
        self.events.flush()
        if self.temporary:
            self._upload()

    def _upload(self):
        for file in self.directory.iterdir():
            self.storage.write(f"tensorboard/{file.name}", file.read_bytes())

    def close(self):
        if self.events is not None:
            self.events.close()
        if self.temporary:
            self._upload()
            self.temporary.cleanup()
