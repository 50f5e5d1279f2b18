"""Unlabelled training images and who labels them (methods C7): the section `data.unlabeled`, and the teacher's run."""

from typing import Literal

from genray.config.model import Section, Text, option, required
from genray.config.objectives import NaturalObjective
from genray.config.optimizers import SGD, Optimizer
from genray.config.values import Real, Schedule

TEACHER = "teacher"  # name of its run, in the folder of the run that needs it


class TeacherConfig(Section):
    path: Text | None = option(None, "a run folder or model file that labels them; null: train a teacher")
    epochs: int | None = option(None, "of the teacher's run; null: training.epochs", ge=1, unit="epochs")
    lr: Schedule | None = option(
        None, "the teacher's learning rate; null: as the first natural (else the first) base learner's", ge=0
    )
    optimizer: Optimizer = option(SGD, "the teacher's optimiser")

    def problems(self):
        for name, default in (("epochs", None), ("lr", None), ("optimizer", SGD())):
            if self.path is not None and getattr(self, name) != default:
                yield f"{name}: has no effect with teacher.path, whose model is trained already; remove one of them"


class UnlabeledConfig(Section):
    source: Literal["fraction", "svhn_extra", "parquet", "image_folder", "npz"] = required(
        "where they come from; fraction: training images whose labels are dropped"
    )
    fraction: Real | None = option(
        None, "fraction: share of the training images whose labels are dropped", gt=0, lt=1, unit="share"
    )
    class_balanced: bool = option(True, "fraction: the same share of each class; false: drawn from all images alike")
    seed: int = option(0, "fraction: seed of that choice", ge=0)
    path: Text | None = option(None, "folder, file or URI; svhn_extra: the download folder")
    image_column: Text | None = option(None, "Parquet column with the images; found by itself when null")
    resize: bool = option(False, "parquet, image_folder: resize to the training images' size")
    examples: int | None = option(None, "only the first n (not for fraction)", ge=1, unit="images")
    batch_share: Real | None = option(
        None,
        "share of pseudo-labelled images in each batch, while an epoch has as many images as data.source gives; "
        "0: train on the labelled images alone; null: an epoch is one pass over all images, shuffled together",
        ge=0,
        lt=1,
        unit="share",
    )
    teacher: TeacherConfig = option(TeacherConfig, "who gives the pseudo-labels")

    @property
    def is_used(self) -> bool:
        """Whether pseudo-labelled images are trained on."""
        return self.batch_share != 0

    def problems(self):
        if self.source == "fraction" and self.fraction is None:
            yield "fraction: missing, expected the share of the training images whose labels are dropped"
        if self.source in ("parquet", "image_folder", "npz") and self.path is None:
            yield f"path: missing, source {self.source} needs the file, folder or URI of the images"
        if not self.is_used and self.teacher != TeacherConfig():
            yield "teacher: has no effect with batch_share: 0, which trains on the labelled images alone"
        external = ("svhn_extra", "parquet", "image_folder", "npz")
        for name, default, sources in (
            ("fraction", None, ("fraction",)),
            ("class_balanced", True, ("fraction",)),
            ("seed", 0, ("fraction",)),
            ("path", None, external),
            ("examples", None, external),
            ("image_column", None, ("parquet",)),
            ("resize", False, ("parquet", "image_folder")),
        ):
            if getattr(self, name) != default and self.source not in sources:
                yield f"{name}: has no effect with source {self.source}; it is for {', '.join(sources)}"


def unlabeled_problems(config):
    """What `data.unlabeled` and the rest of a run may not be together."""
    unlabeled, size = config.data.unlabeled, config.training.batch_size
    for name, learner in config.base_learners.items():
        if getattr(learner.objective, "needs_unlabeled", False) and not (unlabeled and unlabeled.is_used):
            yield (
                f"data.unlabeled: {'missing' if unlabeled is None else 'not used with batch_share: 0'}, "
                f"base_learners.{name}.objective trains on pseudo-labelled images"
            )
    if unlabeled and unlabeled.batch_share:
        images = share_of(unlabeled.batch_share, size)
        if not 0 < images < size:
            yield (
                f"data.unlabeled.batch_share: expected at least one pseudo-labelled and one labelled image in a batch "
                f"of {size}, got {images} and {size - images}"
            )


def share_of(share: float, size: int) -> int:
    """Pseudo-labelled images in a batch of `size`; halves are rounded up."""
    return int(share * size + 0.5)


def teacher_config(config):
    """The ordinary run that trains the teacher: one natural learner on the labelled images of `config`.

    Model, data, augmentation, averaging, batches and device are those of the run (of its first natural, else its first
    base learner); it is evaluated once, at its end.
    """
    unlabeled, learners = config.data.unlabeled, config.base_learners.values()
    student = next((learner for learner in learners if not learner.is_robust), next(iter(learners)))
    options = unlabeled.teacher
    epochs = options.epochs or config.training.epochs
    return config.replace(
        name=TEACHER,
        data=config.data.replace(unlabeled=unlabeled.replace(batch_share=0.0, teacher=TeacherConfig())),
        training=config.training.replace(epochs=epochs),
        base_learners={
            TEACHER: student.replace(
                objective=NaturalObjective(),
                attack=None,
                attacks=None,
                awp=None,
                optimizer=options.optimizer,
                lr=options.lr or student.lr,
                data_order="shared",
            )
        },
        runtime=config.runtime.replace(share_attack=False),
        global_learner=config.global_learner.replace(
            gamma=None, mixing_weights=None, warmup_epochs=None, sync_every=1, sync_unit="never"
        ),
        evaluation=config.evaluation.replace(
            every_epochs=epochs,
            select_on="validation" if config.data.validation_examples else "test",
            natural_floor=0.0,
        ),
    )
