"""Writes a model as a file for other programs."""

import io
import json

import torch

from genray import __version__
from genray.errors import RunFolderError
from genray.interop.checkpoint_file import read_file
from genray.interop.checkpoint_layouts import read_metadata
from genray.interop.load import model_file, model_of
from genray.interop.model_card import CARD, model_card
from genray.interop.onnx_file import onnx_bytes
from genray.interop.published_layouts import published_state
from genray.interop.safetensors_file import SAFETENSORS, safetensors_bytes
from genray.storage import HUB, Storage

FILE_NAMES = {"trades": "model_trades.pt", "robustbench": "model_robustbench.pt", "onnx": "model.onnx"}
FILE_NAMES |= {"safetensors": SAFETENSORS}


def export_model(source, layout, output=None, overwrite=False) -> str:
    """As `genray.export`, which describes and checks the arguments."""
    place = model_file(Storage(source))
    target = place.parent / FILE_NAMES[layout] if output is None else Storage(output)
    if str(output).endswith("/"):
        raise RunFolderError(f"{target}: expected the name of a file, got a folder")
    target.check_new(overwrite)
    file = read_file(place)
    model, metadata = model_of(file), read_metadata(file)
    card = None
    if layout == "safetensors":
        (target.parent / CARD).check_new(overwrite)
        card = model_card(place, metadata, target.parent.uri if target.uri.startswith(HUB) else target.name)
    target.parent.write(target.name, _content(model, metadata, layout))
    if card is not None:
        target.parent.write(CARD, card.encode())
    return target.uri


def _content(model, metadata, layout):
    architecture = metadata["architecture"]
    if layout == "safetensors":
        return safetensors_bytes(model.state_dict(), metadata)
    if layout == "onnx":
        shape = (architecture["in_channels"], *architecture["image_size"])
        notes = {"genray": __version__, "run": str(metadata.get("run", ""))}
        notes |= {"images": "float32 in [0, 1]; normalised inside"}
        told = ("threat_models", "class_names", "data")
        notes |= {name: json.dumps(metadata[name]) for name in told if name in metadata}
        return onnx_bytes(model, shape, notes)
    stream = io.BytesIO()
    torch.save(published_state(model, metadata, layout), stream)
    return stream.getvalue()
