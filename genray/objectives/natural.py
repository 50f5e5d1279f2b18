"""Natural training (NT): cross-entropy on clean images."""

from genray.objectives.mixup import mixed_cross_entropy, mixup
from genray.objectives.objective import Objective


class Natural(Objective):
    """L = CE(z(x), y), with label smoothing and mixup where asked."""

    def __call__(self, step):
        smoothing = self.options.label_smoothing
        if self.options.mixup:
            mix = mixup(step, self.options.mixup)
            logits = step.model(mix.images(step.x, step.whole(step.x)))
            return mixed_cross_entropy(logits, step, mix, smoothing), logits
        logits = step.model(step.x)
        return step.cross_entropy(logits, smoothing), logits
