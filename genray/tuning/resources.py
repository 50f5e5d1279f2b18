"""What the trials of a grid take, known before the first one starts: bundles, passes through the model, seconds."""

import json
import time
from dataclasses import dataclass, replace

import torch

from genray.config import to_dict
from genray.core.threads import threads_kept
from genray.errors import ConfigError
from genray.evaluation.estimate import FORWARDS_A_PASS, resisting_cost
from genray.models import build_model
from genray.models.attack_copy import AttackCopy
from genray.run.devices import evaluation_threads
from genray.run.setup import RunSetup, prepare
from genray.runtime.ray.gpu_shares import gpus_each, placed
from genray.runtime.ray.placement import trial_bundles
from genray.tuning.grid import Grid, Trial

PROBE_BATCH, PROBE_ROUNDS = 8, 7
QUICK_S = 0.05  # a step on a few images that takes longer is not measured on a whole batch


@dataclass(frozen=True)
class Kind:
    """What trials with the same data, model and learners share.

    Attributes:
        setup: the first one's, without its images.
        weight_bytes: of one learner.
        architecture: as in `build_model`.
        sizes: "train", "validation" and "test" -> images.
    """

    setup: RunSetup
    weight_bytes: int
    architecture: dict
    sizes: dict

    @property
    def measured(self) -> tuple:
        """What the speed of a pass depends on."""
        config = self.setup.config
        return str(self.architecture), config.training.batch_size, evaluation_threads(config, self.architecture)


@dataclass(frozen=True)
class PassCount:
    """Forward and backward passes of one image that a trial computes.

    Attributes:
        learners: of each base learner.
        evaluations: of theta_g after epochs, and of the models at the end.
        judging: of the grid's `evaluate` section, if every image resists every attack.
    """

    learners: dict
    evaluations: float
    judging: float

    @property
    def training(self) -> float:
        """All but the judging."""
        return sum(self.learners.values()) + self.evaluations


class Needs:
    """Reads the data of a grid, once a kind of trial.

    Raises:
        DataError, ConfigError: the data is absent or does not fit a trial.
    """

    def __init__(self, grid: Grid):
        self.grid, self.kinds, self.kind_of = grid, {}, {}
        for trial in grid.trials:
            sections = ("data", "model", "base_learners", "device", "compute")
            key = json.dumps([to_dict(trial.config)[section] for section in sections])
            if key not in self.kinds:
                self.kinds[key] = _kind(trial)
            self.kind_of[trial.name] = self.kinds[key]

    def bundles(self, num_gpus: float) -> dict:
        """Trial name -> its bundles, the trial's own first; of a search, the largest are everybody's.

        Args:
            num_gpus: of the cluster.
        """
        made = {id(kind): self._bundles(kind, num_gpus) for kind in self.kinds.values()}
        found = {name: made[id(kind)] for name, kind in self.kind_of.items()}
        return dict.fromkeys(found, _largest(found)) if self.grid.space else found

    def _bundles(self, kind, num_gpus):
        if self.grid.runtime == "local":
            return [_alone(kind.setup.config, num_gpus)]
        return trial_bundles(kind.setup.plan, kind.weight_bytes, num_gpus)

    def passes(self, trial: Trial) -> PassCount:
        """What a trial computes, from its configuration: a step of an attack counts as one of training."""
        kind, config = self.kind_of[trial.name], trial.config
        learners = _learners_passes(config, kind.sizes["train"])
        judged = min(config.training.epochs, 1 + len(config.base_learners)) + 1  # models in the final table
        images = kind.sizes["validation"] * config.training.epochs / config.evaluation.every_epochs
        images *= 1 + len(config.base_learners) * config.evaluation.base_learners
        images += kind.sizes["test"] * judged
        return PassCount(learners, images * config.evaluation.attack.num_steps, self._judging(kind))

    def _judging(self, kind):
        request, size = self.grid.judging, kind.sizes["test"]
        if request is None:
            return 0.0
        size = min(self.grid.evaluate.get("examples", size), size)
        classes = len(kind.setup.class_names)
        return resisting_cost(request, size, classes) / FORWARDS_A_PASS

    def probe(self) -> dict:
        """Trial name -> seconds of one image's pass that trains, and of one that attacks.

        Measured on this machine, now, once a network.
        """
        seconds = {}
        for kind in self.kinds.values():
            if kind.measured not in seconds:
                seconds[kind.measured] = _seconds_a_pass(kind)
        return {name: seconds[kind.measured] for name, kind in self.kind_of.items()}

    def work(self) -> dict:
        """Trial name -> (training with its evaluations, judging), in passes through the model times its size."""
        found = {}
        for trial in self.grid.trials:
            passes, size = self.passes(trial), self.kind_of[trial.name].weight_bytes
            found[trial.name] = (passes.training * size, passes.judging * size)
        return found


