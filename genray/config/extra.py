"""The section `data.extra`: labelled training images beside those of `data.source`."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from genray.config.model import Section, Text, option, required
from genray.config.values import Real

if TYPE_CHECKING:
    from genray.config.schema import RunConfig


class ExtraConfig(Section):
    source: Literal["npz", "parquet", "image_folder", "svhn_extra"] = required(
        "npz: arrays image and label, as published for generated images; image_folder: a folder a class"
    )
    path: Text | None = option(None, "file, folder or URI; svhn_extra: the download folder")
    image_column: Text | None = option(None, "Parquet column with the images; found by itself when null")
    label_column: Text | None = option(None, "Parquet column with the labels; found by itself when null")
    resize: bool = option(False, "parquet, image_folder: resize to the training images' size")
    examples: int | None = option(None, "only the first n", ge=1, unit="images")
    batch_share: Real | None = option(
        None,
        "fraction of these images in each batch, while an epoch has as many images as data.source gives; null: an "
        "epoch is one pass over all images, shuffled together",
        gt=0,
        lt=1,
        unit="fraction",
    )

    def problems(self) -> Iterable[str]:
        if self.source != "svhn_extra" and self.path is None:
            yield f"path: missing, source {self.source} needs the file, folder or URI of the images"
        for name, default, sources in (
            ("image_column", None, ("parquet",)),
            ("label_column", None, ("parquet",)),
            ("resize", False, ("parquet", "image_folder")),
        ):
            if getattr(self, name) != default and self.source not in sources:
                yield f"{name}: has no effect with source {self.source}; it is for {', '.join(sources)}"


def extra_problems(config: "RunConfig") -> Iterator[str]:
    """Yields the conflicts between `data.extra` and the rest of a run's configuration."""
    extra, size = config.data.extra, config.training.batch_size
    for name, learner in config.base_learners.items():
        if getattr(learner.objective, "needs_pseudo_labels", False) and extra is None:
            yield f"data.extra: missing, base_learners.{name}.objective trains on pseudo-labelled images (genray.label)"
    if extra and extra.batch_share:
        images = share_of(extra.batch_share, size)
        if not 0 < images < size:
            yield (
                "data.extra.batch_share: expected at least one of these and one of the other images in a batch of "
                f"{size}, got {images} and {size - images}"
            )


def share_of(share: float, size: int) -> int:
    """Returns the number of extra images in a batch of `size`; halves are rounded up."""
    return int(share * size + 0.5)
