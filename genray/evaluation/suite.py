"""The attacks a model can be evaluated with, by column name, in the order of the paper's tables (methods D).

Random numbers. Our own attacks draw for each example from the key (seed, attack, example index), so their results do
not change with batches or shards. The members of AutoAttack draw for a whole batch: alone from the key (seed, attack,
index of the batch's first example), in the cascade from (seed, "aa", position of the batch among the survivors). To
reproduce them, attack the same examples together.
"""

import difflib
from dataclasses import dataclass

import torch

from genray.attacks.auto import MEMBERS, runs, targets
from genray.attacks.draws import ExampleDraw
from genray.attacks.gradient import GradientAttack
from genray.attacks.own import OwnAttack, own_attack
from genray.attacks.transfer import TRANSFER, TRANSFER_FROM, is_transfer
from genray.core.determinism import full_precision
from genray.core.rng import key_seed
from genray.core.user_code import is_own
from genray.errors import ConfigError
from genray.evaluation.engines import ENGINES, PASSES, engine_of, lean_copy
from genray.evaluation.robust import correct_flags
from genray.types import NORMS, ThreatModel

OURS = "genray"
ATTACKS = "evaluation attack"  # what errors call a column
OWN = {
    "pgd20": {"num_steps": 20},
    "pgd100": {"num_steps": 100},
    "mim": {"num_steps": 20, "momentum": 1.0},
    "cw": {"num_steps": 20, "loss": "margin"},
}
CASCADE = ("apgd_ce", "apgd_t", "fab_t", "square")
COLUMNS = (*OWN, *MEMBERS, "aa")
BY_GRADIENTS = tuple(name for name in COLUMNS if name not in ("square", "aa"))
GROUPS = {"paper": COLUMNS, "standard": ("aa",), "natural": ()}  # natural accuracy is always there
# MIM is published for linf and l2. `cw` is CW-inf: in another norm the name would mean Carlini and Wagner's l2 attack.
DEFINED = {name: NORMS for name in COLUMNS} | {"mim": ("linf", "l2"), "cw": ("linf",)}
LOSS_WORDS = {"cross_entropy": "cross-entropy", "margin": "margin (confidence 50)"}


@dataclass(frozen=True)
class AttackDescription:
    """The attack of a column.

    Attributes:
        name, norm, epsilon: column and threat model.
        loss: as text.
        num_steps: iterations a run (Square: queries).
        step_size: on the [0, 1] pixel scale; None: adaptive, or there is none.
        restarts: runs on an example that resists, runs with other targets included.
        passes, queries: forward and backward passes, and forward-only passes, on an example that resists.
        notes: differences from what the name says, one line each.
        engine: a key of `ENGINES`.
    """

    name: str
    norm: str
    epsilon: float
    loss: str
    num_steps: int
    step_size: float | None
    restarts: int
    passes: int
    queries: int = 0
    notes: tuple[str, ...] = ()
    engine: str = OURS


def expand_names(names, norm) -> list[str]:
    """Columns of attack and group names, each once and in the paper's order, the user's last; a group has those of the
    norm.

    Raises:
        ConfigError: a name or the norm is unknown, or a column is not defined for the norm.
    """
    if norm not in NORMS:
        raise ConfigError(f"evaluation attacks: expected norm {', '.join(NORMS)}, got {norm!r}")
    wanted = set()
    for name in names:
        if name in GROUPS:
            wanted.update(column for column in GROUPS[name] if norm in DEFINED[column])
        else:
            _check(name, norm)
            wanted.add(name)
    return [column for column in dict.fromkeys((*COLUMNS, *names)) if column in wanted]


@dataclass(frozen=True)
class AttackSettings:
    """Settings of an attack.

    Attributes:
        threat: norm and radius.
        num_classes: K >= 2. Below 3 classes `apgd_dlr`, and below 4 `apgd_t`, is 100 steps of gradient ascent on the
            margin loss instead, and its description says so.
        seed: of the evaluation.
        step_size: of pgd20, pgd100, mim and cw; None: epsilon / 4 in every norm, which for linf 8/255 is the papers'
            2/255. The members of AutoAttack choose their own.
        engine: key of `ENGINES`, for the members of AutoAttack; None: the norm's default.
    """

    threat: ThreatModel
    num_classes: int
    seed: int
    step_size: float | None = None
    engine: str | None = None


def build_evaluation_attack(name: str, settings: AttackSettings):
    """The attack behind a column.

    Args:
        name: one of `COLUMNS`, `package.module:CLASS`, or a transfer column, whose `TransferAttack` was given to
            `user_code`.
        settings: of the attack.

    Returns:
        (attack, description): attack is (model, x (N, C, H, W), y (N,), indices of the N examples in their data set)
        -> (N, C, H, W), and description an `AttackDescription`.

    Raises:
        ConfigError: an unknown name or norm, or an attack that is not defined for the norm.
    """
    _check(name, settings.threat.norm)

    def attack(model, x, y, indices):
        if name == "aa":
            return cascade(model, x, y, indices, settings)[0]
        return _run(name, settings, model, x, y, indices, name, *indices[:1])

    return attack, _describe_cascade(settings) if name == "aa" else _describe(name, settings)


