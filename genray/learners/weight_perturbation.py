"""AWP, adversarial weight perturbation (Wu et al., NeurIPS 2020, arXiv 2004.05884), around any objective."""

from contextlib import contextmanager

import torch

TINY = 1e-20  # in the denominator, as in the authors' code


class WeightPerturbation:
    """Perturbs the weights in the direction of the loss gradient before the update's gradient is computed.

    v = gamma * ||w|| / (||g|| + 1e-20) * g for each weight tensor of more than one dimension, g the gradient of the
    objective on the same examples (methods C8; the authors take one plain SGD step of a copy, whose rate cancels).
    The additional pass changes neither BatchNorm's statistics nor the dropout masks of the update.

    The update starts from w and uses the gradient at w + v. For SGD that is the authors' "step, then subtract v",
    except that weight decay is that of w, not of w + v (a difference of lr * decay * v), and w comes back unrounded.

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
    def applied(self, compute_gradient):
        """Perturbs the weights inside the `with` statement and restores them; gradients computed inside remain.

        Args:
            compute_gradient: () -> None, leaves the gradient of the loss to maximise in that of `flat`.
        """
        self.before.copy_(self.flat.weights)
        self.counters.copy_(self.flat.counters)
        compute_gradient()
        with torch.no_grad():
            self._perturb()
        self._restore_statistics()
        yield
        self.flat.weights[: self.trained] = self.before[: self.trained]

    def attack(self, make_images):
        """Crafts images within `compute_gradient` with the BatchNorm statistics from before its pass; changes that a
        train-mode attack makes to them are kept."""
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
