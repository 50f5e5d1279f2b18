"""Checks the arguments of an evaluation before anything is computed: one line for each mistake."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from genray.attacks.transfer import TRANSFER
from genray.config.model import Section, collect, option
from genray.config.schema import Norm
from genray.config.values import AsTuple, Exact
from genray.errors import ConfigError, DataError, one_line
from genray.evaluation.engines import ENGINES
from genray.evaluation.job import Request, as_pixels
from genray.types import NORMS, ThreatModel, fraction_text

# The radii of papers, used if neither the user nor the run sets one (methods C10).
RADII = {"linf": "8/255", "l2": "128/255", "l1": "12"}


@dataclass(frozen=True)
class EvaluationArguments:
    """The arguments of `genray.evaluate`, which describes them, without the model, the images and the workers."""

    attacks: Any = ("standard",)
    norms: Any = ("linf",)
    epsilon: Any = None
    step_size: Any = None
    num_classes: int | None = None
    seed: int = 0
    block_size: int | None = None
    engine: str | None = None
    output: Any = None
    resume: bool = False
    overwrite: bool = False
    data: dict | None = None
    transfer: Any = None
    save_images: bool = False

    def request(self, own=RADII) -> Request:
        """The checked request; its block size is 100 where none is given.

        Args:
            own: as in `radii`.

        Raises:
            ConfigError: an attack, a norm, a radius, a step size or the engine is wrong.
        """
        norms = names(self.norms)
        of_norms = radii(norms, self.epsilon, own)
        threats = tuple(ThreatModel(norm, radius) for norm, values in of_norms.items() for radius in values)
        if self.engine is not None:
            _checked(engine=self.engine)
        steps = step_sizes(norms, self.step_size)
        for norm in steps:
            if len(of_norms[norm]) > 1:
                several = ", ".join(map(fraction_text, of_norms[norm]))
                raise ConfigError(f"step_size.{norm}: expected none with several radii ({several}): it is epsilon / 4")
        size = self.block_size or Request.block_size
        request = Request(threats, names(self.attacks), steps, self.seed, size, self.engine, self.save_images)
        check_transfer(request.attacks, self.transfer)
        for norm in norms:
            request.columns(norm)
        return request


def check_transfer(attacks, transfer):
    """Checks that the column `transfer` and the networks for it are given together.

    Raises:
        ConfigError: they are not.
    """
    if TRANSFER in attacks and transfer is None:
        raise ConfigError(
            "evaluation attack transfer: expected networks to make images on, got none: evaluate a run folder, in "
            "Python pass transfer=RUN or {name: network}, or name one file by transfer_from=FILE"
        )
    if transfer is not None and TRANSFER not in attacks:
        raise ConfigError("transfer: has no effect without the column transfer among the attacks")


def names(value) -> tuple[str, ...]:
    """A sequence of names, or the text "aa,cw", as a tuple."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)


def check_images(x, y):
    """Checks images and labels.

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


class _Radii(Section):
    linf: Exact = option(None, "on the [0, 1] scale: 8/255, not 8", gt=0, le=1)
    l2: Exact = option(None, "radius", gt=0)
    l1: Exact = option(None, "radius", gt=0)


class _Wanted(Section):
    norms: Annotated[tuple[Norm, ...], AsTuple, Field(min_length=1)] = option(NORMS, "of the balls")
    step_size: dict[str, Exact] = option(dict, "norm: step size", gt=0)
    engine: Literal[tuple(ENGINES)] | None = option(  # type: ignore[valid-type]  # one list of names
        None, "code of AutoAttack's members"
    )


def _checked(**given):
    value, problems = collect(_Wanted, given)
    if problems:
        raise ConfigError(problems)
    return value


def radii(norms, epsilon, own=RADII) -> dict[str, tuple[Fraction, ...]]:
    """norm -> exact radii, the smallest first; the norms in the order asked for.

    Args:
        norms: of "linf", "l2", "l1".
        epsilon: norm -> radius or radii, or those of a single norm.
        own: norm -> radius of the model, used where `epsilon` has none; the last choice is the radius of papers.

    Raises:
        ConfigError: an unknown norm or a radius out of range; every problem is listed.
    """
    norms = _checked(norms=tuple(norms)).norms
    given = {**RADII, **own, **_by_norm("epsilon", epsilon, norms)}
    found, problems = {}, []
    for norm in norms:
        values = given[norm] if isinstance(given[norm], (list, tuple)) else (given[norm],)
        checked = [collect(_Radii, {norm: value}) for value in values]
        problems += [f"epsilon.{problem}" for _, of_value in checked for problem in of_value]
        found[norm] = tuple(sorted(getattr(of, norm) for of, wrong in checked if not wrong))
        if not checked:
            problems.append(f"epsilon.{norm}: expected at least one radius, got none")
        for smaller, larger in pairwise(found[norm]):
            if smaller == larger:
                problems.append(f"epsilon.{norm}: expected different radii, got {fraction_text(larger)} twice")
    if problems:
        raise ConfigError(problems)
    return found


def step_sizes(norms, step_size) -> dict[str, float]:
    """norm -> step size, as far as given.

    Raises:
        ConfigError: a step size is no number above 0.
    """
    given = _checked(step_size=_by_norm("step_size", step_size, norms)).step_size
    return {norm: float(value) for norm, value in given.items()}


def _by_norm(name, value, norms):
    if value is not None and not isinstance(value, Mapping):
        if len(norms) != 1:
            raise ConfigError(f"{name}: expected norm=value for each of {', '.join(norms)}, got {value!r}")
        return {norms[0]: value}
    for norm in value or ():
        if norm not in norms:
            raise ConfigError(f"{name}: expected those of {', '.join(norms)}, got one of {norm!r}")
    return dict(value or {})


def given_by_norm(option, text, norms) -> dict:
    """norm -> text or texts, from "8/255" or "2/255,8/255" (one norm) or "linf=2/255:8/255,l2=0.5"; empty for None."""
    if not text:
        return _by_norm(option, text, norms)
    if "=" not in text:
        return _by_norm(option, _one_or_several(text.replace(",", ":")), norms)
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    for norm, count in Counter(norm for norm, _ in pairs).items():
        if count > 1:
            raise ConfigError(f"{option}: expected several radii as {norm}=2/255:8/255, got {norm}= twice")
    return _by_norm(option, {norm: _one_or_several(values) for norm, values in pairs}, norms)


def _one_or_several(text):
    return text.split(":") if ":" in text else text
