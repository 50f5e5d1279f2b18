"""IAT, interpolated adversarial training (Lamb et al., arXiv 1906.06784)."""

from genray.objectives.mixup import mixed_cross_entropy, mixup
from genray.objectives.objective import Objective


class Iat(Objective):
    """L = (L_c + L_a) / 2: mixup of the clean batch, and of the adversarial images of the unmixed batch (methods C6).

    Each half draws a weight and a permutation of its own.
    """

    def __call__(self, step):
        adversarial = step.craft("attack")
        clean_loss, _ = self._half(step, step.x)
        adversarial_loss, logits = self._half(step, adversarial)
        return (clean_loss + adversarial_loss) / 2, logits

    def _half(self, step, images):
        mix = mixup(step, self.options.alpha)
        logits = step.model(mix.images(images, step.whole(images)))
        return mixed_cross_entropy(logits, step, mix), logits
