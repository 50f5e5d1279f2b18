"""Write a model for other programs: `python -m genray.export RUN_OR_MODEL --layout onnx`, or `genray.export(...)`."""

import io
import json
from typing import Literal

from genray.cli.parser import Parser
from genray.config.arguments import Place, checked
from genray.errors import RunFolderError

LAYOUTS = {"trades": "model_trades.pt", "robustbench": "model_robustbench.pt", "onnx": "model.onnx"}


@checked
def export(
    source: Place,
    layout: Literal[tuple(LAYOUTS)],
    output: Place | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """Writes the model of a run as a file that other programs read.

    The file gives the logits of `genray.load_model(source)` for images in [0, 1], normalisation included.

    Args:
        source: a run folder, or a model file written by genray: path or URI.
        layout: "onnx", or "trades" or "robustbench": a plain state dict that their own classes load strictly
            (`genray.interop.published_layouts` says which classes, and what they cannot hold).
        output: path or URI of the file; by default `model.onnx`, `model_trades.pt` or `model_robustbench.pt` beside
            the model.
        overwrite: replace a file that is there.

    Returns:
        Where the file is.

    Raises:
        InputError: the source, the output or the layout will not do; nothing was written.
        GenrayError: writing failed, or the ONNX file does not give the same logits.
    """
    from genray.interop.checkpoint_file import read_file
    from genray.interop.checkpoint_layouts import read_metadata
    from genray.interop.load import model_file, model_of
    from genray.storage import Storage

    place = model_file(Storage(source))
    target = place.parent / LAYOUTS[layout] if output is None else Storage(output)
    if str(output).endswith("/") or target.is_folder():
        raise RunFolderError(f"{target}: expected the name of a file, got a folder")
    target.parent.check_writable()
    if target.exists() and not overwrite:
        raise RunFolderError(f"{target}: exists; choose another --output, or --overwrite")
    file = read_file(place)
    target.parent.write(target.name, _content(model_of(file), read_metadata(file), layout))
    return target.uri


def _content(model, metadata, layout):
    import torch

    import genray

    architecture = metadata["architecture"]
    if layout == "onnx":
        from genray.interop.onnx_file import onnx_bytes

        shape = (architecture["in_channels"], *architecture["image_size"])
        notes = {"genray": genray.__version__, "run": str(metadata.get("run", ""))}
        notes |= {"images": "float32 in [0, 1]; normalised inside"}
        told = ("threat_models", "class_names", "data")
        notes |= {name: json.dumps(metadata[name]) for name in told if name in metadata}
        return onnx_bytes(model, shape, notes)
    from genray.interop.published_layouts import published_state

    stream = io.BytesIO()
    torch.save(published_state(model, metadata, layout), stream)
    return stream.getvalue()


def main(args):
    from genray.storage import without_secrets

    written = export(args.source, args.layout, args.output, overwrite=args.overwrite)
    print(f"the model is in {without_secrets(written)}")


def parse_args(argv):
    parser = Parser(prog="genray.export", description=__doc__)
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="a run folder, or a model file written by genray")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="what the file is to look like")
    parser.add_argument("--output", metavar="FILE", help="path or URI (default: beside the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)
