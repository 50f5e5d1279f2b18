"""APGD on the cross-entropy, DLR and targeted DLR losses: our own, faster than the authors' package (methods D4).

Croce & Hein, 2003.01690 (linf, l2), 2103.01208 (l1). Same steps and same random numbers as `pyautoattack`. It is faster
because an example is removed at the first iterate that breaks it, the clean logits rank the targets of all runs, the
last iterate needs no gradient, runs without a break are computed several at once, and l1 needs no sort.
"""

import torch
import torch.nn.functional as F

from genray.attacks.auto import runs
from genray.attacks.native.ascent import L1_STAGES, ApgdRun, L1ApgdRun
from genray.attacks.native.outcome import AttackState

TINY = 1e-12


def apgd(model, x, y, *, member, norm, epsilon, seed, num_classes, search=None):
    """Attacks a batch with an APGD member of AutoAttack as its `standard` version sets it for the norm.

    In float32 each example's iterates are the package's up to rounding, for the same seed and batch, whatever the
    memory format. The state of the model and torch's global random state are not touched.

    Args:
        model: images (N, C, H, W) in [0, 1] -> float32 logits (N, num_classes), in eval mode.
        x: (N, C, H, W) float32 in [0, 1]; its memory format is the one the model gets.
        y: (N,) int64.
        member: "apgd_ce", "apgd_dlr" or "apgd_t".
        norm: "linf", "l2" or "l1".
        epsilon: radius >= 0 on the [0, 1] pixel scale.
        seed: of the start points, in [0, 2**63).
        num_classes: K, as `auto.check` requires.
        search: as `model`, for the gradients and the first look at each iterate: the same network in less precision.
            None: `model`. What it sees broken counts only if `model` agrees; otherwise the example goes on.

    Returns:
        (N, C, H, W) with ||x' - x|| <= epsilon in [0, 1], misclassified by `model`; `x` itself for the other examples.
    """
    if len(x) == 0:
        return x.clone()
    with torch.no_grad():
        outcome = AttackState(model, x, y, norm, epsilon)
        noise, ranking = StartNoise(norm, seed, x), outcome.logits.sort(dim=1).indices
        kind, run, together, number = L1ApgdRun if norm == "l1" else ApgdRun, 0, 1, runs(member, norm, num_classes)
        while run < number and len(at := outcome.unbroken()):
            together = min(together, outcome.runs_at_once(len(at)), number - run)
            # Only the targeted loss reads the target.
            target = [ranking[at, -2 - r] if member == "apgd_t" else y[at] for r in range(run, run + together)]
            start = outcome.layout.rows(noise(together, (len(at), *x.shape[1:])))
            ascent_run = kind(
                outcome, at.repeat(together), torch.cat(target), LOSSES[member], search or model, together
            )
            ascent_run.run(start)
            noise.rewind(ascent_run.valid)
            run += ascent_run.valid
            # A run that breaks an example invalidates those computed with it: they begin again with other noise.
            together = 2 * together if len(outcome.unbroken()) == len(at) else 1
        return outcome.images()


class StartNoise:
    """The random numbers of the package's runs: for all examples of a run at once, on the CPU except for l1."""

    def __init__(self, norm, seed, x):
        self.norm, self.device = norm, x.device
        self.generator = torch.Generator(x.device if norm == "l1" else "cpu").manual_seed(seed)

    def __call__(self, number, shape):
        """Draws the numbers of the next `number` runs on as many examples, one run after the other."""
        noises, self.states = [], []
        for _ in range(number):
            noises.append(self._draw(shape))
            self.states.append(self.generator.get_state())
        return torch.cat(noises)

    def rewind(self, number):
        """Restores the generator to its state after the first `number` of these runs."""
        self.generator.set_state(self.states[number - 1])

    def _draw(self, shape):
        if self.norm == "linf":
            return torch.rand(shape, generator=self.generator).mul_(2).sub_(1).to(self.device)
        noise = torch.randn(shape, generator=self.generator, device=self.generator.device)
        if self.norm == "l1" and self.device.type == "cpu":
            for _ in L1_STAGES:  # the package draws a start for each stage and does not use it
                torch.randn(shape, generator=self.generator)
        return noise.to(self.device)


# --- losses: (logits (n, K), labels (n,), targets (n,)) -> (n,), to be maximised ------------------------------------


def _cross_entropy(logits, labels, targets):
    return F.cross_entropy(logits, labels, reduction="none")


def _dlr(logits, labels, targets):
    """-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))."""
    top, classes = logits.topk(3, dim=1)
    other = torch.where(classes[:, 0] == labels, top[:, 1], top[:, 0])
    return (other - _entries(logits, labels)) / (top[:, 0] - top[:, 2] + TINY)


def _targeted_dlr(logits, labels, targets):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)."""
    top = logits.topk(4, dim=1).values
    difference = _entries(logits, targets) - _entries(logits, labels)
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + TINY)


def _entries(logits, classes):
    return logits.gather(1, classes[:, None])[:, 0]


LOSSES = {"apgd_ce": _cross_entropy, "apgd_dlr": _dlr, "apgd_t": _targeted_dlr}