def _kind(trial):
    setup = prepare(trial.config, decode=False)
    sizes = {"train": setup.plan.num_train, **{name: len(setup.splits[name]) for name in ("validation", "test")}}
    bare = RunSetup(setup.plan, {}, setup.class_names)
    return Kind(bare, setup.weight_bytes, setup.architecture, sizes)


def _alone(config, num_gpus):
    """The one bundle of a trial that trains its learners one after another, each with what it wants for itself."""
    resources = [learner.resources for learner in config.base_learners.values()]
    gpus = max(gpus_each([each.num_gpus], config.device, num_gpus)[0] for each in resources)
    return {"CPU": float(max(each.num_cpus for each in resources)), **({"GPU": gpus} if gpus else {})}


def _largest(found):
    """One list of bundles that holds each of these."""
    lists = list(found.values())
    if len({len(bundles) for bundles in lists}) > 1:
        raise ConfigError("search: expected trials with equal base learners, because all hold the same bundles")
    return [
        {kind: max(bundle.get(kind, 0) for bundle in same) for kind in {k for bundle in same for k in bundle}}
        for same in zip(*lists)
    ]


def _learners_passes(config, num_train):
    images = config.training.epochs * num_train
    return {
        name: images * (1 + sum(attack.num_steps for attack in learner.all_attacks.values()))
        for name, learner in config.base_learners.items()
    }


def _seconds_a_pass(kind):
    config, architecture = kind.setup.config, kind.architecture
    with threads_kept():
        torch.set_num_threads(evaluation_threads(config, architecture))
        network = build_model(**architecture, seed=0)
        copy = AttackCopy(network, fold=config.compute.fold_batch_norm, in_place=True)
        return tuple(_seconds_of_a_step(f, architecture, config.training.batch_size) for f in (network, copy))


def _seconds_of_a_step(network, architecture, batch_size):
    """Of an image; a whole batch only where a few images are quick."""
    x = torch.rand(batch_size, architecture["in_channels"], *architecture["image_size"], requires_grad=True)
    few = _quickest(network, x[:PROBE_BATCH])
    return few / PROBE_BATCH if few > QUICK_S else _quickest(network, x) / batch_size


def _quickest(network, x):
    seconds = []
    for _ in range(PROBE_ROUNDS):
        began = time.perf_counter()
        network(x).logsumexp(1).sum().backward()
        seconds.append(time.perf_counter() - began)
    return min(seconds)  # what else runs on the machine now is not measured


# --- what fits --------------------------------------------------------------------------------------------------------


def total(parts) -> dict:
    """Sum of resources."""
    parts = list(parts)
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in {k for part in parts for k in part}}


def fits_at_once(wanted: list[list[dict]], nodes: list[dict]) -> int:
    """How many trials, from the first on, find room at the same time, each bundle on the first node that holds it."""
    ends, bundles = [], []
    for trial in wanted:
        bundles += trial
        ends.append(len(bundles))
    found = placed(bundles, nodes)
    return sum(end <= found for end in ends)


@dataclass(frozen=True)
class GridPlan:
    """Attributes:
    at_once: trials that fit at the same time.
    seconds: of computing, without `evaluate`; None where it runs on GPUs or on other machines.
    judging_s: of `evaluate` at most; None as above.
    """

    at_once: int
    seconds: float | None = None
    judging_s: float | None = None


def make_plan(needs: Needs, nodes: list[dict], cores: int | None, max_concurrent: int | None) -> GridPlan:
    """How a grid will run.

    Args:
        needs: of the grid.
        nodes: resources of each node.
        cores: of this machine, where it computes; None where others do.
        max_concurrent: at most so many trials at once, or None.
    """
    wanted = needs.bundles(total(nodes).get("GPU", 0))
    grid = needs.grid
    queue = [wanted[trial.name] for trial in grid.trials]
    queue = queue[:1] * grid.size if grid.space else queue
    at_once = min(fits_at_once(queue, nodes), max_concurrent or grid.size)
    plan = GridPlan(at_once)
    if cores is None or not at_once or any(bundle.get("GPU") for bundles in wanted.values() for bundle in bundles):
        return plan
    seconds, apart = needs.probe(), grid.runtime == "ray"
    longest = summed = judging = 0.0
    for trial in grid.trials:
        passes, (train, attack) = needs.passes(trial), seconds[trial.name]
        images = trial.config.training.epochs * needs.kind_of[trial.name].sizes["train"]
        learners = [train * min(n, images) + attack * max(n - images, 0) for n in passes.learners.values()]
        evaluations = attack * passes.evaluations
        longest += (max(learners) if apart else sum(learners)) + evaluations
        summed += sum(learners) + evaluations
        judging += attack * passes.judging
    scale = grid.size / len(grid.trials)
    at_once = min(at_once, cores)
    plan = replace(plan, seconds=scale * max(longest / at_once, summed / cores))
    return replace(plan, judging_s=scale * judging / at_once)
