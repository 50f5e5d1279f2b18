"""Ray actors: each forwards to a plain object of `learners` or `evaluation`."""

import os
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import ray
import torch

from genray.core.allocator import keep_freed_memory, share_gpu
from genray.core.determinism import use_deterministic_kernels
from genray.core.user_code import give
from genray.errors import PlacementError
from genray.evaluation import Evaluator
from genray.learners.base_learner import BaseLearner
from genray.learners.crafting import share_crafting
from genray.learners.global_learner import GlobalLearner
from genray.parallel import torch_groups
from genray.run.device_memory import check_device_memory, naming_memory
from genray.run.setup import RunSetup

# A second thread, so that `status` answers while a window runs. Ray would still hold it back behind any earlier call
# that waits for its arguments, unless calls may run out of order; the `after` references keep the order that matters.
ACTOR_OPTIONS: dict[str, Any] = {"concurrency_groups": {"control": 1}, "allow_out_of_order_execution": True}
SECONDS_BETWEEN_LINES = 10.0


def pack(setup: RunSetup) -> tuple[RunSetup, dict]:
    """A setup without its splits, and these, whose resident images the processes of a node share without copies."""
    return replace(setup, splits={}, notes=(), identity={}), setup.splits


def unpack(setup: RunSetup, splits: dict) -> RunSetup:
    """The setup that `pack` took apart; its images are read-only."""
    for name, defined in setup.own.items():
        give(defined, name)
    return replace(setup, splits=splits)


def actor_device(wanted: str) -> str:
    """The device of the calling actor: the GPU that Ray gave it, or the CPU.

    `num_gpus=0` does not hide a node's GPUs from a process, so what torch sees is not what the actor may use.
    """
    if not ray.get_gpu_ids() or wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda:0"
    if wanted == "cuda":
        raise PlacementError(f"device: expected cpu, because torch sees no CUDA device on {os.uname().nodename}")
    return "cpu"


class _Worker:
    """Base class of the actors that hold a network: the device and an evaluator."""

    def __init__(self, setup: RunSetup, splits: dict, threads: int):
        self.setup, self.threads = unpack(setup, splits), threads
        if setup.config.compute.deterministic:
            use_deterministic_kernels()
        keep_freed_memory()
        self.device = actor_device(setup.config.device)
        torch.set_num_threads(threads)

    @cached_property
    def evaluator(self):
        return Evaluator(self.setup.config, self.setup.build_network(), self.setup.splits, self.device, self.threads)

    def __repr__(self):  # in Ray's dashboard and log files
        return f"{type(self).__name__}({self.setup.config.name})"

    def whereabouts(self) -> dict:
        """Node, process and device, for the plan and for tests of the pinning."""
        name = torch.cuda.get_device_name(self.device) if self.device != "cpu" else "cpu"
        node = ray.get_runtime_context().get_node_id()
        gpu_ids = [str(i) for i in ray.get_gpu_ids()]
        address = ray.util.get_node_ip_address()
        found = {"node": node, "address": address, "pid": os.getpid(), "gpu_ids": gpu_ids}
        return {**found, "device": self.device, "name": name}

    @ray.method(concurrency_group="control")
    def status(self) -> int:
        """Number of finished steps, 0 for an evaluator; answers while another call runs."""
        return 0

    def evaluate_chunk(self, snapshot, split, start, stop):
        return self.evaluator.evaluate_chunk(snapshot, split, start, stop)


