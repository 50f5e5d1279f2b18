"""Pseudo-labels (methods C7): a teacher's classes for training images that have none, and what is said of them."""

import dataclasses

import torch

from genray.attacks import temporary_mode
from genray.config.schema import RunConfig
from genray.config.unlabeled import TEACHER, teacher_config
from genray.core.threads import threads_kept, work_threads
from genray.data.splits import UNLABELED, Split
from genray.errors import CheckpointError, RunFolderError
from genray.evaluation import Accuracy, chunks
from genray.evaluation.robust import full_precision
from genray.interop.checkpoint_file import read_file
from genray.interop.checkpoint_layouts import load_into, read_metadata
from genray.interop.load import model_file, model_of
from genray.models.flops import forward_flops
from genray.run.devices import whole_cpus
from genray.run.setup import RunSetup
from genray.storage import Storage, without_secrets


def awaits_labels(setup: RunSetup) -> bool:
    """Whether some training images have neither a label nor a pseudo-label."""
    train = setup.splits["train"]
    return train.labelled is not None and bool((train.labels == UNLABELED).any())


def unlabeled_images(setup: RunSetup) -> torch.Tensor:
    """(M, C, H, W) uint8, the training images without a label of their own, in order."""
    train = setup.splits["train"]
    return train.images[~train.labelled]


def with_labels(setup: RunSetup, labels: torch.Tensor) -> RunSetup:
    """The setup with pseudo-labels, (M,) int64, for its unlabelled images."""
    train = setup.splits["train"]
    complete = train.labels.masked_scatter(~train.labelled, labels)
    splits = setup.splits | {"train": Split(train.images, complete, train.labelled)}
    return dataclasses.replace(setup, splits=splits)


def load_teacher(setup: RunSetup) -> torch.nn.Module:
    """The model that `data.unlabeled.teacher.path` names.

    A model of genray says what it is, and may be of any architecture; any other file has to fit the run's own.

    Raises:
        CheckpointError: absent, unreadable, or not for the run's images and classes.
    """
    field = "data.unlabeled.teacher.path"
    try:
        file = read_file(model_file(Storage(setup.config.data.unlabeled.teacher.path)))
        stated = read_metadata(file).get("architecture")
        if stated is None:
            network = setup.build_network()
            load_into(network, file)
            return network
        network = model_of(file)
    except (CheckpointError, RunFolderError) as error:
        raise CheckpointError(f"{field}: {error}") from None
    wanted, found = _shape(setup.architecture), _shape(stated)
    if wanted != found:
        raise CheckpointError(f"{field}: expected a model of {wanted}, came one of {found}: {file.where}")
    return network


def _shape(architecture):
    sides = "x".join(str(side) for side in (architecture["in_channels"], *architecture["image_size"]))
    return f"{architecture['num_classes']} classes and {sides} images"


@torch.no_grad()
def classify(network, images: torch.Tensor, config: RunConfig, device: str) -> torch.Tensor:
    """The class of the largest logit of each image.

    Args:
        network: images (N, C, H, W) in [0, 1] -> logits (N, K); used in eval mode, in float32.
        images: (M, C, H, W) uint8.
        config: the run's; says how many images at once and how many threads.
        device: where to compute.

    Returns:
        (M,) int64 on the CPU.
    """
    network, size = network.to(device), config.evaluation.batch_size
    with threads_kept(), temporary_mode(network, training=False), full_precision():
        flops = size * forward_flops(network, images[:1].to(device).float())
        torch.set_num_threads(work_threads(flops, whole_cpus(teacher_config(config), TEACHER)))
        parts = [
            network(images[start:stop].to(device).float().div_(255)).argmax(1).cpu()
            for start, stop in chunks(len(images), size)
        ]
    return torch.cat(parts)


# --- in words -----------------------------------------------------------------------------------------------------


def unlabeled_record(setup: RunSetup) -> dict | None:
    """What the records of a run say about its unlabelled images; None where there are none.

    `right` is the share of right pseudo-labels, where they are there and the true labels are known.
    """
    options, train = setup.config.data.unlabeled, setup.splits["train"]
    if options is None:
        return None
    pseudo = 0 if train.labelled is None else int((~train.labelled).sum())
    right = None
    if setup.dropped_labels is not None and not awaits_labels(setup):
        right = Accuracy.of((train.labels[~train.labelled] == setup.dropped_labels).numpy()).record()
    return {
        "source": _source(options),
        "examples": pseudo,
        "labelled_examples": len(train) - pseudo,
        "batch_share": options.batch_share,
        "teacher": _teacher(setup.config),
        "right": right,
    }


def unlabeled_lines(record: dict) -> list[str]:
    """The same as lines of text."""
    if record["batch_share"] == 0:
        return [f"{record['labelled_examples']} labelled training images alone", f"left out: {record['source']}"]
    share, right = record["batch_share"], record["right"]
    return [
        f"{record['examples']} pseudo-labelled beside {record['labelled_examples']} labelled training images"
        + (f", {100 * share:g} % of each batch" if share else ""),
        f"unlabelled: {record['source']}",
        f"teacher: {record['teacher']}" + (f"; {100 * right['value']:.1f} % of its labels are right" if right else ""),
    ]


def _source(options):
    if options.source == "fraction":
        how = "class-balanced" if options.class_balanced else "of all alike"
        return f"training images whose labels were dropped (fraction {options.fraction:g}, {how}, seed {options.seed})"
    where = f" {options.path}" if options.path else ""
    first = f", the first {options.examples}" if options.examples else ""
    return f"{options.source}{where}{first}"


def _teacher(config):
    unlabeled = config.data.unlabeled
    if not unlabeled.is_used:
        return None
    if unlabeled.teacher.path:
        return without_secrets(unlabeled.teacher.path)
    teacher = teacher_config(config)
    lr = teacher.base_learners[TEACHER].lr.values
    rates = f"lr {float(lr[0]):g} to {float(lr[-1]):g}"
    return f"natural training on the labelled images, {teacher.training.epochs} epochs, {rates}"
