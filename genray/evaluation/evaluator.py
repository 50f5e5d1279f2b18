"""Evaluates the learners' weights: one network, into which each snapshot is loaded."""

import numpy as np
import torch

from genray.core.flat import FlatWeights
from genray.data.augment import Augmentation
from genray.data.loader import BatchLoader
from genray.evaluation.robust import evaluate_chunk, final_attacks
from genray.learners.execution import Execution
from genray.types import WeightSnapshot


class Evaluator:
    """Counts correct examples of theta_g and of base learners on the validation and test parts.

    A plain object, like the learners: an actor forwards to it, the local runtime calls it.

    Args:
        config: the run's configuration.
        network: of the run's architecture; its weights are overwritten.
        splits: {"train", "validation", "test"} -> `Split`.
        device: of the network.
        threads: torch's CPU threads during an evaluation.
    """

    def __init__(self, config, network, splits, device="cpu", threads=1):
        self.config, self.splits, self.threads = config, splits, threads
        self.attacks = final_attacks(config)
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.flat = FlatWeights(self.network)
        self.passes = Execution(self.network, config.compute.replace(precision="fp32", compile=False), self.device)
        self.loaded: WeightSnapshot | None = None

    def _load(self, snapshot):
        """Once a snapshot, of whose chunks there may be many."""
        if self.loaded is not snapshot:
            self.flat.load(snapshot)
            self.passes.refresh()
            self.loaded = snapshot

    def evaluate_chunk(self, snapshot: WeightSnapshot, split: str, start: int, stop: int) -> dict:
        """Flags of examples [start, stop) under all attacks of the final table: {"natural": (n,) bool array, ...}."""
        return self._flags(snapshot, split, start, stop, self.attacks)

    def _flags(self, snapshot, split, start, stop, attacks):
        torch.set_num_threads(self.threads)
        self._load(snapshot)
        flags, how = {}, {"seed": self.config.seed, "device": self.device, "attacked": self.passes.attacked("eval")}
        for name in attacks:
            some = self.splits[split], start, stop
            flags |= evaluate_chunk(self.network, *some, attack_config=self.attacks[name], name=name, **how)
        return {name: values.numpy() for name, values in flags.items()}

    def evaluate(self, snapshot: WeightSnapshot, split: str) -> dict:
        """Number of correct and of all examples of a whole split: {"natural": (correct, examples), "pgd20": ...}."""
        size, first = len(self.splits[split]), list(self.attacks)[:1]
        ranges = chunks(size, self.config.evaluation.batch_size)
        parts = [self._flags(snapshot, split, *chunk, first) for chunk in ranges]
        return {name: (int(sum(part[name].sum() for part in parts)), size) for name in parts[0]}

    def finalize(self, theta_g: WeightSnapshot) -> WeightSnapshot:
        """theta_g as it is evaluated and saved: with re-estimated BatchNorm statistics if the run asks for them."""
        if self.config.global_learner.batch_norm == "mix":
            return theta_g
        torch.set_num_threads(self.threads)
        if self.loaded is not theta_g:  # without the attacked copy, because the statistics change
            self.flat.load(theta_g)
        self.loaded = None
        reestimate_batch_norm(self.network, clean_batches(self.config, self.splits["train"], self.device))
        return self.flat.snapshot(theta_g.step)


def clean_batches(config, train, device):
    """The images that BatchNorm statistics are re-estimated on: `reestimate_batches` training batches, not augmented.

    Args:
        config: the run's configuration.
        train: its training `Split`.
        device: of the batches.

    Returns:
        A generator of (N, C, H, W) images in [0, 1].
    """
    loader = BatchLoader(
        train,
        batch_size=min(config.training.batch_size, len(train)),
        seed=config.seed,
        order_key="reestimate",
        augmentation_key="reestimate",
        augmentation=Augmentation(0, False, "zeros"),
        device=device,
        drop_last=True,
    )
    number = min(config.global_learner.reestimate_batches, loader.steps_per_epoch)
    return (loader.batch(step)[0] for step in range(number))


def chunks(size: int, batch_size: int) -> list[tuple[int, int]]:
    """Ranges of a split's examples; fixed, so that results do not depend on the number of workers."""
    return [(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]


def join_flags(chunks: list[dict]) -> dict:
    """Flags of consecutive chunks as one array an attack."""
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


@torch.no_grad()
def reestimate_batch_norm(network, batches):
    """Replaces all BatchNorm running statistics by their plain averages over batches of clean images.

    Args:
        network: left in eval mode.
        batches: iterable of (N, C, H, W) images in [0, 1].
    """
    layers = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average
        layer.train()
    for x in batches:
        network(x)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
    network.eval()
