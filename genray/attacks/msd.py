"""Multi steepest descent (MSD): one attack over several norm balls (Maini et al., ICML 2020, 1909.04068)."""

from dataclasses import dataclass

import torch

from genray.attacks.gradient import GradientAttack, input_gradient, temporary_mode
from genray.attacks.losses import cross_entropy
from genray.attacks.worst import worst_of
from genray.core.geometry import BALLS


@dataclass(frozen=True)
class MsdAttack:
    """Goes on from whichever norm's step raises the cross-entropy most, example by example (methods C10).

    It starts at the images. Each iteration takes one gradient, makes one steepest step a norm from it, projects each on
    its own ball and the box, and goes on from the candidate with the largest cross-entropy. The candidate with the
    largest one of all iterations is returned. Cost: num_steps passes and as many forward passes a norm.

    Attributes:
        attacks: norm, epsilon and step size of each; all of one mode and one number of steps. On a tie the earlier one.
        l1_pixels: fewest and most pixels that an l1 step moves: k is drawn anew for every iteration, and each pixel
            moves by step_size / k.
    """

    attacks: tuple[GradientAttack, ...]
    l1_pixels: tuple[int, int] = (5, 20)

    @property
    def mode(self) -> str:
        return self.attacks[0].mode

    def __call__(self, model, x, y, draw):
        """As `GradientAttack.__call__`; each image lies in one of the balls."""
        num_steps, point = self.attacks[0].num_steps, x
        best, best_loss = x, x.new_full((len(x),), -torch.inf, dtype=torch.float32)
        pixels = self._draw_pixels(x.new_empty(num_steps, dtype=torch.float32), draw)
        with temporary_mode(model, training=self.mode == "train"):
            for i in range(num_steps):
                gradient = input_gradient(model, point, y, cross_entropy)
                candidates = [self._candidate(attack, x, point, gradient, pixels[i]) for attack in self.attacks]
                point, loss = worst_of(model, candidates, y)
                best = torch.where((loss > best_loss)[:, None, None, None], point, best)
                best_loss = torch.maximum(loss, best_loss)
        return best

    def _draw_pixels(self, like, draw):
        """k of each iteration; on the device, so that nothing has to wait for it."""
        fewest, most = self.l1_pixels
        return fewest + ((most - fewest + 1) * draw.uniform_for_all(like)).floor().clamp_max(most - fewest)

    def _candidate(self, attack, x, point, gradient, pixels):
        ball = BALLS[attack.norm]
        if attack.norm == "l1":
            move = sparse_step(point, gradient, attack.step_size, pixels, self.l1_pixels[1])
        else:
            move = attack.step_size * ball.step(gradient, attack.sparsity)
        return ball.project(x, point + move, attack.epsilon)


def sparse_step(point, gradient, step_size, pixels, most):
    """A step of length step_size / k along the gradient's sign in each of the k pixels of the largest gradients.

    Only pixels with more room to the wall than that are moved, as in the authors' code; theirs also never moves pixels
    that lie on a wall, which ours moves inwards.

    Args:
        point, gradient: (N, C, H, W).
        pixels: k, a tensor of one number.
        most: its largest value.

    Returns:
        (N, C, H, W) of L1 norm step_size; less where fewer than k pixels can move.
    """
    each, flat, at = step_size / pixels, gradient.flatten(1), point.flatten(1)
    room = torch.where(flat > 0, 1 - at, at)
    size, largest = (flat.abs() * (room > each)).topk(min(most, flat.shape[1]), dim=1)
    moved = (torch.arange(size.shape[1], device=size.device) < pixels) & (size > 0)
    steps = each * flat.gather(1, largest).sign() * moved
    return torch.zeros_like(flat).scatter_(1, largest, steps).view_as(gradient)
