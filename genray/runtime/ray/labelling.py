"""Pseudo-labels on a cluster: the images are cut up and classified by workers, where the learners would compute."""

import ray
import torch

from genray.config.unlabeled import TEACHER, teacher_config
from genray.core.flat import from_array
from genray.errors import LearnerError, one_line
from genray.evaluation import chunks
from genray.run.pseudo_labels import classify
from genray.runtime.ray.cluster import connected, node_resources
from genray.runtime.ray.gpu_shares import gpus_each, placed
from genray.runtime.ray.worker_pool import WORKER_OPTIONS, Limits, ModelWorker, Pool

BATCHES_A_TASK = 16


class LabellingWorker(ModelWorker):
    """Holds the teacher and the images."""

    def __init__(self, network, images, config):
        ModelWorker.__init__(self, network, config.device)
        self.images, self.config = images, config

    def run(self, start, stop):
        return classify(self.model, from_array(self.images[start:stop]), self.config, self.device).numpy()


def classify_on_cluster(network, images, config, address: str | None = None):
    """As `classify`, spread over a cluster; each worker holds what one of the teacher's learner holds.

    Args:
        address: as in `genray.train`.

    Raises:
        PlacementError: the cluster has room for no worker.
        LearnerError: a part failed, or lost its workers more than runtime.max_failures times.
    """
    resources, runtime = teacher_config(config).base_learners[TEACHER].resources, config.runtime
    ranges = chunks(len(images), BATCHES_A_TASK * config.evaluation.batch_size)
    with connected(address, num_cpus=resources.num_cpus) as may_grow:
        nodes = node_resources()
        (gpus,) = gpus_each([resources.num_gpus], config.device, sum(node.get("GPU", 0) for node in nodes))
        share = {"num_cpus": resources.num_cpus, "num_gpus": gpus}
        number = max(1, placed([{"CPU": resources.num_cpus, "GPU": gpus}] * len(ranges), nodes))
        remote = ray.remote(**WORKER_OPTIONS, **share)(LabellingWorker)
        shared = ray.put(network), ray.put(images.numpy()), ray.put(config)
        pool = Pool(
            "pseudo-labels",
            number,
            share,
            start=lambda: remote.remote(*shared),
            arguments=lambda part: part,
            name=lambda part: f"images {part[0]} to {part[1]}",
            limits=Limits(runtime.startup_timeout_s, runtime.stall_timeout_s, runtime.max_failures, "runtime."),
            may_grow=may_grow,
        )
        try:
            parts = dict(pool.results(ranges))
        except LearnerError as error:
            raise LearnerError(one_line(error, 1000)) from None
    return torch.cat([from_array(parts[part]) for part in ranges])
