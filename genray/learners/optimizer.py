"""A base learner's optimiser: one of torch's on the flat parameter, with clipping and selective weight decay."""

import torch

from genray.core.flat import FlatWeights, from_array, to_array


class FlatOptimizer:
    """Updates the one flat parameter of a network.

    Args:
        options: the learner's `optimizer` section.
        flat: its `FlatWeights`.
    """

    def __init__(self, options, flat: FlatWeights):
        self.parameter, self.layout, self.clip_norm = flat.parameter, flat.trained_layout, options.clip_norm
        self.weight_decay, self.decoupled = options.weight_decay, options.name == "adamw"
        self.decayed = None if options.decay_norms_and_biases else _of_matrices(flat)
        # Where only some parameters decay, torch's optimiser, which has one, decays nothing.
        self.optimizer = _build(options, self.parameter, 0.0 if self.decayed is not None else self.weight_decay)

    @torch.no_grad()
    def step(self, rate: float):
        """One update at this learning rate with the gradient that the parameter has."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.parameter], self.clip_norm)
        if self.decayed is not None and self.decoupled:
            self.parameter.mul_(torch.where(self.decayed, 1 - rate * self.weight_decay, 1.0))
        elif self.decayed is not None:
            self.parameter.grad.add_(torch.where(self.decayed, self.parameter, 0.0), alpha=self.weight_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def state_dict(self) -> dict:
        """As NumPy arrays, without padding, and numbers."""
        state = self.optimizer.state_dict()["state"].get(0, {})
        return {key: self._stored(value) for key, value in state.items() if value is not None}

    def _stored(self, value):
        if not torch.is_tensor(value):
            return value
        return to_array(self.layout.pack(value), copy=False) if value.dim() else to_array(value)

    def load_state_dict(self, stored: dict):
        fresh, state = self.optimizer.state_dict(), {}
        if stored:
            state = {0: {key: self._live(value) for key, value in stored.items()}}
        self.optimizer.load_state_dict({**fresh, "state": state})

    def _live(self, value):
        if not getattr(value, "shape", ()):  # a number
            return from_array(value.copy()) if hasattr(value, "shape") else value
        flat = torch.zeros_like(self.parameter.data)
        self.layout.unpack_(flat, from_array(value))
        return flat


def _build(options, parameter, weight_decay):
    common = {"lr": 0.0, "weight_decay": weight_decay}
    if options.name == "sgd":
        # Fused: one pass over the flat weights, with no temporary array of their size. (Fused Adam rounds otherwise.)
        return torch.optim.SGD([parameter], momentum=options.momentum, nesterov=options.nesterov, fused=True, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.name]
    return kind([parameter], betas=(options.beta1, options.beta2), **common)


def _of_matrices(flat):
    """Bool, as `flat.parameter`: true in weights of two dimensions or more, false in those of norms and in biases."""
    found = torch.zeros_like(flat.parameter, dtype=torch.bool)
    trained = [p for p in flat.module.parameters() if p.requires_grad]
    for p, part in zip(trained, flat.trained_layout.parts(found), strict=True):
        part.fill_(p.dim() > 1)
    return found
