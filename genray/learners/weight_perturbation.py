"""AWP, adversarial weight perturbation (Wu et al., NeurIPS 2020, arXiv 2004.05884), around any objective."""

from contextlib import contextmanager

import torch

from genray.parallel.process_group import ALONE

TINY = 1e-20  # in the denominator, as in the authors' code


class WeightPerturbation:
    """Moves the weights up the loss before the gradient of an update is taken, and back before the update is made.

    v = gamma * ||w|| / (||g|| + 1e-20) * g for each weight tensor of more than one dimension, g the gradient of the
    objective on the same examples (methods C8; the authors take one plain SGD step of a copy, whose rate cancels).
    BatchNorm's statistics and the dropout masks of that pass do not count.

    The update is made at w, with the gradient at w + v. For SGD that is the authors' "step, then subtract v", except
    that weight decay is that of w, not of w + v (a difference of lr * decay * v), and that w comes back unrounded.

    Args:
        flat: the learner's `FlatWeights`.
        gamma: size of the perturbation, relative to each tensor.
    """

    def __init__(self, flat, gamma: float):
        self.flat, self.gamma = flat, gamma
        named = [(n, p) for n, p in flat.module.named_parameters() if p.requires_grad]
        self.tensors = [p for name, p in named if p.dim() > 1 and name.endswith("weight")]
        self.trained = flat.parameter.numel()
        self.before, self.counters = torch.empty_like(flat.weights), torch.empty_like(flat.counters)

    @contextmanager
    def applied(self, loss_of, process_group=ALONE):
        """The weights are perturbed inside, and as they were after it; gradients taken inside stay.

        Args:
            loss_of: () -> the loss to go up.
            process_group: processes each of which has a summand of it.
        """
        self.before.copy_(self.flat.weights)
        self.counters.copy_(self.flat.counters)
        self.flat.zero_grad()
        loss_of().backward()
        process_group.sum_(self.flat.parameter.grad)
        with torch.no_grad():
            self._perturb()
        self._restore_statistics()
        yield
        self.flat.weights[: self.trained] = self.before[: self.trained]

    def attack(self, make_images):
        """Attacks within `loss_of`: against the statistics of before its pass, and what a train-mode attack does to
        them stays."""
        self._restore_statistics()
        images = make_images()
        self.before[self.trained :] = self.flat.weights[self.trained :]
        self.counters.copy_(self.flat.counters)
        return images

    def _restore_statistics(self):
        self.flat.weights[self.trained :] = self.before[self.trained :]
        self.flat.counters.copy_(self.counters)

    def _perturb(self):
        gradients = [p.grad for p in self.tensors]
        sizes = torch.stack(torch._foreach_norm(self.tensors))
        lengths = torch.stack(torch._foreach_norm(gradients))
        factors = self.gamma * sizes / (lengths + TINY)
        torch._foreach_add_(self.tensors, torch._foreach_mul(gradients, list(factors.unbind())))
