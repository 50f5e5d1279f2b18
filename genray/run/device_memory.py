"""What a learner takes of its device's memory: estimated before it starts, named where it is not there."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from genray.core.memory import bytes_text, free_on
from genray.data.homes import Resident
from genray.errors import LearnerError, PlacementError
from genray.learners.execution import Execution
from genray.models.activation_memory import kept_bytes
from genray.run.cost import step_passes
from genray.run.setup import RunSetup


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that a learner holds at once in the middle of an update, without what kernels need besides.

    Attributes:
        weights: the network, its gradient, averages, the optimiser's state and the copy that is attacked.
        activations: of a batch, kept for the backward pass.
        images: the training images, if they are on the device.
    """

    weights: int
    activations: int
    images: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.images

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {bytes_text(value)}" for name, value in vars(self).items())
        return f"{bytes_text(self.total)}: {parts}"


def learner_memory(setup: RunSetup, workers: dict[str, int]) -> dict[str, DeviceMemory]:
    """The estimates of learners, or of one of the workers of each.

    Args:
        setup: the prepared run.
        workers: name of a learner -> number of workers that share its batches.
    """
    train, size, an_image = setup.splits.get("train"), setup.config.training.batch_size, activation_bytes(setup)
    images = train.home.nbytes if train is not None and isinstance(train.home, Resident) else 0
    found = {}
    for name, number in workers.items():
        learner = setup.config.base_learners[name]
        # Of the batches of an update; with AWP the first pass is over before the second begins.
        activations = step_passes(learner, perturbed=False).training * math.ceil(size / number) * an_image
        found[name] = DeviceMemory(flat_copies(learner) * setup.weight_bytes, round(activations), images)
    return found


def flat_copies(learner) -> int:
    """How many tensors of the size of the weights a learner keeps."""
    moments = 1 if learner.optimizer.name == "sgd" else 2
    moments -= learner.optimizer.name == "sgd" and not learner.optimizer.momentum
    # Up to: in float32 the copy shares what no BatchNorm is folded into.
    attacked = any(attack.mode == "eval" for attack in learner.all_attacks.values())
    perturbed = 2 if learner.awp else 0  # the weights of before, and the change
    target = 3 if learner.target is not None else 0  # with its gradient and the copy that is run
    return 4 + moments + attacked + perturbed + target  # weights, gradient, average, share


def activation_bytes(setup: RunSetup) -> float:
    """Bytes an image that a training pass keeps for its backward pass, counted on the CPU."""
    network, architecture = setup.build_network().train(), setup.architecture
    execution = Execution(network, setup.config.compute.replace(compile=False), torch.device("cpu"))
    shape = architecture["in_channels"], *architecture["image_size"]
    return kept_bytes(execution.training, shape)


def memory_line(setup: RunSetup) -> str:
    """The line of the plan."""
    needs = learner_memory(setup, setup.plan.workers)
    return f"device memory  at least: {'; '.join(f'{name} {need}' for name, need in needs.items())}"


def check_device_memory(setup: RunSetup, workers: dict[str, int], device: str, share: float = 1.0):
    """Raises an error if learners that begin on a device certainly do not fit.

    Args:
        setup: the prepared run.
        workers: name of each learner that begins on the device -> number of workers that share its batches.
        device: torch device; a CPU is not checked.
        share: of the device that they may take.

    Raises:
        PlacementError: one line that names them, the estimate and the settings to lower.
    """
    place = torch.device(device)
    free = free_on(place) if place.type == "cuda" else None
    if free is None:
        return
    if share < 1:
        free = min(free, int(share * torch.cuda.get_device_properties(place).total_memory))
    needs = learner_memory(setup, workers)
    # The learners of one process share the images.
    needed = sum(need.total - need.images for need in needs.values()) + max(need.images for need in needs.values())
    if needed > free:
        raise _too_little(
            setup, needs, f"expected at most the {bytes_text(free)} that {place} has free", PlacementError
        )


def _too_little(setup: RunSetup, needs: dict[str, DeviceMemory], problem: str, kind: type) -> Exception:
    """The error of `check_device_memory` and `naming_memory`."""
    who = " and ".join(f"base_learners.{name}" for name in needs)
    estimate = "; ".join(f"{name} {need}" for name, need in needs.items())
    settings = [f"lower training.batch_size ({setup.config.training.batch_size})"]
    settings += ["set data.home: mapped"] * any(need.images for need in needs.values())
    settings += ["set compute.precision: bf16"] * (setup.config.compute.precision != "bf16")
    return kind(f"{who}: {problem}, needs at least {estimate}; {' or '.join(settings)}")


@contextmanager
def naming_memory(setup: RunSetup, name: str, workers: int = 1) -> Iterator[None]:
    """Makes torch's error of many lines, where a device has no memory left, one line about a learner.

    Raises:
        LearnerError: names the learner, the estimate and the settings to lower.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_little(
            setup, learner_memory(setup, {name: workers}), "the memory of its device is full", LearnerError
        ) from error
