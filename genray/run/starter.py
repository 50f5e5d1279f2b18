"""A first configuration for a folder of images, with a comment beside each value that depends on them."""

import json
import re
from pathlib import PurePath

from genray.config.presets import schema_line
from genray.data.datasets import load_image_data
from genray.data.splits import most_balanced
from genray.errors import DataError, one_line
from genray.models import MIN_IMAGE_SIDE
from genray.storage import Storage

LARGEST_SIDE = 64  # adversarial training costs a dozen passes an image: larger ones are resized unless told otherwise


def starter_config(folder: str, file: str) -> str:
    """YAML text that trains Generalist on a folder of images.

    The number and the size of the images decide network, batch size, epsilon and augmentation. Only the first image of
    each part is decoded.

    Args:
        folder: with train/<class>/ and test/<class>/ (or val/): path or URI.
        file: name of the file, for the commands in its first lines.

    Raises:
        DataError: the folder has no such images, or too few.
    """
    data = load_image_data("image_folder", path=folder, decode=())
    train, (channels, *first) = len(data.train), data.train.shape
    scale = min(1, LARGEST_SIDE / max(first))
    height, width = (max(MIN_IMAGE_SIDE, round(side * scale)) for side in first)
    if most_balanced(data.train.labels) < 1:
        raise DataError(
            f"{folder}: expected at least 2 training images of each class, of which 1 is held out to choose the best "
            "epoch by, a class has 1"
        )
    resized = "; twice the side takes four times as long" if scale < 1 else ""
    classes = len(data.class_names)
    validation = max(1, min(1000, train // 10, most_balanced(data.train.labels)))
    batch_size = next(size for size in (128, 64, 32, 16, 8) if train >= 20 * size or size == 8)
    small, grey = max(height, width) <= 28, channels == 1
    model = "{name: small_cnn, batch_norm: true}" if small else "{name: resnet18}"
    epsilon, step_size = ("0.2", "0.05") if small and grey else ("8/255", "2/255")
    usual = "small grey images (MNIST 0.3)" if small and grey else "32 to 64 pixels (at 224: 4/255)"
    augmentation = f"{{crop_padding: {max(1, min(height, width) // 8)}, flip: {str(not grey).lower()}}}"
    place = Storage(folder)
    learner = f"""\
    optimizer: {{name: sgd, momentum: 0.9, weight_decay: 5e-4}}
    lr: [[0, 0.1], [1/3, 0.1], [2/3, 0.01], [1, 0.001]]   # over the run: from 0, its beginning, to 1, its end
    augmentation: {augmentation}
    averaging: {{decay: 0.99}}"""
    return f"""\
{schema_line("run")}
# Generalist on {one_line(place)}: {train} training and {len(data.test)} test images of {classes} classes.
#
#   genray train {one_line(file)} --dry-run     the plan: steps, memory, where each learner goes
#   genray train {one_line(file)}               the run, into runs/{_name(folder)}
name: {_name(folder)}
seed: 0

data:
  source: image_folder                  # {one_line(", ".join(data.class_names), 80)}
  path: {json.dumps(place.absolute, ensure_ascii=False)}
  image_size: [{height}, {width}]                # the first image has {first[0]} x {first[1]} pixels{resized}
  validation_examples: {validation}             # held out, to choose the best epoch by

model: {model}    # {"for small images" if small else "on a CPU add width: 8, an eighth of its channels"}

training:
  epochs: {30 if small else 100}
  batch_size: {batch_size}                       # {train // batch_size} steps an epoch, about

base_learners:
  natural:                              # learns from the images as they are
    objective: natural
{learner}
  linf:                                 # learns from images that an attack has changed, each pixel by at most epsilon
    objective: adversarial
    attack: {{norm: linf, epsilon: {epsilon}, step_size: {step_size}, num_steps: 10}}   # usual for {usual}
{learner}

global_learner:
  gamma: [[0, 1], [2/3, 1], [1, 0.5]]   # share of the robust learner; a lower end: more accurate, less robust
  decay: 0.99
  sync_every: 5                         # epochs between two redistributions of the mixture to the learners
  sync_unit: epoch_end

evaluation:
  attack: {{num_steps: 20}}               # PGD-20 after each epoch; genray evaluate runs stronger attacks
"""


def _name(folder: str) -> str:
    """A run's name, made from the folder's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", PurePath(str(folder).rstrip("/")).name).strip("_-")[:100] or "images"
