"""An evaluation from its arguments to its record: in this process or on Ray's workers, with or without a folder."""

import copy
from collections import Counter
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib import metadata

import torch

from genray.attacks.transfer import TransferAttack, is_transfer
from genray.config.arguments import check_again
from genray.console import say
from genray.core.user_code import allow_typed, give, named, only_here
from genray.data.fingerprint import fingerprint as data_fingerprint
from genray.errors import ConfigError, DataError, StorageError
from genray.evaluation import inputs
from genray.evaluation.checks import NO_GRADIENT, look_at_images, look_at_model, look_at_origin
from genray.evaluation.contract import as_network, device_of
from genray.evaluation.engines import ENGINES, copies_kept
from genray.evaluation.estimate import TimeLeft
from genray.evaluation.job import as_pixels, block_size_on, run_here
from genray.evaluation.record import build_record, flags_parquet, join, protocol, record_table
from genray.evaluation.saved_images import scored_again
from genray.evaluation.task_queue import TaskQueue
from genray.evaluation.transfer import transfer_networks
from genray.interop.origin import origin_of
from genray.recording.evaluation_folder import EvaluationFolder, fingerprint, protocol_in
from genray.recording.progress import Progress, repeated
from genray.recording.run_folder import versions


@only_here()
def run_evaluation(model, x, y, asked: inputs.EvaluationArguments, together: int = 1, on_workers=None) -> dict:
    """As `genray.evaluate`, which describes the arguments.

    Args:
        together: number of blocks computed at a time, for the remaining time.
        on_workers: `run_on_workers` with its cluster; None computes in this process.
    """
    resume, output = asked.resume, asked.output
    check_again(resume, asked.overwrite)
    if asked.save_images and output is None:
        raise ConfigError("save_images: expected output, the folder that they go to, got none")
    origin = origin_of(model)
    allow_typed(asked.attacks)
    asked = replace(asked, attacks=tuple(map(named, inputs.names(asked.attacks))))
    request = asked.request(origin.radii())
    threats = request.threats
    images, labels = inputs.check_images(x, y)
    model, logits, findings = as_network(model, as_pixels(images[:32]))
    classes = inputs.check_classes(labels, logits, asked.num_classes)
    networks, of_files = transfer_networks(request.attacks, asked.transfer, images, labels, classes)
    for column, of_column in networks.items():
        give(partial(TransferAttack, of_column), column)
    request.own()
    before = protocol_in(output) if output and resume else {}
    block_size = asked.block_size or before.get("block_size")
    if block_size is None:  # workers are on other devices
        device = torch.device("cpu") if on_workers else device_of(model)
        block_size = block_size_on(device, model, images.shape[1:])
    engine = asked.engine or (before["engine"] if before.get("engine") in ENGINES else None)
    request = replace(request, block_size=block_size, engine=engine)
    described = {"source": "arrays", "split": "given", **(asked.data or {}), "examples": len(labels)}
    described |= {"fingerprint": data_fingerprint(images, labels)}
    stated = protocol(request, described, classes, _versions())
    identity = {
        "protocol": {key: value for key, value in stated.items() if key not in ("versions", "engines")},
        "model": fingerprint(model.state_dict() | dict(model.named_buffers())),
        "images": fingerprint({"x": images, "y": labels}),
        "predictions": fingerprint({"first images": logits.argmax(1)}),  # networks of equal weights may differ
    }
    if networks:
        identity["transfer"] = {
            column: {name: fingerprint(network.state_dict()) for name, network in of_column.items()}
            for column, of_column in networks.items()
        }
    folder = EvaluationFolder(output, identity, resume, asked.overwrite, asked.save_images) if output else None
    findings = look_at_origin(origin, threats, images.shape[1:]) + findings + of_files
    for finding in findings:
        Progress().say(f"! {finding}")  # before the attacks, which may take hours
    findings += _check_model(model, images, labels, request)
    left = TimeLeft(request, len(labels), classes, together=together)
    stored = (lambda tasks: left.stored(folder.finished(tasks))) if folder else (lambda tasks: {})
    queue = TaskQueue(request, len(labels), stored)
    try:
        with closing(run_tasks(queue, model, images, labels, classes, on_workers)) as found:
            for task, result in _shown(found, left):
                if folder:
                    folder.write(task, result)
                queue.finish(task, replace(result, images=None))
    except BaseException:
        if folder:
            folder.save()
        raise
    results = {task: queue.results[task] for task in queue.known()}  # in an order that does not depend on the workers
    flags = join(queue)
    record = build_record(request, flags, results, labels.numpy(), findings, stated)
    if folder:
        try:
            if asked.save_images:
                _score_images(record, folder, queue, model, images)
            folder.finish(record, flags_parquet(flags, labels.numpy()))
        except StorageError:
            say(record_table(record))  # the figures are not lost with the files
            raise
    return record


def _score_images(record, folder, queue, model, images):
    """Scores the stored images again, and adds to each ball of the record the numbers of each attack."""
    balls, device = queue.request.balls(), device_of(model)
    for task, saved in folder.images([task for task in queue.known() if task.ball != "none"]):
        part = record["norms"][task.ball]
        counts = part.setdefault("images", {}).setdefault(task.attack, Counter())
        counts.update(scored_again(saved, balls[task.ball], model, as_pixels(images[saved.index]), device))
    for part in record["norms"].values():
        part["images"] = {attack: dict(counts) for attack, counts in part.get("images", {}).items()}
        part["findings"] += look_at_images(part["images"])


def _shown(found, left):
    """Yields each (task, result); shows the finished share of the time and the time left."""
    progress = Progress()
    progress.phase("evaluating", 100, unit="%")

    def show():
        progress.steps(100 * left.share(), left.left())

    try:
        with repeated(show, seconds=1.0):
            for task, result in found:
                left.finished(task, result)
                yield task, result
                show()
        progress.steps(100, 0.0)
    finally:
        progress.close()


def _check_model(model, images, labels, request):
    """Findings about the model; refuses attacks that cannot run on it."""
    device = device_of(model)
    findings = look_at_model(model, as_pixels(images[:32]).to(device), labels[:32].to(device))
    blind = {name for threat in request.threats for name in request.columns(threat.norm)}
    blind = {name for name in blind if name != "square" and not is_transfer(name)}
    if NO_GRADIENT in findings and blind:
        raise DataError(f"model: {NO_GRADIENT}; of the attacks only square and transfer can run")
    return findings


def run_tasks(queue, model, images, labels, classes, on_workers):
    """Yields (task, result) of all tasks, in this process or on workers."""
    first, device = queue.take(), device_of(model)
    if not first:
        return
    if on_workers is None:
        with copies_kept(model):
            yield from run_here(queue, model, images, labels, classes, device, first)
        return
    # A copy, because the caller's model must stay on its device.
    model = model if device.type == "cpu" else copy.deepcopy(model).cpu()
    yield from on_workers(first, queue, model, images, labels, classes)


def _versions():
    found = versions([])
    del found["devices"]  # the record does not depend on the device
    return found | {"pyautoattack": metadata.version("pyautoattack")}
