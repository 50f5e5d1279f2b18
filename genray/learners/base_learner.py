"""A base learner: one task, one network, its own objective, attack, optimiser, schedule and averages."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from genray.attacks import StreamDraw
from genray.core.determinism import float32_precision
from genray.core.flat import FlatWeights, from_array, to_array
from genray.core.mixing import accumulate_, ema_update_
from genray.core.rng import generator, host_generator, key_seed
from genray.core.schedules import ema_decay
from genray.errors import NonFiniteError
from genray.learners.crafting import Batch, Crafter, Source
from genray.learners.execution import Execution
from genray.learners.optimizer import FlatOptimizer
from genray.learners.stopwatch import Stopwatch
from genray.learners.target import TargetNetwork
from genray.learners.weight_perturbation import WeightPerturbation
from genray.learners.window_statistics import StatsAccumulator, WindowStats
from genray.models.other_networks import OtherNetwork, classifier_name
from genray.objectives import TrainingStep, build_objective
from genray.parallel.gradient_sum import GradientSum
from genray.parallel.process_group import ALONE, ProcessGroup, Shard
from genray.parallel.whole_batch import across_batches
from genray.run.plan import RunPlan
from genray.types import WeightSnapshot


class BaseLearner:
    """Runs windows of optimiser steps and keeps its share of theta_g.

    A plain object: the Ray actor only forwards to it, the local runtime calls it directly. All randomness is keyed
    by (seed, name, purpose, step), so a window can be run again anywhere with the same bits.

    Args:
        name: key in `base_learners`.
        plan: the run's plan.
        network: a new network with the run's initial weights, which the learner trains in place.
        train: the training `Split`.
        device: torch device.
        threads: number of torch's CPU threads.
        target: the network of an objective that uses one, with the weights to begin with.
        process_group: the processes that train it together, each with a `BaseLearner` of the same state: each computes
            its shard of every batch, and their gradients are summed.
        pack: as of `Execution`.
    """

    def __init__(
        self,
        name: str,
        plan: RunPlan,
        network: torch.nn.Module,
        train,
        device="cpu",
        threads: int = 1,
        *,
        target: torch.nn.Module | None = None,
        process_group: ProcessGroup = ALONE,
        pack: bool = False,
    ):
        self.name, self.plan, self.threads, self.process_group = name, plan, threads, process_group
        self.config, run = plan.config.base_learners[name], plan.config
        self.device = torch.device(device)
        self.network = network.to(self.device).train()
        self.whole_batch = across_batches(self.network, process_group)
        self.flat = FlatWeights(self.network)
        self.gradient = GradientSum(self.flat, process_group)
        self.passes = Execution(self.network, run.compute, self.device, pack=pack)
        self.target = TargetNetwork(target, run.compute, self.device) if target is not None else None
        self.head = FrozenHead(network) if getattr(self.config.objective, "freeze_head", False) else None
        self.average = self.flat.weights.clone()
        self.share = self.flat.weights / len(run.base_learners)
        self.objective = build_objective(self.config.objective)
        self.crafter = Crafter(name, plan, self.objective)
        self.attacks = self.crafter.attacks
        self.attacks_copy = any(attack.mode == "eval" for attack in self.attacks.values())
        self.shared_crafting: Any = None  # a `SharedCrafting` if the processes of all learners compute attacks together
        self.perturbation = WeightPerturbation(self.flat, self.config.awp.gamma) if self.config.awp else None
        self.optimizer = FlatOptimizer(self.config.optimizer, self.flat)
        self.source = Source(name, plan, train, self.device)
        self.loader = self.source.loader
        # Another library's network may draw from the global generators anywhere (stochastic depth, functional dropout).
        self.stochastic = isinstance(network, OtherNetwork) or any(
            isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.network.modules()
        )
        self.step = 0
        self.on_step = None  # called after every step, to show progress
        self.stopwatch = Stopwatch(self.device)
        self.rests_since: float | None = None  # end of the last window
        self.transferred = 0.0  # seconds of weight transfer since then

    def run_window(self, start: int, stop: int) -> WindowStats:
        """Takes steps [start, stop).

        Raises:
            NonFiniteError: loss or weights are no longer finite.
            ValueError: the learner is at another step.
        """
        if start != self.step:
            raise ValueError(f"{self.name}: expected a window from step {self.step}, got one from {start}")
        torch.set_num_threads(self.threads)
        began = time.perf_counter()
        rested = 0.0 if self.rests_since is None else began - self.rests_since
        self.stopwatch.begin(stop - start)
        accumulator, self.crafter.radii = StatsAccumulator(self.process_group, self.device), None
        with float32_precision("tf32" if self.plan.config.compute.precision == "tf32" else "fp32"):
            while self.step < stop:
                if self.plan.trains(self.name, self.step):
                    accumulator.add(*self._take_step(self.step))
                else:
                    self._pass_step(self.step)
                self.step += 1
                self.stopwatch.next_step()
                if self.on_step:
                    self.on_step()
        accumulator.settle()
        if stop > start:  # a window of no steps only hands over
            self._check_finite(accumulator, start)
        rate = self.plan.learning_rate(self.name, stop - 1)
        sums = float(accumulator.loss_sum), int(accumulator.num_correct), accumulator.num_examples
        times = self.stopwatch.seconds("attack"), self.stopwatch.seconds("averaging"), self.transferred
        self.rests_since, self.transferred = time.perf_counter(), 0.0
        seconds = self.rests_since - began
        radii = {} if self.crafter.radii is None else self.crafter.mean_radii()
        return WindowStats(start, stop, *sums, rate, seconds, *times, max(0.0, rested - times[-1]), **radii)

    def _take_step(self, step):
        """Takes one optimiser step and updates both averages. Nothing waits for the device, except gloo on CPU.

        Returns:
            (mean loss of the shard, number of its correct predictions, the shard).
        """
        whole = self.source.batch(step)
        shard = self.whole_batch.shard = self.process_group.shard(len(whole.y))
        if self.target and self.shared_crafting:
            whole = replace(whole, target=self.target(whole.x))
        batch = whole.of(shard)
        if self.target and batch.target is None:
            batch = replace(batch, target=self.target(batch.x))
        crafted = self._prepare_attacks(whole, shard)
        with self._keyed_dropout(step), self._perturbed(batch, shard, crafted) as craft:
            loss, logits = self.objective(self._training_step(batch, shard, craft))
            self.gradient.backward(self._summand(loss, shard))
        self.optimizer.step(self.plan.learning_rate(self.name, step))
        if self.head:
            self.head.restore()
        with self.stopwatch.part("averaging"):
            self._update_averages(step)
        return loss.detach(), (logits.detach().argmax(1) == batch.y).sum(), shard

    def _pass_step(self, step):
        """Lets a step pass in which the learner does not train, with its part in what is done together."""
        if self.shared_crafting:
            self.shared_crafting.craft(step)
        self._update_share(step)

    def _prepare_attacks(self, whole: Batch, shard):
        """The step's images that all processes craft together; otherwise the attacked copy follows the network."""
        if not self.shared_crafting and not self.attacks_copy:
            return {}
        with self.stopwatch.part("attack"):
            if self.shared_crafting:
                made = self.shared_crafting.craft(whole.step, whole)
                return {name: shard.of(images) for name, images in made.items()}
            self.passes.refresh()
            return {}

    def _summand(self, loss, shard: Shard):
        """The summand of the shard in the loss of the batch."""
        return loss if self.process_group.size == 1 else loss * shard.weight

    def _training_step(self, batch: Batch, shard, craft):
        key = (self.plan.config.seed, self.name, "objective", batch.step)
        draw, numbers = lambda: StreamDraw(generator(self.device, *key), shard), lambda: host_generator(*key)
        shared = self.process_group, shard, self.source.memory_format
        given = self.passes.training, batch.x, batch.y
        return TrainingStep(*given, craft, draw, numbers, batch.labelled, batch.target, *shared, batch.mixed)

    @contextmanager
    def _perturbed(self, batch, shard, crafted):
        """Yields the function that crafts images, each attack once; with AWP the weights are perturbed inside."""

        def craft(name):
            if name not in crafted:
                with self.stopwatch.part("attack"):
                    crafted[name] = self.crafter.craft(name, self.passes, batch, shard, self.process_group)
            return crafted[name]

        def craft_outside(name):
            return self.perturbation.attack(lambda: craft(name))

        if self.perturbation is None or batch.step < self.config.awp.warmup_epochs * self.plan.steps_per_epoch:
            yield craft
            return
        with self.perturbation.applied(lambda: self.gradient.backward(self._loss_alone(batch, shard, craft_outside))):
            yield craft

    def _loss_alone(self, batch, shard, craft):
        """The loss of an additional pass: the objective's state stays as it was."""
        state = self.objective.state_dict()
        with self._keyed_dropout(batch.step, "perturbation"):
            loss, _ = self.objective(self._training_step(batch, shard, craft))
        self.objective.load_state_dict(state)
        return self._summand(loss, shard)

    @torch.no_grad()
    def _update_averages(self, step):
        averaging = self.config.averaging
        if averaging.enabled:
            ema_update_(self.average, self.flat.weights, ema_decay(step, averaging.decay))
        self._update_share(step)

    @torch.no_grad()
    def _update_share(self, step):
        glob = self.plan.config.global_learner
        mixed = self.averaged if glob.mix == "averaged" else self.flat.weights
        weight = self.plan.mixing_weight(self.name, step)
        accumulate_(self.share, mixed, ema_decay(step, glob.decay), weight)

    @property
    def averaged(self) -> torch.Tensor:
        """The averaged weights, or the raw ones if averaging is off."""
        return self.average if self.config.averaging.enabled else self.flat.weights

    def _keyed_dropout(self, step, purpose="dropout"):
        """Seeds the global generators, which dropout layers draw from, for one step and restores them."""
        if not self.stochastic:
            return nullcontext()
        return _seeded(key_seed(self.plan.config.seed, self.name, purpose, step), self.device)

    def _check_finite(self, accumulator, start):
        """Checks once a window, so that no step waits for the device."""
        losses = accumulator.losses
        # A sum is not finite if a summand is not; each number is checked only if the sum is not finite.
        if torch.isfinite(accumulator.loss_sum + self.flat.weights.sum() + self.share.sum()):
            return
        finite = torch.isfinite(losses) if len(losses) else torch.ones(1, dtype=torch.bool)
        if finite.all() and torch.isfinite(self.flat.weights).all() and torch.isfinite(self.share).all():
            return
        first = int(finite.long().argmin()) if not finite.all() else len(losses) - 1
        what = f"loss {float(losses[first]):g}" if not finite.all() else "weights NaN or infinite"
        epoch, batch = divmod(start + first, self.plan.steps_per_epoch)
        raise NonFiniteError(
            f"base_learners.{self.name}: {what} at step {start + first} (batch {batch} of epoch {epoch + 1}); a lower "
            f"base_learners.{self.name}.lr in a new run is the usual cure; --resume goes on from the newest "
            "checkpoint at the same rate"
        )

    def contribution(self, *, private: bool = True) -> WeightSnapshot:
        """The learner's share G_k of theta_g; `private` as in `FlatWeights.snapshot`."""
        with self._transfer():
            return self.flat.snapshot(self.step, self.share, private=private)

    def model_snapshot(self) -> WeightSnapshot:
        """The learner's own model: its averaged weights, or the raw ones if averaging is off."""
        return self.flat.snapshot(self.step, self.averaged)

    def load_global(self, theta_g: WeightSnapshot):
        """Redistribution: weights and buffers become theta_g's; optimiser, averages and share stay (methods A1).

        A learner that does not train at this time keeps its weights.
        """
        if theta_g.step != self.step:
            raise ValueError(f"{self.name}: expected theta_g of step {self.step}, got step {theta_g.step}")
        if self.plan.takes_global(self.name, self.step):
            self._load(theta_g)

    def start_from(self, other: WeightSnapshot):
        """Before its first step: weights, buffers and average become the other learner's."""
        self._load(other)
        self.average.copy_(self.flat.weights)

    def load_target(self, other: WeightSnapshot):
        """The other learner's weights become those of the target network."""
        with self._transfer():
            self.target.load(other)

    def _load(self, snapshot):
        with self._transfer():
            self.flat.load(snapshot)
        if self.head:
            self.head.keep()

    @contextmanager
    def _transfer(self):
        began = time.perf_counter()
        yield
        self.transferred += time.perf_counter() - began

    @property
    def _follows_a_learner(self):
        return self.target is not None and self.config.target.learner is not None

    def state_dict(self) -> dict:
        """The learner's complete state as NumPy arrays and numbers; flat tensors are without padding."""
        pack = self.flat.layout.pack
        return {
            "step": self.step,
            "weights": to_array(pack(self.flat.weights), copy=False),
            "counters": self.flat.packed_counters(),
            "average": to_array(pack(self.average), copy=False),
            "share": to_array(pack(self.share), copy=False),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "target": vars(self.target.flat.snapshot(self.step)) if self._follows_a_learner else None,
        }

    def load_state_dict(self, state: dict):
        """Restores a state returned by `state_dict`, on this learner's device."""
        self.step = state["step"]
        self._load(WeightSnapshot(self.step, state["weights"], state["counters"]))
        if self._follows_a_learner:
            self.target.load(WeightSnapshot(**state["target"]))
        self.flat.layout.unpack_(self.average, from_array(state["average"]))
        self.flat.layout.unpack_(self.share, from_array(state["share"]))
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])


class FrozenHead:
    """Keeps the layer that computes the logits as it was loaded, while the other weights are trained.

    Its weights stay among the flat ones, so that all learners' snapshots have one layout.

    Args:
        network: the learner's, whose weights are views of the flat ones.
    """

    def __init__(self, network: torch.nn.Module):
        layer = network.get_submodule(classifier_name(network) or "")
        self.live = [parameter.data for parameter in layer.parameters(recurse=False)]
        self.kept = [tensor.clone() for tensor in self.live]

    def keep(self):
        """The head's weights of now are those to keep."""
        torch._foreach_copy_(self.kept, self.live)

    def restore(self):
        """Undoes an update of the head."""
        torch._foreach_copy_(self.live, self.kept)


@contextmanager
def _seeded(seed, device):
    """Seeds torch's global generators and restores their states afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
