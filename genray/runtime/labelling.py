"""Pseudo-labels on a cluster: the images are cut up and classified by tasks, where the learners would compute."""

import ray
import torch

from genray.config.unlabeled import TEACHER, teacher_config
from genray.core.flat import from_array
from genray.errors import LearnerError
from genray.evaluation import chunks
from genray.learners.pseudo_labels import classify
from genray.runtime.actors import actor_device
from genray.runtime.cluster import connected
from genray.runtime.shares import gpus_each

BATCHES_A_TASK = 16


def classify_on_cluster(network, images, config, address: str | None = None):
    """As `classify`, spread over a cluster; each task takes what the teacher's learner takes.

    Args:
        address: as in `genray.train`.

    Raises:
        LearnerError: a task failed, or none was done within runtime.stall_timeout_s.
    """
    with connected(address):
        resources = teacher_config(config).base_learners[TEACHER].resources
        there = ray.cluster_resources().get("GPU", 0)
        (num_gpus,) = gpus_each([resources.num_gpus], config.device, there)
        task = ray.remote(num_cpus=resources.num_cpus, num_gpus=num_gpus)(_classify)
        shared = ray.put(network), ray.put(images.numpy()), ray.put(config)
        ranges = chunks(len(images), BATCHES_A_TASK * config.evaluation.batch_size)
        return _joined([task.remote(*shared, *some) for some in ranges], config.runtime.stall_timeout_s)


def _classify(network, images, config, start, stop):
    return classify(network, from_array(images[start:stop]), config, actor_device(config.device)).numpy()


def _joined(references, timeout_s):
    waiting = list(references)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=timeout_s)
        if not done:
            raise LearnerError(f"pseudo-labels: no task was done within runtime.stall_timeout_s ({timeout_s:g} s)")
    try:
        parts = ray.get(references)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        reason = " ".join(str(cause).split())[:200]
        raise LearnerError(f"pseudo-labels: {type(cause).__name__}: {reason}") from None
    return torch.cat([from_array(part) for part in parts])
