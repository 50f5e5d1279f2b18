"""The adversarial images of an evaluation: written block by block, read back, and scored as they are stored.

Only images that fell are stored, each at the smallest radius at which its attack found it: what is not stored stands.
"""

import io
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from genray.attacks.own import lengths, most_length
from genray.errors import DataError, one_line
from genray.evaluation.robust import predictions
from genray.storage import Storage
from genray.types import ThreatModel, fraction_text

FOLDER = "images"
SCORED = 500  # images in a forward pass


@dataclass(frozen=True)
class Saved:
    """Adversarial images; arrays of one entry an image.

    Attributes:
        index: int64, position among the evaluated images.
        label, before, after: int64, the true class, and the predicted ones of the clean and of this image.
        norm, epsilon: text, of the ball.
        attack: text, the column; of AutoAttack's cascade the member, as in "aa_apgd_t".
        length: float32, norm of the perturbation.
        image: float32 (n, C, H, W), in [0, 1].
    """

    index: np.ndarray
    label: np.ndarray
    before: np.ndarray
    after: np.ndarray
    norm: np.ndarray
    epsilon: np.ndarray
    attack: np.ndarray
    length: np.ndarray
    image: np.ndarray

    def __len__(self):
        return len(self.index)


def saved_images(index, attack: str, threat: ThreatModel, x, adversarial, y, after) -> Saved:
    """The images of a block that fell.

    Args:
        index: positions of the n images.
        attack, threat: that found them.
        x, adversarial: (n, C, H, W), clean and perturbed.
        y: (n,) labels, which are the predictions of the clean images too.
        after: (n,) predictions of the perturbed ones.
    """
    label = y.cpu().numpy()
    return Saved(
        index=np.array(index, dtype=np.int64),
        label=label,
        before=label,
        after=after.cpu().numpy(),
        norm=np.full(len(index), threat.norm, dtype=object),
        epsilon=np.full(len(index), fraction_text(threat.epsilon), dtype=object),
        attack=np.full(len(index), attack, dtype=object),
        length=lengths(x, adversarial, threat.norm).float().cpu().numpy(),
        image=np.ascontiguousarray(adversarial.detach().float().cpu().numpy()),
    )


def to_parquet(saved: Saved) -> bytes:
    """A Parquet file of a column a field; `image` is of Arrow's type for tensors of one shape, (C, H, W)."""
    columns = {field.name: getattr(saved, field.name) for field in fields(Saved)}
    kind = pa.fixed_shape_tensor(pa.float32(), saved.image.shape[1:])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(saved.image.reshape(-1)), kind.storage_type.list_size)
    columns["image"] = pa.ExtensionArray.from_storage(kind, flat)
    for name in ("norm", "epsilon", "attack"):
        columns[name] = pa.array(columns[name], pa.string())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def of_parquet(content: bytes) -> Saved:
    """Reads what `to_parquet` made.

    Raises:
        ValueError, KeyError: it is something else (`pyarrow.ArrowInvalid` is a `ValueError`).
    """
    table = pq.read_table(io.BytesIO(content))
    kind = table.schema.field("image").type
    if not isinstance(kind, pa.FixedShapeTensorType) or len(kind.shape) != 3:
        raise ValueError(f"image: expected images of one shape (C, H, W), got {kind}")
    arrays = {field.name: table[field.name].to_numpy().copy() for field in fields(Saved) if field.name != "image"}
    flat = table["image"].combine_chunks()
    flat = flat.storage if isinstance(flat, pa.ExtensionArray) else pa.array([], kind.storage_type)
    return Saved(**arrays, image=flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, *kind.shape).copy())


def load_images(path) -> dict[str, np.ndarray]:
    """As `genray.load_images`, which describes the argument and the arrays."""
    place = Storage(path)
    folder = place / FOLDER if place.exists("request.json") or place.is_folder(FOLDER) else place
    parts = [_read(folder / name) for name in folder.names() if name.endswith(".parquet")]
    if not parts:
        raise DataError(f"{place}: expected the folder of an evaluation with --save-images, there are no images")
    parts = [part for part in parts if len(part)] or parts[:1]
    return {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Saved)}


def _read(place: Storage) -> Saved:
    try:
        return of_parquet(place.read())
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{place}: expected images that genray wrote: {one_line(error, 200)}") from None


def scored_again(saved: Saved, threat: ThreatModel, model, pixels, device) -> dict[str, int]:
    """Scores images as they were read back.

    Args:
        saved: of one attack and ball.
        threat: the ball.
        model: as in `correct_flags`, on `device`.
        pixels: (n, C, H, W) float32, the clean images.

    Returns:
        Numbers of images: "stored"; "wrong", classified wrongly; "wrong_in_8_bits", classified wrongly after rounding
        to multiples of 1 / 255; "in_8_bits", of those the ones that are still in the ball.
    """
    counts = {"stored": len(saved), "wrong": 0, "wrong_in_8_bits": 0, "in_8_bits": 0}
    if not len(saved):
        return counts
    most = most_length(pixels[:1], threat.norm, threat.radius) * threat.radius
    for start in range(0, len(saved), SCORED):
        part = slice(start, start + SCORED)
        image, label = torch.from_numpy(saved.image[part]), torch.from_numpy(saved.label[part])
        rounded = (image * 255).round() / 255
        wrong, also = (predictions(model, x.to(device)) != label for x in (image, rounded))
        inside = lengths(pixels[part], rounded, threat.norm) <= most
        for name, flags in (("wrong", wrong), ("wrong_in_8_bits", also), ("in_8_bits", also & inside)):
            counts[name] += int(flags.sum())
    return counts
