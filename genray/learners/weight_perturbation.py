"""AWP, adversarial weight perturbation (Wu et al., NeurIPS 2020, arXiv 2004.05884), around any objective."""

from contextlib import contextmanager

import torch

TINY = 1e-20  # in the denominator, as in the authors' code


class WeightPerturbation:
    """Moves the weights up the loss before the gradient of an update is taken, and back before the update is made.

    v = gamma * ||w|| / (||g|| + 1e-20) * g for each weight tensor of more than one dimension, g the gradient of the
    objective on the same examples (methods C8; the authors take one plain SGD step of a copy, whose rate cancels).
    BatchNorm's statistics and the dropout masks of that pass do not count.

    Args:
        flat: the learner's `FlatWeights`.
        gamma: size of the perturbation, relative to each tensor.
    """

    def __init__(self, flat, gamma: float):
        self.flat, self.gamma = flat, gamma
        named = [(n, p) for n, p in flat.module.named_parameters() if p.requires_grad]
        self.tensors = [p for name, p in named if p.dim() > 1 and name.endswith("weight")]
        self.before = torch.empty_like(flat.weights)

    @contextmanager
    def applied(self, loss_of):
        """The weights are perturbed inside, and as they were after it; gradients taken inside stay.

        Args:
            loss_of: () -> the loss to go up.
        """
        self.before.copy_(self.flat.weights)
        counters = self.flat.counters.clone()
        self.flat.zero_grad()
        loss_of().backward()
        with torch.no_grad():
            self._perturb()
            # The statistics of that pass are thrown away.
            trained = len(self.flat.parameter)
            self.flat.weights[trained:] = self.before[trained:]
            self.flat.counters.copy_(counters)
        yield
        with torch.no_grad():
            trained = len(self.flat.parameter)
            self.flat.weights[:trained] = self.before[:trained]

    def _perturb(self):
        gradients = [p.grad for p in self.tensors]
        sizes = torch.stack(torch._foreach_norm(self.tensors))
        lengths = torch.stack(torch._foreach_norm(gradients))
        factors = self.gamma * sizes / (lengths + TINY)
        torch._foreach_add_(self.tensors, torch._foreach_mul(gradients, list(factors.unbind())))
