"""What an evaluation is given, checked before anything is computed: each mistake is one line that names it."""

from collections.abc import Mapping
from fractions import Fraction

import torch

from genray.config.model import did_you_mean
from genray.config.values import parse_fraction
from genray.errors import ConfigError, DataError, one_line
from genray.evaluation.engines import ENGINES
from genray.evaluation.job import as_pixels
from genray.types import NORMS

# Radii that papers use, where neither the user nor the run says one (methods C10).
RADII = {"linf": "8/255", "l2": "128/255", "l1": "12"}


def names(value) -> tuple[str, ...]:
    """("aa", "cw") from that, or from "aa,cw"."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)


def check_images(x, y):
    """Images and labels.

    Args:
        x, y: as in `genray.evaluate`.

    Returns:
        (images, labels): (N, C, H, W) float or uint8 and (N,) int64, on the CPU.

    Raises:
        DataError: one of them is wrong, or they do not fit together.
    """
    images, labels = _tensor("x", x), _tensor("y", y)
    if images.dim() != 4 or images.numel() == 0:
        raise DataError(f"x: expected images (N, C, H, W), at least one, got shape {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise DataError(f"y: expected {len(images)} integer labels, got {tuple(labels.shape)} {labels.dtype}")
    _check_pixels(as_pixels(images))
    return images, labels.long()


def check_classes(labels, logits, num_classes) -> int:
    """K, the number of classes.

    Args:
        labels: (N,) int64.
        logits: (n, K), of some images.
        num_classes: as in `genray.evaluate`.

    Raises:
        DataError: they do not agree.
    """
    classes = logits.shape[1]
    if num_classes not in (None, classes):
        raise DataError(f"model: expected logits (N, K) with K = {num_classes}, got shape {tuple(logits.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(f"y: expected labels 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return classes


def _tensor(name, value):
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: expected a tensor or array, got {type(value).__name__}: {one_line(error)}") from None


def _check_pixels(pixels):
    if not bool(pixels.isfinite().all()):
        raise DataError(f"x: expected finite pixels, got {int((~pixels.isfinite()).sum())} NaN or infinite ones")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise DataError(f"x: expected pixels in [0, 1] (normalisation belongs into the model), got [{low:g}, {high:g}]")


def check_engine(value):
    """The engine of AutoAttack's members; None is each norm's default.

    Raises:
        ConfigError: there is none of this name.
    """
    if value is not None and value not in ENGINES:
        raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, got {value!r}{did_you_mean(value, ENGINES)}")


def radii(norms, epsilon, own=RADII) -> dict[str, Fraction]:
    """norm -> exact radius, in the order asked for.

    Args:
        norms: of "linf", "l2", "l1".
        epsilon: norm -> radius, or the radius of a single norm.
        own: norm -> radius of the model, taken where `epsilon` has none; else those of papers are.

    Raises:
        ConfigError: an unknown norm or a radius out of range; every problem is listed.
    """
    given = _by_norm("epsilon", epsilon, norms)
    problems = [
        f"norms: expected {', '.join(NORMS)}, got {norm!r}{did_you_mean(norm, NORMS)}"
        for norm in norms
        if norm not in NORMS
    ]
    found = {}
    for norm in norms if not problems else ():
        value = given.get(norm, own.get(norm, RADII[norm]))
        found[norm] = _positive(value)
        if norm == "linf" and found[norm] > 1:
            problems.append(f"epsilon: expected at most 1 for linf, got {value} (on the [0, 1] scale: 8/255, not 8)")
        elif found[norm] <= 0:
            problems.append(f"epsilon: expected a number such as 8/255 above 0 for {norm}, got {value!r}")
    if problems or not found:
        raise ConfigError(problems or "norms: expected at least one, got none")
    return found


def step_sizes(norms, step_size) -> dict[str, float]:
    """norm -> step size, where one is given.

    Raises:
        ConfigError: a step size is no number above 0.
    """
    given = _by_norm("step_size", step_size, norms)
    problems = [
        f"step_size: expected a number such as 2/255 above 0 for {norm}, got {value!r}"
        for norm, value in given.items()
        if _positive(value) <= 0
    ]
    if problems:
        raise ConfigError(problems)
    return {norm: float(parse_fraction(value)) for norm, value in given.items()}


def _by_norm(name, value, norms):
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        if len(norms) != 1:
            raise ConfigError(f"{name}: expected one for each of {', '.join(norms)}, got {value!r}")
        return {norms[0]: value}
    for norm in value:
        if norm not in norms:
            raise ConfigError(f"{name}: expected those of {', '.join(norms)}, got one of {norm!r}")
    return dict(value)


def _positive(value):
    """The number; 0 for what is none."""
    try:
        return parse_fraction(value)
    except ValueError:
        return 0
