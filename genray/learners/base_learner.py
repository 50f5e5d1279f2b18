"""A base learner: one task, one network, its own objective, attack, optimiser, schedule and averages."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from genray.attacks import FriendlyAttack, StreamDraw
from genray.config.schema import SGD
from genray.core.flat import FlatWeights, from_array, to_array
from genray.core.mixing import accumulate_, ema_update_
from genray.core.rng import generator, host_generator, key_seed
from genray.core.schedules import ema_decay
from genray.data.augment import Augmentation
from genray.data.loader import BatchLoader
from genray.errors import NonFiniteError
from genray.learners.passes import Passes
from genray.learners.plan import RunPlan
from genray.learners.setup import memory_format
from genray.learners.stopwatch import Stopwatch
from genray.learners.weight_perturbation import WeightPerturbation
from genray.objectives import TrainingStep, build_objective
from genray.types import WeightSnapshot


@dataclass(frozen=True)
class WindowStats:
    """What a learner did in a window; sums over its training images, on the inputs it trained on.

    Attributes:
        seconds: the window took, and of these
        attack_seconds: crafting adversarial images, and
        averaging_seconds: the learner's average and its share of theta_g; the rest are its optimiser steps.
        transfer_seconds: before the window, copying its share out of the device's memory and theta_g into it.
        waiting_seconds: since its last window, apart from that: for theta_g, for other learners, for its next call.
    """

    start: int
    stop: int
    loss_sum: float
    num_correct: int
    num_examples: int
    learning_rate: float
    seconds: float
    attack_seconds: float = 0.0
    averaging_seconds: float = 0.0
    transfer_seconds: float = 0.0
    waiting_seconds: float = 0.0


class BaseLearner:
    """Runs windows of optimiser steps and keeps its share of theta_g.

    A plain object: the Ray actor only forwards to it, the local runtime calls it directly. All randomness is keyed
    by (seed, name, purpose, step), so a window can be run again anywhere with the same bits.

    Args:
        name: key in `base_learners`.
        plan: the run's plan.
        network: freshly built, the same initial weights for every learner; taken over.
        train: the training `Split`.
        device: where it computes.
        threads: torch's CPU threads while it runs.
    """

    def __init__(self, name: str, plan: RunPlan, network: torch.nn.Module, train, device="cpu", threads: int = 1):
        self.name, self.plan, self.threads = name, plan, threads
        self.config, run = plan.config.base_learners[name], plan.config
        self.device = torch.device(device)
        self.network = network.to(self.device).train()
        self.flat = FlatWeights(self.network)
        self.passes = Passes(self.network, run.compute, self.device)
        self.average = self.flat.weights.clone()
        self.share = self.flat.weights / len(run.base_learners)
        self.objective = build_objective(self.config.objective)
        self.attacks = self.objective.build_attacks(self.config.all_attacks)
        self.perturbation = WeightPerturbation(self.flat, self.config.awp.gamma) if self.config.awp else None
        self.optimizer = _build_optimizer(self.config.optimizer, self.flat.parameter)
        self.loader = _build_loader(name, plan, train, self.device)
        self.stochastic = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.network.modules())
        self.step = 0
        self.on_step = None  # called after every step, to show progress
        self.stopwatch = Stopwatch(self.device)
        self.rests_since, self.transferred = None, 0.0  # since when there is no window; seconds of hand-over in it

    def run_window(self, start: int, stop: int) -> WindowStats:
        """Takes steps [start, stop).

        Raises:
            NonFiniteError: loss or weights are no longer finite.
            ValueError: the learner stands at another step.
        """
        if start != self.step:
            raise ValueError(f"{self.name}: expected a window from step {self.step}, got one from {start}")
        torch.set_num_threads(self.threads)
        began = time.perf_counter()
        rested = 0.0 if self.rests_since is None else began - self.rests_since
        self.stopwatch.begin(stop - start)
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        num_correct = torch.zeros((), device=self.device, dtype=torch.int64)
        num_examples, losses = 0, []
        while self.step < stop:
            loss, correct, size = self._take_step(self.step)
            losses.append(loss)
            loss_sum += loss.double() * size
            num_correct += correct
            num_examples += size
            self.step += 1
            self.stopwatch.next_step()
            if self.on_step:
                self.on_step()
        self._check_finite(loss_sum, losses, start)
        rate = self.plan.learning_rate(self.name, stop - 1)
        sums = float(loss_sum), int(num_correct), num_examples
        times = self.stopwatch.seconds("attack"), self.stopwatch.seconds("averaging"), self.transferred
        self.rests_since, self.transferred = time.perf_counter(), 0.0
        seconds = self.rests_since - began
        return WindowStats(start, stop, *sums, rate, seconds, *times, max(0.0, rested - times[-1]))

    def _take_step(self, step):
        """One optimiser step, then both averages. No host synchronisation."""
        x, y = self.loader.batch(step)
        x = x.contiguous(memory_format=memory_format(self.plan.config))
        with self._keyed_dropout(step), self._perturbed(step, x, y) as craft:
            loss, logits = self.objective(self._training_step(step, x, y, craft))
            self.flat.zero_grad()
            loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(self.name, step)
        self.optimizer.step()
        with self.stopwatch.part("averaging"):
            self._update_averages(step)
        return loss.detach(), (logits.detach().argmax(1) == y).sum(), len(y)

    def _training_step(self, step, x, y, craft):
        key = (self.plan.config.seed, self.name, "objective", step)
        draw, numbers = lambda: StreamDraw(generator(self.device, *key)), lambda: host_generator(*key)
        return TrainingStep(self.passes.training, x, y, craft, draw, numbers, self.loader.labelled(step))

    @contextmanager
    def _perturbed(self, step, x, y):
        """Gives what crafts adversarial images; with AWP the weights are perturbed inside."""
        crafted = {}

        def craft(name):
            if name not in crafted:
                crafted[name] = self._craft(name, step, x, y)
            return crafted[name]

        def craft_outside(name):
            return self.perturbation.attack(lambda: craft(name))

        if self.perturbation is None or step < self.config.awp.warmup_epochs * self.plan.steps_per_epoch:
            yield craft
            return
        with self.perturbation.applied(lambda: self._loss_alone(step, x, y, craft_outside)):
            yield craft

    def _loss_alone(self, step, x, y, craft):
        """The loss, with nothing kept of the pass but its gradient (and BatchNorm's statistics)."""
        state = self.objective.state_dict()
        with self._keyed_dropout(step, "perturbation"):
            loss, _ = self.objective(self._training_step(step, x, y, craft))
        self.objective.load_state_dict(state)
        return loss

    def _craft(self, name, step, x, y):
        """Adversarial images against the network of now."""
        attack, number = self.attacks[name], list(self.attacks).index(name)
        key = (self.plan.config.seed, self.name, "attack", step, *([number] if number else []))
        values = {"tau": int(self.plan.tau(self.name, step))} if isinstance(attack, FriendlyAttack) else {}
        draw = StreamDraw(generator(self.device, *key))
        with self.stopwatch.part("attack"):
            return attack(self.passes.attacked(attack.mode), x, y, draw, **values)

    @torch.no_grad()
    def _update_averages(self, step):
        averaging, glob = self.config.averaging, self.plan.config.global_learner
        if averaging.enabled:
            ema_update_(self.average, self.flat.weights, ema_decay(step, averaging.decay))
        mixed = self.averaged if glob.mix == "averaged" else self.flat.weights
        weight = self.plan.mixing_weight(self.name, step)
        accumulate_(self.share, mixed, ema_decay(step, glob.decay), weight)

    @property
    def averaged(self) -> torch.Tensor:
        """The averaged weights; the raw ones where averaging is off."""
        return self.average if self.config.averaging.enabled else self.flat.weights

    def _keyed_dropout(self, step, purpose="dropout"):
        """Dropout layers draw from the global generators, so those are keyed for the step and put back after it."""
        if not self.stochastic:
            return nullcontext()
        return _seeded(key_seed(self.plan.config.seed, self.name, purpose, step), self.device)

    def _check_finite(self, loss_sum, losses, start):
        """Looks once a window, so that no step waits for the device."""
        # A sum shows every NaN and infinity in one pass; only if it is suspicious, each number is looked at.
        if torch.isfinite(loss_sum + self.flat.weights.sum() + self.share.sum()):
            return
        finite = torch.isfinite(torch.stack(losses)) if losses else torch.ones(1, dtype=torch.bool)
        if finite.all() and torch.isfinite(self.flat.weights).all() and torch.isfinite(self.share).all():
            return
        first = int(finite.long().argmin()) if not finite.all() else len(losses) - 1
        what = f"loss {float(losses[first]):g}" if not finite.all() else "weights NaN or infinite"
        epoch, batch = divmod(start + first, self.plan.steps_per_epoch)
        error = NonFiniteError(
            f"base_learners.{self.name}: {what} at step {start + first} (batch {batch} of epoch {epoch + 1}); a lower "
            f"base_learners.{self.name}.lr is the usual cure, and training.on_non_finite: rollback tries it by itself"
        )
        error.learner = self.name
        raise error

    def contribution(self, *, private: bool = True) -> WeightSnapshot:
        """The learner's share G_k of theta_g; `private` as in `FlatWeights.snapshot`."""
        with self._transfer():
            return self.flat.snapshot(self.step, self.share, private=private)

    def model_snapshot(self) -> WeightSnapshot:
        """The learner's own model: its averaged weights, or the raw ones where averaging is off."""
        return self.flat.snapshot(self.step, self.averaged)

    def load_global(self, theta_g: WeightSnapshot):
        """Redistribution: weights and buffers become theta_g's; optimiser, averages and share stay (methods A1)."""
        if theta_g.step != self.step:
            raise ValueError(f"{self.name}: expected theta_g of step {self.step}, got step {theta_g.step}")
        with self._transfer():
            self.flat.load(theta_g)

    @contextmanager
    def _transfer(self):
        began = time.perf_counter()
        yield
        self.transferred += time.perf_counter() - began

    def state_dict(self) -> dict:
        """All of the learner's state, as arrays and numbers in host memory."""
        state = self.optimizer.state_dict()["state"].get(0, {})
        return {
            "step": self.step,
            "weights": to_array(self.flat.weights),
            "counters": to_array(self.flat.counters),
            "average": to_array(self.average),
            "share": to_array(self.share),
            "optimizer": {key: to_array(v) if torch.is_tensor(v) else v for key, v in state.items() if v is not None},
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict):
        """Goes back to a state that `state_dict` gave, on this learner's device."""
        self.step = state["step"]
        self.flat.load(WeightSnapshot(self.step, state["weights"], state["counters"]))
        self.average.copy_(from_array(state["average"]))
        self.share.copy_(from_array(state["share"]))
        self.objective.load_state_dict(state["objective"])
        fresh = self.optimizer.state_dict()
        stored = state["optimizer"].items()
        fresh["state"] = {0: {key: from_array(v.copy()) if hasattr(v, "shape") else v for key, v in stored}}
        self.optimizer.load_state_dict(fresh if stored else {**fresh, "state": {}})


def _build_optimizer(options, parameter):
    common = {"lr": 0.0, "weight_decay": options.weight_decay}
    if isinstance(options, SGD):
        # Fused: one pass over the flat weights, with no temporary array of their size. (Fused Adam rounds otherwise.)
        return torch.optim.SGD([parameter], momentum=options.momentum, nesterov=options.nesterov, fused=True, **common)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[type(options).__name__]
    return kind([parameter], betas=(options.beta1, options.beta2), **common)


def _build_loader(name, plan: RunPlan, train, device):
    run, unlabeled = plan.config, plan.config.data.unlabeled
    share = unlabeled.batch_share if unlabeled else None
    learner = run.base_learners[name]
    augmentation = learner.augmentation
    return BatchLoader(
        train,
        batch_size=run.training.batch_size,
        seed=run.seed,
        order_key="shared" if learner.data_order == "shared" else name,
        augmentation_key="shared" if learner.data_order == "shared" else name,
        augmentation=Augmentation(**vars(augmentation)),
        device=device,
        drop_last=run.training.drop_last,
        unlabeled_share=share,
        epoch_examples=None if share is None else plan.num_train,
    )


@contextmanager
def _seeded(seed, device):
    """Seeds torch's global generators and restores their states afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