def cascade(model, x, y, indices, settings: AttackSettings):
    """AutoAttack `standard` on one block: each member attacks the examples that resisted all before it.

    All members use one seed, `block_seed(seed, "aa", 0)`, as the authors' own cascade does.

    Args:
        model, x, y, indices, settings: as in `build_evaluation_attack`.

    Returns:
        (adversarial, flags): adversarial (N, C, H, W), `x` itself where nothing succeeded; flags {"natural": (N,)
        bool, "apgd_ce": ..., "apgd_t": ..., "fab_t": ..., "square": ...} on the CPU, True for examples still correct
        after that member and all before it. The result of `aa` is the last.
    """
    adversarial, left = x.clone(), correct_flags(model, x, y)
    flags = {"natural": left.clone()}
    for member in CASCADE:
        at = left.nonzero().flatten()
        some_x, some_y, of = x[at.to(x.device)], y[at.to(x.device)], [int(indices[i]) for i in at]
        found = stage(member, model, some_x, some_y, of, settings, position=0)
        broken = ~correct_flags(model, found, some_y)
        adversarial[at[broken].to(x.device)] = found[broken.to(x.device)]
        left[at[broken]] = False
        flags[member] = left.clone()
    return adversarial, flags


def stage(member, model, x, y, indices, settings: AttackSettings, position: int):
    """Runs one member of the cascade on a batch of the remaining examples.

    Args:
        member: of `CASCADE`.
        model, x, y, indices, settings: as in `build_evaluation_attack`.
        position: of the batch's first example among all that this member attacks.

    Returns:
        (N, C, H, W) adversarial images.
    """
    return _run(member, settings, model, x, y, indices, "aa", position)


def block_seed(seed, attack, first) -> int:
    """Seed of an AutoAttack member for a block of examples, from the `first` one's index in the data set."""
    return key_seed(seed, "attack", attack, int(first))


def _run(name, settings, model, x, y, indices, key, first=None):
    if len(x) == 0:
        return x.clone()
    own = _own_attack(name, settings)
    with full_precision():
        if own is not None:
            draw = ExampleDraw(settings.seed, key, indices)
            if isinstance(own, OwnAttack):
                return own(model, x, y, draw)
            return own(lean_copy(model), x.contiguous(memory_format=torch.channels_last), y, draw)
        how = {"threat": settings.threat, "num_classes": settings.num_classes}
        engine = ENGINES[engine_of(settings.engine, settings.threat.norm)]
        return engine(model, x, y, member=name, seed=block_seed(settings.seed, key, first), **how)


def _own_attack(name, settings):
    """The gradient attack or the user's attack of a column; None if an engine runs the column."""
    norm, epsilon = settings.threat.norm, settings.threat.radius
    step_size = epsilon / 4 if settings.step_size is None else float(settings.step_size)
    if is_own(name) or is_transfer(name):
        return own_attack(name, ATTACKS, {"norm": norm, "epsilon": epsilon, "step_size": step_size})
    if name in OWN:
        return GradientAttack(norm, epsilon, step_size, **OWN[name])
    if settings.num_classes < MEMBERS[name].least_classes:
        return GradientAttack(norm, epsilon, epsilon / 4, num_steps=100, loss="margin")
    return None


def _describe(name, settings):
    norm, epsilon, num_classes = settings.threat.norm, settings.threat.radius, settings.num_classes
    own = _own_attack(name, settings)
    if isinstance(own, OwnAttack):
        steps = getattr(own.inner, "num_steps", 1)
        passes, loss = getattr(own.inner, "num_passes", steps), getattr(own.inner, "loss", "the attack's own")
        step_size = getattr(own.inner, "step_size", None)
        engine = OURS if is_transfer(name) else name
        notes = tuple(f"{name}: {note}" for note in getattr(own.inner, "notes", ()))
        return AttackDescription(
            name, norm, epsilon, str(loss), steps, step_size, 1, passes, notes=notes, engine=engine
        )  # fmt: skip
    if own:
        return AttackDescription(
            name, norm, epsilon, LOSS_WORDS[own.loss], own.num_steps, own.step_size, 1, own.num_passes,
            notes=() if name in OWN else (_replaced(name, num_classes),),
        )  # fmt: skip
    engine, member, notes = engine_of(settings.engine, norm), MEMBERS[name], ()
    if name in ("apgd_t", "fab_t") and targets(name, norm, num_classes) < targets(name, norm, 1000):
        notes = (f"{name}: {targets(name, norm, num_classes)} targets, one less than the classes",)
    number, cost = runs(name, norm, num_classes), PASSES[engine](name, norm, num_classes)
    return AttackDescription(name, norm, epsilon, member.loss, member.num_steps, None, number, *cost, notes, engine)


def _replaced(name, num_classes):
    member = MEMBERS[name]
    return (
        f"{name}: the {member.loss} loss needs {member.least_classes} classes, there are {num_classes}; "
        "100 steps of gradient ascent on the margin loss instead"
    )


def _describe_cascade(settings):
    parts = [_describe(member, settings) for member in CASCADE]
    fields = ("num_steps", "restarts", "passes", "queries")
    total = {field: sum(getattr(part, field) for part in parts) for field in fields}
    notes = tuple(note for part in parts for note in part.notes)
    norm, epsilon = settings.threat.norm, settings.threat.radius
    return AttackDescription(
        "aa", norm, epsilon, "cascade: " + ", ".join(CASCADE), step_size=None, notes=notes,
        engine=engine_of(settings.engine, norm), **total,
    )  # fmt: skip


def _check(name, norm):
    if name == TRANSFER_FROM:
        raise ConfigError(f"evaluation attack {name}: expected a run folder or a model file after =, got nothing")
    if is_own(name) or is_transfer(name):
        return
    if name not in COLUMNS:
        known = (*COLUMNS, *GROUPS, TRANSFER, f"{TRANSFER_FROM}FILE")
        close = difflib.get_close_matches(str(name), known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"evaluation attack: expected one of {', '.join(known)}, got {name!r}{hint}")
    if norm not in DEFINED[name]:
        raise ConfigError(f"evaluation attack {name}: expected norm {' or '.join(DEFINED[name])}, got {norm!r}")
