"""Seeded batches of a split, wherever its images are; any step can be asked for, in any order."""

import functools

import torch

from genray.core import rng
from genray.data.ahead import Ahead
from genray.data.augment import Augmentation
from genray.data.order import Batches, Shares, Shuffled
from genray.data.splits import Split
from genray.errors import DataError


class BatchLoader:
    """Minibatches of one split as a pure function of the global step.

    Nothing is carried from step to step, so there is no state to save: a resumed or replayed run asks for the step it
    needs and gets the same bits. Two loaders with the same seed and order_key see the same examples at every step;
    their augmentation differs when their augmentation_key does.

    The permutation is keyed by (seed, order_key, "order", epoch) and drawn on the CPU, hence the same on every
    device. The augmentation is keyed by (seed, augmentation_key, "augmentation", step) and drawn on the device, hence
    the same on every device of one type. Making a batch never waits for the device.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        order_key: str,
        augmentation_key: str,
        augmentation: Augmentation | None,
        device: str | torch.device,
        drop_last: bool = False,
        extra_share: float | None = None,
        own_examples: int | None = None,
        decoding_workers: int = 0,
    ):
        """Moves the images to the device, if they are resident.

        Args:
            split: the examples.
            batch_size: examples a batch, >= 1; the last batch of an epoch is shorter where it must be.
            seed: the run's seed.
            order_key: names the order of the examples (shared by learners that are to see the same minibatches).
            augmentation_key: names the augmentation's random numbers, usually the learner.
            augmentation: callable (images, generator, seed_of) -> images on uint8 tensors, or None for none.
            device: where the batches are made.
            drop_last: leave out the short last batch (a random one each epoch, so no example is left out for good).
            extra_share: share of the examples after the first `own_examples` in each batch, while an epoch has as many
                as these; None: every example once an epoch.

            decoding_workers: processes that decode the next batches of images that are in files.

        Raises:
            DataError: batch_size below 1, no examples, or drop_last with fewer examples than one batch.
        """
        if batch_size < 1:
            raise DataError(f"batch_size: expected 1 or more, came {batch_size}")
        if len(split) == 0:
            raise DataError("training data: expected at least 1 example, came 0")
        num_examples = len(split) if extra_share is None else own_examples
        if drop_last and num_examples < batch_size:
            raise DataError(
                f"batch_size: expected at most the {num_examples} training examples, since drop_last leaves out "
                f"incomplete batches; came {batch_size}"
            )
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._split = split.to(self.device)
        self._seed = seed
        self._augmentation_key = augmentation_key
        self._augmentation = augmentation
        draw, home = functools.partial(rng.generator, "cpu", seed, order_key), self._split.home
        order: Shuffled | Shares = Shuffled(num_examples, draw)
        if extra_share is not None:
            order = Shares(num_examples, len(split), extra_share, batch_size, draw)
        self._places = Batches(order, batch_size, drop_last, home.device)
        self._ahead = Ahead(home, self._places, decoding_workers) if home.decodes and decoding_workers else None

    @property
    def num_examples(self) -> int:
        """Examples an epoch."""
        return self._places.order.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch, the short last one included unless drop_last."""
        return self._places.steps_per_epoch

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The minibatch of one global step.

        Args:
            step: 0-based step since the start of training; the epoch is step // steps_per_epoch.

        Returns:
            (images, labels) on the device: (B, C, H, W) float32 in [0, 1], and (B,) int64.

        Raises:
            ValueError: negative step.
        """
        chosen = self._places(step)
        images = self._ahead.batch(step) if self._ahead else self._split.home.take(chosen)
        images, labels = images.to(self.device), self._split.labels[chosen].to(self.device)
        if self._augmentation is not None:
            key = (self._seed, self._augmentation_key, "augmentation", step)
            images = self._augmentation(images, rng.generator(self.device, *key), functools.partial(rng.key_seed, *key))
        # A division, not a product with 1/255: v / 255 is the value every published model was trained on.
        return images.to(torch.float32).div_(255), labels

    def labelled(self, step: int) -> torch.Tensor | None:
        """Which labels of that minibatch are the data set's own: (B,) bool on the device, or None where all are."""
        labelled = self._split.labelled
        return None if labelled is None else labelled[self._places(step)].to(self.device)
