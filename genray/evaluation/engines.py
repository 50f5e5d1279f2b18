"""The engines of AutoAttack's members: the authors' package, or our own code with the same verdicts in less time."""

import copy
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch

from genray.attacks import auto
from genray.attacks.gradient import temporary_mode
from genray.models.attack_copy import AttackCopy
from genray.types import ThreatModel


def run_package(model, x, y, *, member, threat: ThreatModel, seed, num_classes):
    """Attacks a batch with one member of AutoAttack by the authors' code; arguments as in `auto.run_member`."""
    how = {"norm": threat.norm, "epsilon": threat.radius, "seed": seed, "num_classes": num_classes}
    return auto.run_member(model, x, y, member=member, **how)


def run_native(model, x, y, *, member, threat: ThreatModel, seed, num_classes, bf16=False):
    """As `run_package`, in our own code.

    Args:
        bf16: in linf, APGD and Square search in bfloat16; a break counts once float32 confirms it. In l2 and l1 steps
            are as fine as the rounding and such a search misses breaks (2 of 256 digits in l2), and FAB's ends on the
            boundary itself: they are float32 throughout.
    """
    from genray.attacks.native.apgd import apgd
    from genray.attacks.native.fab import fab_t
    from genray.attacks.native.square import square

    norm = threat.norm
    auto.check(member, norm, num_classes, x.shape)
    if len(x) == 0:
        return x.clone()
    how = {"norm": norm, "epsilon": threat.radius, "seed": seed, "num_classes": num_classes}
    with ExitStack() as state:
        state.enter_context(torch.no_grad())
        state.enter_context(temporary_mode(model, training=False))
        state.enter_context(auto.frozen(model))
        lean, search = lean_copy(model), None
        if bf16 and norm == "linf" and member != "fab_t":
            search = lean_copy(model, torch.bfloat16)
        if lean is not model:
            x = x.contiguous(memory_format=torch.channels_last)
        if member == "fab_t":
            return fab_t(lean, x, y, **how)
        if member == "square":
            return square(lean, x, y, search=search, **how)
        return apgd(lean, x, y, member=member, search=search, **how)


def native_passes(member, norm, num_classes) -> tuple[int, int]:
    """As `auto.passes`, for our own code; each adversarial example costs one more forward pass, which confirms it."""
    number = auto.runs(member, norm, num_classes)
    if member == "square":
        return 0, 5000 + 2  # the clean image and the start
    if member == "fab_t":
        return 100 * number, 100 * number + 1
    # The last iterate of a run, or of each of the three stages in l1, needs no gradient.
    return 100 * number, (3 if norm == "l1" else 1) * number + 1


_KEPT = WeakKeyDictionary()  # model -> {dtype: its copy}


@contextmanager
def copies_kept(model):
    """Within this context `run_native` copies and traces the model once; the model must not change meanwhile."""
    outermost = model not in _KEPT
    _KEPT.setdefault(model, {})
    try:
        yield
    finally:
        if outermost:
            del _KEPT[model]


def lean_copy(model, dtype=torch.float32):
    """A copy that is cheaper to attack, in channels_last; the model itself if it cannot be copied."""
    kept = _KEPT.get(model, {})
    if dtype not in kept:
        try:
            on_cpu = all(tensor.device.type == "cpu" for tensor in model.parameters())
            copied = AttackCopy(model, in_place=True, lean_gradients=on_cpu, dtype=dtype)
            kept[dtype] = copied.to(memory_format=torch.channels_last)
        except (RuntimeError, TypeError, copy.Error):  # tensors that are not leaves, handles to external objects
            kept[dtype] = model
    return kept[dtype]


PACKAGE = "pyautoattack"  # the authors'
ENGINES = {
    "genray": run_native,
    "genray-bf16": partial(run_native, bf16=True),
    PACKAGE: run_package,
}
PASSES = {"genray": native_passes, "genray-bf16": native_passes, PACKAGE: auto.passes}
# Ours where its verdicts are those of the package in less time. In l1 it differs by design (native/ascent.py).
DEFAULT_ENGINES = {"linf": "genray", "l2": "genray", "l1": PACKAGE}


def engine_of(engine, norm) -> str:
    """The engine of a norm: `engine`, or for None the norm's default."""
    return engine or DEFAULT_ENGINES[norm]


def not_by_the_package(protocol, threat) -> str | None:
    """A sentence that names the AutoAttack columns of a threat model not run by the authors' package, or None.

    Old records have one engine for all norms and no `engines`.
    """
    engines = protocol.get("engines", {}).get(threat["norm"], {})
    ran = {a["name"]: engines.get(a["name"], protocol["engine"]) for a in threat["attacks"]}
    found = [name for name, engine in ran.items() if name in (*auto.MEMBERS, "aa") and engine != PACKAGE]
    if not found:
        return None
    others = ", ".join(dict.fromkeys(ran[name] for name in found))
    return f"{', '.join(found)}: run by {others}; published figures are of the authors' code (--engine {PACKAGE})"


def engines_text(engine, norms) -> str:
    """The engines of some norms as text: "genray", or "genray (linf, l2), pyautoattack (l1)"."""
    found = {}
    for norm in norms:
        found.setdefault(engine_of(engine, norm), []).append(norm)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{name} ({', '.join(of)})" for name, of in found.items())
