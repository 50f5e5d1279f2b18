"""The device and the number of threads of each learner, before a run starts."""

import torch

from genray.config.schema import RunConfig
from genray.core.threads import work_threads
from genray.errors import PlacementError
from genray.models.flops import architecture_flops


def device_here(wanted: str = "auto") -> str:
    """The device of this process, "cuda" or "cpu", for "auto", "cpu" or "cuda".

    Raises:
        PlacementError: cuda is wanted and torch sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PlacementError("device: expected cpu or auto, because torch sees no CUDA device here, got cuda")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def local_device(config: RunConfig) -> str:
    """The device of a local run.

    Raises:
        PlacementError: device is cuda and torch sees none.
    """
    no_gpus = all(learner.resources.num_gpus == 0 for learner in config.base_learners.values())
    return device_here("cpu" if config.device == "auto" and no_gpus else config.device)


def learner_threads(config: RunConfig, architecture: dict, name: str) -> int:
    """Number of torch threads of a learner: by the work of a batch, at most the whole part of its CPUs.

    The same in both runtimes and for any number of workers, because the number of threads may change the last bits.
    """
    most = max(1, int(config.base_learners[name].resources.num_cpus))
    return work_threads(config.training.batch_size * architecture_flops(architecture), most)


def evaluation_threads(config: RunConfig, architecture: dict) -> int:
    """Number of torch threads of an evaluation: the largest number of any learner."""
    return max(learner_threads(config, architecture, name) for name in config.base_learners)


def alone_lines(config: RunConfig) -> list[str]:
    """A line of the plan if the configuration asks for several processes and the run has one."""
    divided = config.runtime.share_attack or any(learner.workers != 1 for learner in config.base_learners.values())
    return ["workers and runtime.share_attack: this process does the work of all, with the same result"] * divided


def device_names(config: RunConfig) -> list[str]:
    """Name of the device of a local run, for the records."""
    return [torch.cuda.get_device_name() if local_device(config) == "cuda" else "cpu"]