class BaseLearnerActor(_Worker):
    """One base learner, or one of its workers, which all hold the same state.

    `after` arguments only order calls: a method runs once the call that returned its `after` is done.
    """

    def __init__(
        self, worker: torch_groups.WorkerRank, setup: RunSetup, splits: dict, threads: int, state: dict | None = None
    ):
        super().__init__(setup, splits, threads)
        self.worker, self.own, self.everyone = worker, worker.own, worker.everyone
        # Not the evaluator: a tenth of a GPU's time is not a tenth of its memory.
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)
        share_gpu(self.device, share)
        check_device_memory(self.setup, {worker.learner: worker.size}, self.device, share)
        with naming_memory(self.setup, worker.learner, worker.size):
            self._build(worker, threads, state)
        self.last_line = -SECONDS_BETWEEN_LINES

    def _build(self, worker, threads, state):
        train, network = self.setup.splits["train"].to(self.device), self.setup.build_network()
        options: dict[str, Any] = {"process_group": self.own, "pack": self.everyone is not None}
        options["target"] = self.setup.target_network(worker.learner)
        self.learner = BaseLearner(worker.learner, self.setup.plan, network, train, self.device, threads, **options)
        if self.everyone:
            guest = self.setup.build_network()
            self.learner.shared_crafting = share_crafting(
                self.learner, self.everyone, worker.owners, train, guest, len(self.setup.class_names)
            )
        if state is not None:
            self.learner.load_state_dict(state)

    def __repr__(self):
        return f"BaseLearnerActor({self.title})"

    @property
    def title(self) -> str:
        """Run and learner."""
        return f"{self.setup.config.name}: {self.worker.name}"

    def open_store(self, address: str) -> tuple:
        """As `torch_groups.open_store`; (address, port)."""
        return address, torch_groups.open_store(address)

    def join(self, group_specs: dict, meeting: tuple, address: str):
        """Connects the process groups of this actor."""
        mine = {self.worker.learner: self.own, torch_groups.ALL_LEARNERS: self.everyone}
        torch_groups.join(self.worker, mine, group_specs, meeting, address, self.setup.config.runtime.stall_timeout_s)

    @ray.method(num_returns=2)
    def run_window(self, start, stop, hands_over, after=None):
        """Runs a window; returns its stats, and the contribution to theta_g if `hands_over`, else None."""
        with naming_memory(self.setup, self.worker.learner, self.worker.size):
            stats = self.learner.run_window(start, stop)
        self._log(stats)
        # Ray copies a result into the object store before the actor's next call runs: one copy is enough.
        return stats, self.learner.contribution(private=False) if hands_over else None

    def _log(self, stats):
        """Prints a line now and then, and after the last step, to the actor's log file."""
        now, total = time.monotonic(), self.setup.plan.total_steps
        if stats.num_examples and (now - self.last_line >= SECONDS_BETWEEN_LINES or stats.stop == total):
            self.last_line = now
            loss, each = stats.loss_sum / stats.num_examples, stats.seconds / (stats.stop - stats.start)
            print(f"{self.title}: step {stats.stop} of {total}, loss {loss:.4f}, {each:.3g} s a step", flush=True)

    def load_global(self, theta_g, after=None):
        self.learner.load_global(theta_g)

    def start_from(self, other, after=None):
        self.learner.start_from(other)

    def load_target(self, other, after=None):
        self.learner.load_target(other)

    @ray.method(num_returns=2)
    def state_dict(self, after=None):
        """(None, state): the first is the `after` of the next call."""
        return None, self.learner.state_dict()

    @ray.method(num_returns=2)
    def model_snapshot(self, after=None):
        """(None, snapshot of the learner's own model), as `state_dict`."""
        return None, self.learner.model_snapshot()

    @ray.method(concurrency_group="control")
    def status(self) -> int:
        """Finished steps."""
        return self.learner.step


class GlobalLearnerActor:
    """The global learner: pulls the contributions from the object store and sums them."""

    def __init__(self, setup: RunSetup):
        keep_freed_memory()
        self.learner, self.run = GlobalLearner(setup.config), setup.config.name

    def __repr__(self):
        return f"GlobalLearnerActor({self.run})"

    def combine(self, *contributions):
        return self.learner.combine(list(contributions))

    @ray.method(concurrency_group="control")
    def status(self) -> int:
        """0: the answer shows that the process is alive."""
        return 0


class EvaluatorActor(_Worker):
    """Evaluates theta_g while the learners train."""

    @ray.method(num_returns=2)
    def evaluate(self, theta_g, split):
        """({attack: (correct, examples)}, the weights as evaluated)."""
        shipped = self.evaluator.finalize(theta_g)
        return self.evaluator.evaluate(shipped, split), shipped

    def evaluate_own(self, snapshot, split):
        """{attack: (correct, examples)} of a base learner's own model."""
        return self.evaluator.evaluate(snapshot, split)

    def finalize(self, theta_g):
        return self.evaluator.finalize(theta_g)
