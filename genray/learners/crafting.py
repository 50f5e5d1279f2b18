"""Crafting adversarial images: by the learner's own processes, or by the processes of all learners together."""

from dataclasses import dataclass, replace

import torch

from genray.attacks import FriendlyAttack, StreamDraw
from genray.attacks.radii import radius_factors, steepness, with_radii
from genray.core.mixed_labels import MixedLabels
from genray.core.rng import generator, host_generator
from genray.data.augment import Augmentation, cutmix
from genray.data.loader import BatchLoader
from genray.learners.execution import Execution
from genray.objectives import Objective, build_objective
from genray.parallel.process_group import ProcessGroup, Shard
from genray.run.plan import RunPlan
from genray.run.setup import memory_format


@dataclass(frozen=True)
class Batch:
    """A step's minibatch: x (N, C, H, W) in [0, 1] in the run's memory format, y (N,), labelled (N,) bool or None,
    target (N, K) logits of the learner's target network or None, mixed the labels of images with CutMix."""

    step: int
    x: torch.Tensor
    y: torch.Tensor
    labelled: torch.Tensor | None = None
    target: torch.Tensor | None = None
    mixed: MixedLabels | None = None

    def of(self, shard: Shard) -> "Batch":
        return Batch(self.step, *map(shard.of, (self.x, self.y, self.labelled, self.target, self.mixed)))


class Source:
    """A learner's minibatches, the same in every process.

    Args:
        name: the learner's.
        plan: the run's plan.
        train: the training `Split`; on `device`, no copy is made.
        device: torch device of the minibatches.
    """

    def __init__(self, name: str, plan: RunPlan, train, device):
        run, extra = plan.config, plan.config.data.extra
        learner = run.base_learners[name]
        key = "shared" if learner.data_order == "shared" else name
        augmentation = dict(vars(learner.augmentation))
        self.cutmix, self.key = augmentation.pop("cutmix"), (run.seed, key, "cutmix")
        self.memory_format = memory_format(run)
        self.loader = BatchLoader(
            train,
            batch_size=run.training.batch_size,
            seed=run.seed,
            order_key=key,
            augmentation_key=key,
            augmentation=Augmentation(**augmentation),
            device=device,
            drop_last=run.training.drop_last,
            extra_share=extra.batch_share if extra else None,
            own_examples=plan.num_train,
            decoding_workers=run.data.decoding_workers,
        )

    def batch(self, step: int) -> Batch:
        (x, y), mixed = self.loader.batch(step), None
        if self.cutmix:
            x, mixed = cutmix(x, y, self.cutmix, host_generator(*self.key, step))
        x = x.contiguous(memory_format=self.memory_format)
        return Batch(step, x, y, self.loader.labelled(step), mixed=mixed)


class Crafter:
    """A learner's attacks, with the random numbers of their step.

    Args:
        name: the learner's.
        plan: the run's plan.
        objective: the learner's.

    Attributes:
        attacks: name -> attack.
        radii: with a radius per example, (3,) sums over batches: their number, the mean and the standard deviation of
            their radii; None before the first.
    """

    def __init__(self, name: str, plan: RunPlan, objective: Objective):
        self.name, self.plan, self.objective = name, plan, objective
        self.configs = plan.config.base_learners[name].all_attacks
        self.attacks = objective.build_attacks(self.configs)
        self.radii: torch.Tensor | None = None

    def craft(
        self, attack_name: str, passes: Execution, batch: Batch, shard: Shard, process_group: ProcessGroup
    ) -> torch.Tensor:
        """Adversarial images of one shard of a batch.

        Args:
            attack_name: key of `attacks`.
            passes: the `Execution` of the network under attack, refreshed.
            batch: the examples of the shard.
            shard: their position in the whole batch.
            process_group: the processes that have the other shards.
        """
        attack, number = self._attack(attack_name, batch.step), list(self.attacks).index(attack_name)
        key: tuple[str | int, ...] = (self.name, "attack", batch.step, *([number] if number else []))
        values: dict = {"tau": int(self.plan.tau(self.name, batch.step))} if isinstance(attack, FriendlyAttack) else {}
        if batch.target is not None or batch.mixed:
            values["target"] = batch.mixed or batch.target  # objectives with a target network have no CutMix
        draw = StreamDraw(generator(batch.x.device, self.plan.config.seed, *key), shard)
        network, clip = passes.attacked(attack.mode), next(iter(self.configs.values())).radius_clip
        if clip:  # then there is one attack
            attack = self._with_radii(attack, clip, network, batch, shard, process_group)
        if not len(shard) and attack.mode == "eval":
            return batch.x
        return attack(network, batch.x, batch.y, draw, **values)

    def _attack(self, name, step):
        """The attack; with `scale`, with the radius and the step size of the step."""
        factors = {key: self.plan.attack_scale(self.name, key, step) for key, c in self.configs.items() if c.scale}
        if not factors:
            return self.attacks[name]
        scaled = {key: self.configs[key].scaled(factor) for key, factor in factors.items()}
        return self.objective.build_attacks(self.configs | scaled)[name]

    def _with_radii(self, attack, clip, network, batch, shard, process_group):
        """The attack with a radius per example. Their mean is that of the whole batch, in every process."""
        mine = steepness(network, batch.x, batch.mixed or batch.y, training=attack.mode == "train")
        factors = radius_factors(process_group.whole(mine, shard), clip)
        radii = attack.epsilon * factors
        sums = torch.stack([torch.ones_like(radii[0]), radii.mean(), radii.std(correction=0)])
        self.radii = sums if self.radii is None else self.radii + sums
        return with_radii(attack, shard.of(factors))

    def mean_radii(self) -> dict:
        """Mean and standard deviation of a batch's radii, on average over the batches since `radii` was None."""
        number, mean, spread = self.radii.tolist()
        return {"radius_mean": mean / number, "radius_spread": spread / number}

    def wanted(self, step: int) -> tuple:
        """Names of the attacks that the objective needs in a step, given its current state."""
        numbers = host_generator(self.plan.config.seed, self.name, "objective", step)
        return self.objective.wanted(tuple(self.attacks), numbers)


