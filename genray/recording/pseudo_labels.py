"""The stage before training that makes pseudo-labels; they stay in the run folder, so that a resume has them."""

import io
from collections.abc import Callable

import numpy as np
import torch

from genray.config.unlabeled import TEACHER, teacher_config
from genray.core.seal import check_seal, seal
from genray.errors import CheckpointError, one_line
from genray.interop.checkpoint_layouts import load_into
from genray.recording.run_folder import RunFolder
from genray.recording.writer import Writer
from genray.run.pseudo_labels import (
    awaits_labels,
    load_teacher,
    unlabeled_images,
    unlabeled_lines,
    unlabeled_record,
    with_labels,
)
from genray.run.setup import RunSetup

FILE = "pseudo_labels.npy"


def pseudo_labelled(setup: RunSetup, folder: RunFolder, progress, train_teacher: Callable, classify: Callable):
    """The setup with pseudo-labels where it needs them.

    They are read from the folder of a run that has begun; a new run makes them. The teacher is an ordinary run in
    `<run>/teacher/`, unless the configuration names a model; its last theta_g labels the images.

    Args:
        setup: the prepared run.
        folder: the run's.
        progress: a `Progress`.
        train_teacher: (configuration) -> runs it to its end in `<run>/teacher/`, going on where it was left.
        classify: (network, images (M, C, H, W) uint8, configuration) -> (M,) int64.

    Raises:
        CheckpointError: the teacher that is named, or the stored pseudo-labels, cannot be used.
        GenrayError: the teacher's run failed.
    """
    if not awaits_labels(setup):
        return setup
    if not folder.replaces and folder.storage.exists("config.yaml") and folder.storage.exists(FILE):
        return with_labels(setup, _read(setup, folder))
    if setup.config.data.unlabeled.teacher.path:
        network = load_teacher(setup)
    else:
        folder.remove_replaced()
        progress.say(f"training the teacher in {folder.storage.path(TEACHER)}")
        train_teacher(teacher_config(setup.config))
        network = _trained_teacher(setup, folder)
    labels = classify(network, unlabeled_images(setup), setup.config)
    folder.remove_replaced()
    buffer = io.BytesIO()
    np.save(buffer, labels.numpy(), allow_pickle=False)
    content, writer = seal(buffer), Writer(progress.say)
    writer.put(FILE, lambda: folder.storage.write(FILE, content))
    writer.flush(setup.config.runtime.storage_timeout_s)
    setup = with_labels(setup, labels)
    progress.say("; ".join(unlabeled_lines(unlabeled_record(setup))))
    return setup


def _trained_teacher(setup, folder):
    content = io.BytesIO(folder.storage.read(f"{TEACHER}/model_last.pt"))
    network = setup.build_network()
    load_into(network, torch.load(content, map_location="cpu", weights_only=True)["state_dict"])
    return network


def _read(setup, folder):
    where, count = folder.storage.path(FILE), int((~setup.splits["train"].labelled).sum())
    try:
        content = folder.storage.read(FILE)
        check_seal(content)
        labels = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CheckpointError(f"{where}: cannot be read: {one_line(error)}") from None
    classes = len(setup.class_names)
    if labels.shape != (count,) or labels.dtype != np.int64 or not ((labels >= 0) & (labels < classes)).all():
        raise CheckpointError(f"{where}: expected {count} class numbers from 0 to {classes - 1}, came others")
    return torch.from_numpy(labels)
