"""Who runs the members of AutoAttack: the authors' package, or our own code with the same verdicts in less time."""

import copy
from contextlib import ExitStack
from functools import partial

import torch

from genray.attacks import auto
from genray.attacks.gradient import temporary_mode
from genray.models.attack_copy import AttackCopy


def run_native(model, x, y, *, member, norm, epsilon, seed, num_classes, bf16=False):
    """Attacks a batch with one member of AutoAttack in our own code; `auto.run_member` says the rest.

    Args:
        bf16: APGD and Square search in bfloat16; a break counts once float32 confirms it. FAB is float32 throughout.
    """
    from genray.attacks.native.apgd import apgd
    from genray.attacks.native.fab import fab_t
    from genray.attacks.native.square import square

    auto.check(member, norm, num_classes, x.shape)
    if len(x) == 0:
        return x.clone()
    threat = {"norm": norm, "epsilon": float(epsilon), "seed": seed, "num_classes": num_classes}
    with ExitStack() as state:
        state.enter_context(torch.no_grad())
        state.enter_context(temporary_mode(model, training=False))
        state.enter_context(auto.frozen(model))
        lean, search = _lean(model, torch.float32), None
        if bf16 and member != "fab_t":
            search = _lean(model, torch.bfloat16)
        x = x.contiguous(memory_format=_memory_format(model))
        if member == "fab_t":
            return fab_t(lean, x, y, **threat)
        if member == "square":
            return square(lean, x, y, search=search, **threat)
        return apgd(lean, x, y, member=member, search=search, **threat)


def _lean(model, dtype):
    """A copy that is cheaper to attack; the model itself where it cannot be copied."""
    try:
        return AttackCopy(model, dtype=dtype)
    except (RuntimeError, TypeError, copy.Error):  # tensors that are not leaves, handles to something outside
        return model


def _memory_format(model):
    """What the model's convolutions are laid out in."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    nhwc = kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    return torch.channels_last if nhwc else torch.contiguous_format


ENGINES = {
    "genray": run_native,
    "genray-bf16": partial(run_native, bf16=True),
    "pyautoattack": auto.run_member,
}
DEFAULT_ENGINE = "pyautoattack"
