"""Checks a configuration against its data before decoding; reports every mistake at once."""

from genray.config.schema import RunConfig
from genray.data.catalogue import Catalogue
from genray.data.splits import balanced_problem, most_balanced
from genray.errors import ConfigError
from genray.run.plan import make_plan

HELD_OUT = 5  # a number of validation images that follows the data is one in so many


class Fitting:
    """Checks a configuration against its data.

    Args:
        config: the run's configuration.
        follows: its fields, as "section.field", that are lowered to fit the data instead of being refused.

    Attributes:
        config: with the fields that were lowered.
        notes: a line for each of those.
    """

    def __init__(self, config: RunConfig, follows=()):
        self.config, self.follows, self.notes = config, frozenset(follows), []

    def check(self, catalogue: Catalogue, available: dict):
        """Checks what is known before decoding.

        Args:
            catalogue: of the data, limited by `data.train_examples` and `data.test_examples`.
            available: "train" and "test" -> number of all images.

        Raises:
            ConfigError: one line for each mistake.
        """
        problems = []
        for part, number in available.items():
            wanted = getattr(self.config.data, f"{part}_examples")
            problem = f"expected 1 to {number} (the examples available), got {wanted}"
            self._at_most("data", f"{part}_examples", number, number, problem, problems)
        labels = catalogue.parts["train"].labels
        fifth = min(most_balanced(labels), max(1, len(labels) // HELD_OUT))
        problem = balanced_problem(labels, self.config.data.validation_examples)
        self._at_most("data", "validation_examples", most_balanced(labels), fifth, problem, problems)
        test = len(catalogue.parts["test"].labels)
        problem = f"expected at most the {test} test images, got {self.config.evaluation.examples}"
        self._at_most("evaluation", "examples", test, test, problem, problems)
        problems += self._shape_problems(catalogue)
        if not problems and self.config.data.extra is None:
            problems += batch_problems(self.config, len(labels) - self.config.data.validation_examples)
        if problems:
            raise ConfigError(problems)

    def _at_most(self, section, name, limit, lowered, problem, problems):
        """If a field is above the limit: lowers it to `lowered` if it is in `follows`, else adds to `problems`."""
        part = getattr(self.config, section)
        value, field = getattr(part, name), f"{section}.{name}"
        if value is None or value <= limit:
            return
        if field not in self.follows or lowered < 1:
            problems.append(f"{field}: {problem}")
            return
        self.notes.append(f"{field}: {lowered} instead of {value}, to fit the data")
        self.config = self.config.replace(**{section: part.replace(**{name: lowered})})

    def _shape_problems(self, catalogue):
        shapes = [part.shape for part in catalogue.parts.values()]
        side, channels, mean = min(shapes[0][1:]), max(shape[0] for shape in shapes), self.config.model.mean
        for name, learner in self.config.base_learners.items():
            if learner.augmentation.crop_padding >= side:
                at, padding = f"base_learners.{name}.augmentation.crop_padding", learner.augmentation.crop_padding
                yield f"{at}: expected less than the image's side ({side}), got {padding}"
        if mean is not None and len(mean) != channels:
            yield f"model.mean, model.std: expected {channels} values each, one a channel, got {len(mean)}"


def batch_problems(config: RunConfig, num_train: int):
    """A line for each setting that needs larger batches than `num_train` training images give."""
    training = config.training
    if training.batch_size > num_train and training.drop_last:
        yield (
            f"training.batch_size: expected at most the {num_train} training images with drop_last, got "
            f"{training.batch_size}"
        )
    else:
        plan = make_plan(config, num_train)
        for name, number in plan.workers.items():
            if number > plan.smallest_batch:
                yield (
                    f"base_learners.{name}.workers: expected at most the {plan.smallest_batch} images of an epoch's "
                    f"last batch, got {number} (training.drop_last leaves it out)"
                )
