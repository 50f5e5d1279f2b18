"""Shared by the white-box attacks: images as rows of numbers, and the record of broken examples."""

import torch

from genray.core.geometry import BALLS

# Rows of a batch from which a larger one computes no faster an image; a GPU's is a guess, not measured.
FULL_BATCH = {"cpu": 128, "cuda": 1024}


class Layout:
    """Images as rows of numbers in the order in which they lie in memory, and back; neither copies."""

    def __init__(self, x):
        self.shape = x.shape[1:]
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        self.channels_last = last and not x.is_contiguous()

    def rows(self, images):
        return (images.permute(0, 2, 3, 1) if self.channels_last else images).reshape(len(images), -1)

    def images(self, rows):
        if not self.channels_last:
            return rows.view(-1, *self.shape)
        channels, height, width = self.shape
        return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)


class AttackBatch:
    """A batch of images and its threat model.

    Attributes:
        layout, x, y: the batch, x as rows (N, d).
        ball, epsilon: the threat model.
    """

    def __init__(self, x, y, norm, epsilon):
        self.layout, self.y = Layout(x), y
        self.ball, self.epsilon = BALLS[norm], epsilon
        self.x = self.layout.rows(x.detach())


class AttackState(AttackBatch):
    """The broken examples of a batch, and the points that break them.

    Attributes:
        logits: (N, K) of the clean images.
    """

    def __init__(self, model, x, y, norm, epsilon):
        super().__init__(x, y, norm, epsilon)
        self.model = model
        self.found, self.logits = self.x.clone(), self.predict(self.x)
        self.broken = self.logits.argmax(1) != y  # misclassified clean images are not attacked

    def predict(self, rows):
        return self.model(self.layout.images(rows))

    def unbroken(self):
        """Returns the (n,) positions of the examples to attack."""
        return (~self.broken).nonzero().flatten()

    def runs_at_once(self, number):
        """Returns the number of runs of `number` examples that fill a batch."""
        return max(1, FULL_BATCH.get(self.x.device.type, number) // number)

    def images(self):
        return self.layout.images(self.found)

    def settle(self, at, points, suspected):
        """Records the suspected points that the model misclassifies when they lie in ball and box.

        Args:
            at: (n,) positions of the examples; an example that several runs attack at once is there several times.
            points: (n, d).
            suspected: (n,) bool.

        Returns:
            (n',) the rows of the examples that stay and (k,) the rows that broke theirs; or None if all stay.
        """
        which = suspected.nonzero().flatten()
        if len(which) == 0:
            return None
        inside = self.ball.project(self.x[at[which]], points[which], self.epsilon)
        lost = self.predict(inside).argmax(1) != self.y[at[which]]
        which, inside = which[lost], inside[lost]
        if len(which) == 0:
            return None
        # One point an example: two written to the same place at once might mix.
        winner = torch.empty_like(self.y)
        rank = torch.arange(len(which), device=winner.device)
        winner[at[which]] = rank
        first = winner[at[which]] == rank
        self.found[at[which[first]]], self.broken[at[which]] = inside[first], True
        return (~self.broken[at]).nonzero().flatten(), which
