"""Measures on the device at hand how long passes and steps take, and how much memory steps need.

The images are random ones of the run's shape, so that a plan needs no data.
"""

import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch

from genray.core.threads import threads_kept
from genray.data.splits import Split
from genray.learners.base_learner import BaseLearner
from genray.learners.execution import Execution
from genray.models.flops import architecture_flops
from genray.run.cost import Passes
from genray.run.devices import evaluation_threads, learner_threads
from genray.run.plan import make_plan
from genray.run.setup import RunSetup

STEPS = 3
PASS_FLOPS = 1e10  # of the forward pass of a measured batch, at most
ROUNDS, ENOUGH_S = 7, 1.0  # limits of a measurement: number of passes, seconds in all


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of one image's pass: forward and backward to the weights, and to the image."""

    training: float
    attack: float

    def of(self, passes: Passes) -> float:
        return passes.training * self.training + passes.attack * self.attack + passes.forward * self.training / 3


def pass_seconds(setup: RunSetup, device: str = "cpu") -> PassSeconds:
    """Measures passes of a batch, or of fewer images if those are enough work."""
    config, architecture = setup.config, setup.architecture
    number = int(max(2, min(config.training.batch_size, PASS_FLOPS / architecture_flops(architecture))))
    with threads_kept():
        torch.set_num_threads(evaluation_threads(config, architecture))
        network = setup.build_network().to(device).train()
        execution = Execution(network, config.compute, torch.device(device))
        x = torch.rand(number, architecture["in_channels"], *architecture["image_size"], device=device)
        training = _quickest(execution.training, x)
        attack = _quickest(execution.attacked("eval"), x.requires_grad_())
    return PassSeconds(training / number, attack / number)


def _quickest(model, x):
    found = []
    while len(found) < 2 or (len(found) < ROUNDS and sum(found) < ENOUGH_S):
        began = time.perf_counter()
        model(x).logsumexp(1).sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)  # the least disturbed by other processes


def with_random_images(setup: RunSetup) -> RunSetup:
    """A run of a few steps on random images, with all steps of every attack and without AWP's warm-up."""
    config, shape, number = setup.config, setup.splits["train"].shape, len(setup.class_names)
    learners = {name: _whole_steps(learner) for name, learner in config.base_learners.items()}
    images = (STEPS + 1) * config.training.batch_size
    config = config.replace(base_learners=learners, data=config.data.replace(extra=None))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, *shape), dtype=torch.uint8, generator=generator)
    train = Split(pixels, torch.arange(images) % number)
    return replace(setup, plan=make_plan(config, images), splits={"train": train}, num_extra=0)


def _whole_steps(learner):
    learner = learner.replace(starts_from=None, from_epoch=0, until_epoch=None)
    if learner.attack and learner.attack.tau is not None:
        learner = learner.replace(attack=learner.attack.replace(tau=None, step_noise=0.0))
    return learner.replace(awp=learner.awp.replace(warmup_epochs=0)) if learner.awp else learner


@dataclass(frozen=True)
class StepProbe:
    """Attributes:
    seconds: learner name -> seconds of a step.
    peak_bytes: peak memory of the device, or of this process on a CPU, with all learners.
    """

    seconds: dict[str, float]
    peak_bytes: int


def probe_steps(setup: RunSetup, device: str) -> StepProbe:
    """The median of three real steps of each learner after a first one, which takes longer.

    Args:
        setup: a result of `with_random_images`.
        device: where to compute.
    """
    found, learners = {}, []
    with threads_kept():
        for name in setup.config.base_learners:
            threads = learner_threads(setup.config, setup.architecture, name)
            learner = BaseLearner(
                name,
                setup.plan,
                setup.build_network(),
                setup.splits["train"],
                device,
                threads,
                target=setup.target_network(name),
            )
            seconds = [learner.run_window(step, step + 1).seconds for step in range(STEPS + 1)]
            found[name] = statistics.median(seconds[1:])
            learners.append(learner)
    if device != "cpu":
        return StepProbe(found, torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return StepProbe(found, unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
