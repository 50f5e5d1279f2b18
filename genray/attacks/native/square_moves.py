"""What Square tries: the start and the candidates of each norm, and the order in which random numbers are drawn."""

import functools
import math

import torch

from genray.attacks.native.outcome import Layout
from genray.core.geometry import BALLS, l1_shrinkage

START_SHARE = 0.8  # of the image, that a window covers at first
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries
TINY = 1e-12  # keeps an empty window's length off zero


class _Moves:
    """Candidates for a batch that shrinks.

    Args:
        x: (N, C, H, W) original images.
        epsilon: radius.
        numbers: CPU generator.
        norm: key of `BALLS`.
    """

    def __init__(self, x, epsilon, numbers, norm):
        self.x, self.epsilon, self.numbers, self.norm = x, epsilon, numbers, norm

    def keep(self, rows):
        self.x = self.x[rows]

    def legal(self, images, rows):
        """Images of these rows, without what rounding put outside ball and box."""
        return BALLS[self.norm].project(self.x[rows], images, self.epsilon)

    def _side(self, query, least):
        """Side of the window of a query; odd if 3 is the least."""
        height, width = self.x.shape[2:]
        share = START_SHARE / 2 ** sum(query > last for last in HALVED_AFTER)
        side = max(round(math.sqrt(share * height * width)), least)
        return min(side + (least == 3 and side % 2 == 0), height, width)

    def _window(self, side):
        """A window of this side; the image's last row and column are left out, as in the authors' package."""
        places = (int((size - side) * torch.rand(1, generator=self.numbers)) for size in self.x.shape[2:])
        return tuple((place, place + side) for place in places)

    def _signs(self, *shape):
        return (2 * torch.rand(shape, generator=self.numbers) - 1).sign_().to(self.x.device)


class Squares(_Moves):
    """Linf: one square in one colour, at the same place in all images."""

    def __init__(self, x, epsilon, numbers, norm):
        super().__init__(x, epsilon, numbers, norm)
        self.lowest, self.highest = (x - epsilon).clamp_min_(0), (x + epsilon).clamp_max_(1)

    def keep(self, rows):
        super().keep(rows)
        self.lowest, self.highest = self.lowest[rows], self.highest[rows]

    def start(self):
        """Vertical stripes."""
        count, channels, _, width = self.x.shape
        stripes = self.epsilon * self._signs(count, channels, 1, width)
        return (self.x + stripes).clamp_(0, 1)

    def propose(self, images, query):
        """The next candidate of all images."""
        at, proposed = cut(self._window(self._side(query, least=1))), images.clone()
        content = images[at] + 2 * self.epsilon * self._signs(images.shape[1], 1, 1)
        proposed[at] = torch.minimum(content.maximum(self.lowest[at]), self.highest[at])
        return proposed


class Patterns(_Moves):
    """L2 and L1: a pattern of two bumps in one window takes over the perturbation of another.

    The mass of a perturbation is the sum of its squares in l2, of its absolute values in l1.
    """

    def start(self):
        """Patterns of random signs side by side: 5 x 5, and more where a window of a fifth leaves room."""
        count, channels, height, width = self.x.shape
        side = height // 5
        first = (height - 5 * side) // 2
        delta = torch.zeros_like(self.x)
        for top in range(first, first + height // side * side, side):
            for left in range(first, first + width // side * side, side):
                part = delta[cut(((top, top + side), (left, left + side)))]
                part += self._pattern(side) * self._signs(count, channels, 1, 1)
        return self._fit(delta)

    def propose(self, images, query):
        """The next candidate of all images; scaling changes every pixel."""
        count, channels = images.shape[:2]
        side = self._side(query, least=3)
        to, source = self._window(side), self._window(side)
        pattern = self._pattern(side) * self._signs(count, channels, 1, 1)
        delta = images - self.x
        free = (self._power(self.epsilon) - self._mass(delta).sum(1, keepdim=True)).clamp_min_(0)
        mass = free / channels + self._mass_of_both(delta, to, source)
        old = delta[cut(to)]
        new = pattern + old / (TINY + self._length(old))
        new = new / (TINY + self._length(new))
        delta[cut(source)] = 0
        delta[cut(to)] = new * (mass.sqrt() if self.norm == "l2" else mass * channels)
        return self._fit(delta)

    def _fit(self, delta):
        """Images with this perturbation, brought to the sphere (l2) or into the ball (l1), and into the box."""
        if self.norm == "l1":
            layout = Layout(self.x)
            x, delta = layout.rows(self.x), layout.rows(delta)
            shrinkage = l1_shrinkage(x, delta, self.epsilon * (1 - 1e-6))
            return layout.images((delta + shrinkage).add_(x).clamp_(0, 1))
        length = delta.square().flatten(1).sum(1).sqrt_().view(-1, 1, 1, 1)
        return delta.div_(length + TINY).mul_(self.epsilon).add_(self.x).clamp_(0, 1)

    def _pattern(self, side):
        turned = float(torch.rand(1, generator=self.numbers)) > 0.5
        values = pattern(side, self.norm).to(self.x.device)
        return values.T if turned else values

    def _power(self, value):
        return value * value if self.norm == "l2" else abs(value)

    def _mass(self, delta):
        """(N, C, 1, 1)."""
        return self._power(delta).sum((2, 3), keepdim=True)

    def _length(self, delta):
        return self._mass(delta).sqrt_() if self.norm == "l2" else self._mass(delta)

    def _mass_of_both(self, delta, one, two):
        common = tuple((max(a, c), max(a, c, min(b, d))) for (a, b), (c, d) in zip(one, two))
        one, two, common = (self._mass(delta[cut(window)]) for window in (one, two, common))
        return one + (two - common)


@functools.lru_cache
def pattern(side, norm):
    """(side, side): a bump over its negative, of length 1."""
    upper, lower = bump(side // 2, side, norm), bump(side - side // 2, side, norm)
    values = torch.cat([upper, -lower])
    return _unit(values, norm).float()


def bump(height, width, norm):
    """(height, width) float64 of length 1: rectangles around the middle, of 1 / k^2 (l1: 1 / k^4) for k = 1, 2, ..."""
    rows, columns = (torch.arange(size) - size // 2 for size in (height, width))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    steps = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** (-2 if norm == "l2" else -4)
    heights = steps.flip(0).cumsum(0).flip(0)  # rectangle k covers all rings up to k - 1
    return _unit(heights[ring], norm)


def _unit(values, norm):
    return values / (values.square().sum().sqrt() if norm == "l2" else values.abs().sum())


def cut(window):
    """Index of a window ((top, bottom), (left, right)) of images (N, C, H, W)."""
    return (..., *(slice(start, stop) for start, stop in window))
