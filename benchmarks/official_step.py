"""The training step of the published Generalist code, restated from its description (not its text), for comparison.

What it spends, in passes of the batch through the network (forward 1, backward to the images 1, to the weights 1):
PGD-10 30 (its attack fills every weight gradient and throws it away), two updates 6, two metric forwards 2: 38 in all.
Noise comes from NumPy on the CPU, averages are kept name by name, and the mixture reads whole state dicts per name.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F

EPSILON, STEP_SIZE, NUM_STEPS = 8 / 255, 2 / 255, 10


def pgd(model, x, y, num_steps=NUM_STEPS):
    """PGD as that code makes it: backward() through to the weights, zero_grad after each step."""
    model.eval()
    noise = np.random.uniform(-EPSILON, EPSILON, tuple(x.shape))
    adversarial = torch.clamp(x.detach() + torch.from_numpy(noise).float().to(x.device), 0.0, 1.0)
    for _ in range(num_steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(adversarial), y)
        model.zero_grad()
        loss.backward()
        adversarial = adversarial.detach() + STEP_SIZE * adversarial.grad.sign()
        adversarial = torch.min(torch.max(adversarial, x - EPSILON), x + EPSILON).clamp(0.0, 1.0)
    return adversarial.detach()


class NamedAverage:
    """An exponential moving average kept tensor by tensor, parameters and buffers alike."""

    def __init__(self, model):
        self.shadow = {name: value.clone().detach() for name, value in model.state_dict().items()}
        self.step = 0

    def update(self, model, decay=0.999):
        self._blend({name: value for name, value in model.state_dict().items()}, decay)

    def update_mixed(self, first, second, gamma, decay=0.999):
        mixed = {
            name: gamma * first.state_dict()[name] + (1 - gamma) * second.state_dict()[name] for name in self.shadow
        }
        self._blend(mixed, decay)

    def _blend(self, values, decay):
        decay = min(decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        for name, value in values.items():
            self.shadow[name] = (decay * self.shadow[name] + (1 - decay) * value).to(value.dtype)

    def apply(self, model):
        model.load_state_dict(self.shadow)


class OfficialStep:
    """One minibatch of the published loop.

    Args:
        network: copied for both learners and their three averages.
        gamma: share of the robust learner in the mixture.
    """

    def __init__(self, network, gamma=0.7):
        self.robust, self.natural = copy.deepcopy(network), copy.deepcopy(network)
        self.teachers = [copy.deepcopy(network) for _ in range(3)]
        self.averages = [NamedAverage(network) for _ in range(3)]
        self.optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            for m in (self.robust, self.natural)
        ]
        self.gamma = gamma

    def __call__(self, x, y):
        adversarial = pgd(self.robust, x, y)
        for model, optimizer, images in zip((self.robust, self.natural), self.optimizers, (adversarial, x)):
            model.train()
            loss = F.cross_entropy(model(images), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        of_robust, of_natural, of_mixture = self.averages
        of_robust.update(self.robust)
        of_natural.update(self.natural)
        for average, teacher in zip(self.averages, self.teachers):
            average.apply(teacher)
        of_mixture.update_mixed(self.teachers[0], self.teachers[1], self.gamma)
        return [float((teacher(x).argmax(1) == y).float().mean()) for teacher in self.teachers[:2]]
