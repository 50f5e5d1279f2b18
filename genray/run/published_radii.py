"""Radii of publications by norm and kind of image: one far above them is most often a slip of the pen."""

from collections.abc import Iterator
from fractions import Fraction

from genray.config.schema import RunConfig
from genray.types import fraction_text

# MNIST: Madry et al. (1706.06083), Croce and Hein (2105.12508); CIFAR: RobustBench (2010.09670), L1 Croce and Hein
# (2103.01208); ImageNet: RobustBench, L2 Salman et al. (2007.08489), L1 Croce and Hein (2105.12508).
PUBLISHED = {
    "28x28 grey images": {"linf": "0.3", "l2": "2", "l1": "10"},
    "32x32 images": {"linf": "8/255", "l2": "0.5", "l1": "12"},
    "ImageNet": {"linf": "4/255", "l2": "3", "l1": "255"},
}
FACTOR = 2  # times the published radius are still taken without a word
LARGEST_SMALL_SIDE = 64  # pixels


def radius_warnings(config: RunConfig, shape: tuple[int, ...]) -> Iterator[str]:
    """A line for each radius above twice the published one.

    Args:
        config: of the run; its evaluation's attack is complete.
        shape: of an image, (C, H, W).
    """
    kind = kind_of(shape)
    radii = {
        f"base_learners.{name}.{place}": (attack.norm, attack.epsilon)
        for name, learner in config.base_learners.items()
        for place, attack in learner.placed_attacks.items()
    }
    judged = config.evaluation.attack
    if (judged.norm, judged.epsilon) not in radii.values():
        radii["evaluation.attack"] = judged.norm, judged.epsilon
    for path, (norm, epsilon) in radii.items():
        published = PUBLISHED[kind][norm]
        if epsilon > FACTOR * Fraction(published):
            given = fraction_text(epsilon)
            yield f"{path}.epsilon: {given} in {norm} is above twice the published radius for {kind}, {published}"


def kind_of(shape: tuple[int, ...]) -> str:
    """The entry of `PUBLISHED` that images of a shape are nearest to."""
    channels, *sides = shape
    if max(sides) > LARGEST_SMALL_SIDE:
        return "ImageNet"
    return "28x28 grey images" if channels == 1 else "32x32 images"
