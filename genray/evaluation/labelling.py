"""Labels images by a model and writes them as a file of training images."""

import copy
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from genray.data.datasets import load_image_data
from genray.data.extra import open_images
from genray.data.reading import Reading
from genray.data.request import DataRequest
from genray.data.splits import check_count
from genray.errors import ConfigError, DataError, RunFolderError
from genray.evaluation.contract import as_network, device_of
from genray.evaluation.job import as_pixels
from genray.evaluation.robust import predicted
from genray.evaluation.sources import config_of, data_of
from genray.interop.load import load_model
from genray.interop.origin import origin_of
from genray.recording.progress import Progress
from genray.run.devices import device_here
from genray.storage import Storage

SOURCES = ("npz", "parquet", "image_folder", "svhn_extra")


def label_images(
    model, output, images, *, image_column, resize, examples, batch_size, device, on_workers, overwrite
) -> str:
    """As `genray.label`, which describes the arguments.

    Args:
        on_workers: (model, images, batch_size) -> (index of the first image, labels) of blocks; None: in this process.
    """
    target = Storage(output)
    if not target.name.endswith((".npz", ".parquet")):
        raise RunFolderError(f"{target}: expected the name of a file that ends in .npz or .parquet")
    target.check_new(overwrite)
    config = None
    if isinstance(model, (str, os.PathLike)):
        config, model = config_of(Storage(model)), load_model(model)
    origin = origin_of(model)
    shape = origin.image_shape
    if resize and not shape:
        raise ConfigError("resize: expected a model of genray, which says the size of its images")
    size = shape[1:] if resize else None
    given = _left_out(config) if images is None else images
    if image_column is not None and not (isinstance(given, str) and given.startswith("parquet:")):
        what = given.partition(":")[0] if isinstance(given, str) else "these images"
        raise ConfigError(f"image_column: has no effect with {what}; it is for parquet")
    found = _read(given, image_column, size, examples) if isinstance(given, str) else _checked(given, examples)
    if shape not in ((), tuple(found.shape[1:])):
        raise DataError(f"images: expected the shape of the model's, {shape} (C, H, W), came {tuple(found.shape[1:])}")
    network, logits, _ = as_network(model, as_pixels(found[:32]))
    labels = _labels(network, found, batch_size, device, on_workers)
    names = origin.class_names or tuple(map(str, range(logits.shape[1])))
    content = _npz(found, labels) if target.name.endswith(".npz") else _parquet(found, labels, names)
    target.parent.write(target.name, content.getbuffer())
    return target.uri


def _left_out(config):
    """The training images that a run left out."""
    first = config and config.data.train_examples
    if not first:
        raise ConfigError(
            "--data: missing, expected SOURCE:PATH, because the model is of no run that left out training images "
            "(data.train_examples)"
        )
    return load_image_data(**data_of(config), decode=("train",), progress=Progress()).train.take(slice(first, None))[0]


def _read(text, image_column, size, examples):
    source, _, path = text.partition(":")
    if source not in SOURCES:
        raise ConfigError(f"--data: expected one of {', '.join(SOURCES)}, with :PATH, got {text!r}")
    reading = Reading(Progress())
    request = DataRequest(source, path or None, image_column, None, True, size, examples, reading=reading)
    try:
        part, _ = open_images(request)
        reading.begin("unlabelled", len(part.labels))
        found, _ = part.read(None)
        reading.end()
    except DataError as error:  # which names the fields of a run
        raise DataError(str(error).replace("data.path", "--data").replace("data.train_examples", "examples")) from None
    reading.report()
    return found


def _checked(images, examples):
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
        raise DataError(f"images: expected (N, C, H, W) uint8, at least 1, got {tuple(images.shape)} {images.dtype}")
    if examples is not None:
        check_count(examples, len(images), "examples")
    return images[:examples].cpu()


def _labels(network, images, batch_size, device, on_workers):
    """(N,) int64 labels; shows its progress."""
    if on_workers is None:
        place = device_here(device)
        network = network if device_of(network).type == place else copy.deepcopy(network).to(place)
        found = predicted(network, images, batch_size, place)
    else:
        network = network if device_of(network).type == "cpu" else copy.deepcopy(network).cpu()
        found = on_workers(network, images, batch_size)
    progress, labels, done = Progress(), torch.empty(len(images), dtype=torch.int64), 0
    progress.phase("labelling", len(images), unit="images")
    try:
        for start, some in found:
            labels[start : start + len(some)] = some
            done += len(some)
            progress.steps(done)
    finally:
        progress.close()
    return labels


def _npz(images, labels):
    stream = io.BytesIO()
    pixels, pseudo = images.permute(0, 2, 3, 1).numpy(), np.ones(len(labels), dtype=bool)
    np.savez(stream, image=pixels, label=labels.numpy(), pseudo=pseudo)
    return stream


def _parquet(images, labels, names):
    """A Parquet file in the layout of the Hugging Face hub, with the names of the classes."""
    stream = io.BytesIO()
    rows = [{"bytes": _png(image), "path": ""} for image in images.permute(0, 2, 3, 1).numpy()]
    table = pa.table({"image": rows, "label": labels.numpy(), "pseudo": np.ones(len(rows), dtype=bool)})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    features["pseudo"] = {"dtype": "bool", "_type": "Value"}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), stream)
    return stream


def _png(image):
    stream = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(stream, "PNG")
    return stream.getvalue()
