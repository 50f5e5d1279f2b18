"""Square (Andriushchenko et al., 1912.00049; methods D4): random search without gradients, as AutoAttack sets it.

Draws the numbers that the authors' package draws for the same seed and batch, so both try the same candidates.
"""

import torch

from genray.attacks.losses import signed_margin
from genray.attacks.native.square_moves import Patterns, Squares


def square(model, x, y, *, norm, epsilon, seed, num_classes, search=None, num_queries=5000):
    """Attacks a batch; one restart.

    Args:
        model: images (N, C, H, W) in [0, 1] -> float32 logits (N, num_classes), in eval mode. It decides: an example
            is broken once `model` misclassifies the very point that is returned.
        x: (N, C, H, W) float32 in [0, 1], of a size that `auto.check` lets pass.
        y: (N,) int64.
        norm: "linf", "l2" or "l1".
        epsilon: radius > 0 on the [0, 1] pixel scale.
        seed: of all the numbers drawn, in [0, 2**63). They depend on the batch as a whole.
        num_classes: K >= 2.
        search: a cheaper version of `model` that scores the candidates in its place. What it takes for a break and
            `model` does not stays under attack, and is scored by `model` from then on.
        num_queries: candidates tried after the start.

    Returns:
        (N, C, H, W) with ||x' - x|| <= epsilon in [0, 1]; `x` itself for an example that was not broken.
    """
    found = x.clone()
    if len(x) == 0:
        return found
    with torch.no_grad():
        at = (model(x).argmax(1) == y).nonzero().flatten()
        if len(at):
            numbers = torch.Generator().manual_seed(seed)  # on the CPU, as the package: the same on every device
            moves = (Squares if norm == "linf" else Patterns)(x[at], epsilon, numbers, norm)
            found[at] = _SearchState(model, search or model, moves, y[at])(num_queries)
    return found


class _SearchState:
    """The random search on correctly classified examples; the batch shrinks as they fall.

    Args:
        model: decides, and scores where it is close.
        search: scores.
        moves: candidates.
        y: (N,) labels.
    """

    def __init__(self, model, search, moves, y):
        self.model, self.search, self.moves, self.y = model, search, moves, y
        self.found, self.at = moves.x.clone(), torch.arange(len(y), device=y.device)
        self.close = self.at[:0]  # examples that only looked broken: `model` scores them from then on

    def __call__(self, num_queries):
        """(N, C, H, W): the originals of those that resist."""
        self.images = self.moves.start()
        self.margins = signed_margin(self.search(self.images), self.y)
        self._settle(torch.arange(len(self.y), device=self.y.device))
        for query in range(num_queries):
            if len(self.y) == 0:
                break
            proposed = self.moves.propose(self.images, query)
            margins = signed_margin(self.search(proposed), self.y)
            if len(self.close):
                margins[self.close] = signed_margin(self.model(proposed[self.close]), self.y[self.close])
            better = (margins < self.margins).nonzero().flatten()
            self.images[better], self.margins[better] = proposed[better], margins[better]
            self._settle(better)
        return self.found

    def _settle(self, rows):
        """Of those whose image is new, asks `model` about the ones that look broken, and drops those that are.

        The others were taken for broken by rounding. The lowest of many rounded scores is too low for any real
        progress to beat it, so from here on they need exact ones.
        """
        claimed = rows[self.margins[rows] <= 0]
        if len(claimed) == 0:
            return
        points = self.moves.legal(self.images[claimed], claimed)
        logits = self.model(points)
        wrong = logits.argmax(1) != self.y[claimed]
        self.found[self.at[claimed[wrong]]] = points[wrong]
        self.margins[claimed] = signed_margin(logits, self.y[claimed])
        close = torch.zeros_like(self.y, dtype=torch.bool)
        close[self.close] = close[claimed] = True
        stays = torch.ones_like(close).index_fill_(0, claimed[wrong], False)
        self.close = close[stays].nonzero().flatten()
        if wrong.any():
            self._keep(stays.nonzero().flatten())

    def _keep(self, rows):
        for name in ("y", "at", "margins", "images"):
            setattr(self, name, getattr(self, name)[rows])
        self.moves.keep(rows)