class SharedCrafting:
    """The processes of all learners craft each learner's adversarial images together, step by step.

    A robust learner costs several times as much as a natural one, so with one device each the natural learner's device
    would idle. Here the learner broadcasts the weights of the attacked copy, every process attacks its shard of the
    batch, and the shards are gathered. The images equal those that the learner alone would craft, because an attack in
    eval mode treats each example independently.

    Args:
        mine: name of the learner that this process trains.
        process_group: the processes of all learners, which run in lockstep.
        owners: learner name -> rank of the process that broadcasts its weights.
        passes: learner name -> `Execution` with a packed copy; all other learners may share one.
        sources: learner name -> `Source`.
        crafters: learner name -> `Crafter`, for learners with attacks, in the same order in every process.
        num_classes: K.
    """

    def __init__(
        self,
        mine: str,
        process_group: ProcessGroup,
        owners: dict,
        passes: dict,
        sources: dict,
        crafters: dict,
        num_classes: int,
    ):
        self.mine, self.process_group, self.owners, self.num_classes = mine, process_group, owners, num_classes
        self.passes, self.sources, self.crafters = passes, sources, crafters

    def craft(self, step: int, own: Batch | None = None) -> dict:
        """Attack name -> adversarial images of the whole batch of this process's learner; empty without attacks.

        Args:
            step: the number of the step.
            own: the batch of this process's learner; None: it does not train in this step.
        """
        made: dict = {}
        for name, crafter in self.crafters.items():
            if not crafter.plan.trains(name, step):
                continue
            batch = own if own and name == self.mine else self.sources[name].batch(step)
            if crafter.objective.uses_target:
                batch = self._with_target(batch, self.owners[name])
            images = self._craft(name, batch)
            made = images if name == self.mine else made
        return made

    def _craft(self, name, batch):
        crafter, passes, owner = self.crafters[name], self.passes[name], self.owners[name]
        shard = self.process_group.shard(len(batch.y))
        wanted, images = self._wanted(crafter, owner, batch), {}
        if not wanted:
            return images
        if self.process_group.rank == owner:
            passes.refresh()
        self.process_group.broadcast_(passes.packed, owner)
        passes.received()
        for attack in wanted:
            made = crafter.craft(attack, passes, batch.of(shard), shard, self.process_group)
            images[attack] = self.process_group.whole(made, shard, self.sources[name].memory_format)
        return images

    def _with_target(self, batch, owner):
        """The batch with the target network's logits, which the learner's owner broadcasts."""
        target = batch.target
        if self.process_group.rank != owner:
            target = torch.empty(len(batch.y), self.num_classes, device=batch.x.device)
        return replace(batch, target=self.process_group.broadcast_(target, owner))

    def _wanted(self, crafter, owner, batch):
        """Names of the attacks of this step; if the choice depends on the learner's state, its owner broadcasts it.

        Then every process waits for it. A choice by random numbers alone is the same in all of them.
        """
        wanted = crafter.wanted(batch.step)
        if not crafter.objective.chooses:
            return wanted
        number = torch.tensor([list(crafter.attacks).index(name) for name in wanted], device=batch.x.device)
        self.process_group.broadcast_(number, owner)
        return tuple(list(crafter.attacks)[i] for i in number.tolist())


def share_crafting(
    learner, process_group: ProcessGroup, owners: dict, train, network: torch.nn.Module, num_classes: int
) -> SharedCrafting:
    """The `SharedCrafting` of one process.

    Args:
        learner: this process's `BaseLearner`, with a packed copy.
        process_group, owners: as in `SharedCrafting`.
        train: the training `Split`, on its device.
        network: a network of the run's architecture, which holds the weights of other learners.
        num_classes: K.
    """
    plan, device = learner.plan, learner.device
    guest = Execution(network.to(device), plan.config.compute, device, pack=True)
    passes, sources, crafters = {}, {}, {}
    for name, options in plan.config.base_learners.items():
        if not options.is_robust:
            continue
        mine = name == learner.name
        passes[name] = learner.passes if mine else guest
        sources[name] = learner.source if mine else Source(name, plan, train, device)
        crafters[name] = learner.crafter if mine else Crafter(name, plan, build_objective(options.objective))
    return SharedCrafting(learner.name, process_group, owners, passes, sources, crafters, num_classes)
