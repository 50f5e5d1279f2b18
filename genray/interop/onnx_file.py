"""Writes a network as an ONNX file. Needs the optional extra `onnx`, which is imported only in these functions."""

import contextlib
import logging
import warnings

import torch
from torch import nn

from genray.errors import ConfigError, GenrayError

OPSET = 18  # the newest that torch writes without converting; runtimes since 2023 know it
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4  # of the largest logit; float32 in another order gives about a tenth of it


def onnx_bytes(model: nn.Module, image_shape: tuple[int, int, int], notes: dict[str, str]) -> bytes:
    """Returns the eval-mode function of a network as one ONNX file, checked with onnxruntime.

    Normalisation is inside: `images` (N, C, H, W) float32 in [0, 1] -> `logits` (N, K) float32, for any N.

    Args:
        model: on the CPU, in eval mode.
        image_shape: (C, H, W).
        notes: what is written into the file's metadata.

    Raises:
        ConfigError: onnx, onnxscript or onnxruntime is not installed.
        GenrayError: onnxruntime's logits are not the network's.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ModuleNotFoundError as error:
        raise ConfigError(f"layout onnx: {error.name} is not installed; pip install 'genray[onnx]'") from None
    images = torch.rand(3, *image_shape, generator=torch.Generator().manual_seed(0))
    with _quietly():
        program = torch.onnx.export(
            model,
            (images,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, notes)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        _check(model, session, batch)
    return content


@torch.no_grad()
def _check(model, session, images):
    expected = model(images)
    found = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if found.shape != expected.shape or not bool((found - expected).abs().max() <= limit):
        raise GenrayError("layout onnx: onnxruntime's logits differ from the model's; nothing was written")


@contextlib.contextmanager
def _quietly():
    """torch's exporter warns of its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
