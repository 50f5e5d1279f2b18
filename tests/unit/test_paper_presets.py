"""The papers' presets hold the papers' constants, written again here, and what a family shares is the same in all."""

import dataclasses
import shlex
from fractions import Fraction

import numpy as np
import pytest
from presets import CONFIGS, PAPER, header, load, plan_of

from genray.cli import label, train
from genray.config import load_config
from genray.config.extra import ExtraConfig
from genray.config.objectives import (
    AdversarialObjective,
    EatObjective,
    IatObjective,
    MartObjective,
    MsdObjective,
    NaturalObjective,
    RstObjective,
    TradesObjective,
)
from genray.config.schema import SGD, AttackConfig, AugmentationConfig, AwpConfig
from genray.config.values import Schedule

THIRD, TWO_THIRDS = Fraction(1, 3), Fraction(2, 3)
IN_255, IN_1000 = (Fraction(8, 255), Fraction(2, 255)), (Fraction(31, 1000), Fraction(7, 1000))
MNIST = (Fraction(3, 10), Fraction(1, 100))
FALLS_TO_100TH = ("1", "1", "1/10", "1/100")  # of the first rate, at 0, 1/3, 2/3, 1
FALLS_TO_20TH = ("1", "1", "1/10", "1/20")


@dataclasses.dataclass(frozen=True)
class Published:
    """What a family's Generalist must hold. Rates are the first knot and the curve."""

    model: str = "resnet18"
    source: str = "cifar10"
    epochs: int = 120
    seed: int = 0
    schedules_by: str = "step"
    validation: int = 1000
    natural_lr: tuple = ("0.1", FALLS_TO_100TH)
    linf_lr: tuple = ("0.01", FALLS_TO_100TH)
    linf_decay: float = 0.0035
    attack: tuple = (*IN_255, 10)
    evaluation: tuple = (*IN_255, 20)
    augmentation: tuple = (4, "zeros", True)
    warmup: float = 75
    sync_unit: str = "epoch_end"
    select_on: str = "validation"
    natural_floor: float = 0


WIDE = {"natural_lr": ("0.1", FALLS_TO_20TH), "linf_lr": ("0.1", FALLS_TO_20TH), "linf_decay": 0.0007}
HUNDRED = {"source": "cifar100", "epochs": 200, "warmup": 125}
FAMILIES = {
    "cifar10_resnet18": Published(),
    "cifar10_wrn32_10": Published(model="wrn_32_10", **WIDE),
    "cifar100_resnet18": Published(model="resnet18", **HUNDRED),
    "cifar100_wrn32_10": Published(model="wrn_32_10", **WIDE, **HUNDRED),
    "mnist_resnet18": Published(
        model="resnet18",
        source="mnist",
        natural_lr=("0.01", FALLS_TO_100TH),
        attack=(*MNIST, 40),
        evaluation=(Fraction(3, 10), Fraction(3, 100), 20),
        augmentation=(0, "zeros", False),
    ),
    "svhn_resnet18": Published(source="svhn", augmentation=(0, "zeros", False)),
}
OFFICIAL = "paper/cifar10_resnet18_generalist_official.yaml"
GENERALISTS = {f"paper/{family}_generalist.yaml": published for family, published in FAMILIES.items()} | {
    OFFICIAL: Published(
        seed=1,
        schedules_by="epoch",
        validation=0,
        natural_lr=("0.01", FALLS_TO_100TH),
        attack=(*IN_1000, 10),
        evaluation=(*IN_1000, 20),
        sync_unit="every_step_of_epoch",
        select_on="test",
        natural_floor=0.88,
    )
}
OURS = [name for name in GENERALISTS if name != OFFICIAL]
# What the official code's np.interp over whole epochs gives, 1-based, for 120 epochs.
GAMMA_AT = {1: 1.0, 40: 1.0, 80: 1.0, 90: 0.85, 100: 0.70, 110: 0.55, 120: 0.40}
LR_AT = {1: 0.01, 40: 0.01, 60: 0.0055, 80: 0.001, 100: 0.00055, 120: 0.0001}


def attack(norm, epsilon, step_size, num_steps, start="uniform", **besides):
    numbers = {"epsilon": Fraction(epsilon), "step_size": Fraction(step_size)}
    return AttackConfig(norm=norm, num_steps=num_steps, start=start, **numbers, **besides)


def knots(first, curve):
    return tuple(zip((Fraction(0), THIRD, TWO_THIRDS, Fraction(1)), (Fraction(first) * Fraction(c) for c in curve)))


@pytest.mark.parametrize("name", GENERALISTS)
def test_constants(name):
    config, expected = load(name), GENERALISTS[name]
    assert (config.data.source, config.seed) == (expected.source, expected.seed)
    assert (config.data.train_examples, config.data.validation_examples) == (None, expected.validation)
    assert (config.model.name, config.model.width, config.model.mean) == (expected.model, None, None)
    training = config.training
    assert (training.epochs, training.batch_size, training.drop_last) == (expected.epochs, 128, False)
    assert training.schedules_by == expected.schedules_by
    assert list(config.base_learners) == ["natural", "linf"]
    natural, linf = config.base_learners["natural"], config.base_learners["linf"]
    assert natural.objective == NaturalObjective(label_smoothing=0, mixup=0)
    assert linf.objective == AdversarialObjective(beta=1, label_smoothing=0)
    assert natural.lr.knots == knots(*expected.natural_lr) and linf.lr.knots == knots(*expected.linf_lr)
    assert natural.optimizer == SGD(momentum=0.9, nesterov=False, weight_decay=0.0005)
    assert linf.optimizer == SGD(momentum=0.9, nesterov=False, weight_decay=expected.linf_decay)
    padding, pad_mode, flip = expected.augmentation
    for learner in (natural, linf):
        assert learner.augmentation == AugmentationConfig(crop_padding=padding, pad_mode=pad_mode, flip=flip)
        assert (learner.averaging.enabled, learner.averaging.decay) == (True, 0.999)
        assert (learner.data_order, learner.awp) == ("shared", None)
    epsilon, step_size, num_steps = expected.attack
    assert linf.attack == attack("linf", epsilon, step_size, num_steps)
    evaluation = config.evaluation
    judged = evaluation.attack
    assert (judged.norm, judged.epsilon, judged.step_size, judged.num_steps) == ("linf", *expected.evaluation)
    assert (evaluation.select_on, evaluation.natural_floor) == (expected.select_on, expected.natural_floor)
    assert (evaluation.every_epochs, evaluation.examples) == (1, None)
    glob = config.global_learner
    assert (glob.mix, glob.decay, glob.batch_norm) == ("averaged", 0.999, "mix")
    assert (glob.warmup_epochs, glob.sync_every, glob.sync_unit) == (expected.warmup, 5, expected.sync_unit)
    assert glob.mixing_weights["linf"].knots == knots(1, ("1", "1", "1", "2/5"))
    assert glob.mixing_weights["natural"].knots == knots(1, ("0", "0", "0", "3/5"))


# --- Baselines: Generalist's learner alone ------------------------------------------------------------------------

TAU = Schedule.parse([[0, 0], ["5/12", 0], ["5/12", 1], ["3/4", 1], ["3/4", 2]])
GAUSSIAN = {"start": "gaussian"}
FRIENDLY = {"tau": TAU, "step_noise": 0.001}
# End of the name -> objective, what its attack has besides.
BASELINES = {
    "nt": (NaturalObjective(label_smoothing=0, mixup=0), {}),
    "at": (AdversarialObjective(beta=1, label_smoothing=0), {}),
    "at_half": (AdversarialObjective(beta=0.5, label_smoothing=0), {}),
    "trades_6": (TradesObjective(beta=6, label_smoothing=0), GAUSSIAN),
    "trades_1": (TradesObjective(beta=1, label_smoothing=0), GAUSSIAN),
    "trades": (TradesObjective(beta=6, label_smoothing=0), GAUSSIAN),
    "fat": (AdversarialObjective(beta=1, label_smoothing=0), FRIENDLY),
    "iat": (IatObjective(alpha=1), {}),
    "rst": (RstObjective(beta=0.5, natural_weight=0.9, robust_weight=0.5), {}),
}
FAMILY_OF = {
    f"paper/{family}_{method}.yaml": (family, method)
    for family in FAMILIES
    for method in BASELINES
    if f"paper/{family}_{method}.yaml" in PAPER
}


def test_the_baselines_are_all_of_the_tables():
    assert len(FAMILY_OF) == 3 * 8 + 2 * 2


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_baseline_is_generalists_learner_alone(name):
    """Nothing else differs in a family, so its rows can be compared; FAT alone has its own optimiser and rates."""
    family, method = FAMILY_OF[name]
    config, generalist = load(name), load(f"paper/{family}_generalist.yaml")
    (learner_name, learner), (objective, besides) = *config.base_learners.items(), BASELINES[method]
    if (family, method) == ("mnist_resnet18", "trades"):
        objective = TradesObjective(beta=1, label_smoothing=0)  # TRADES's own for MNIST
    model = generalist.base_learners["linf" if objective.attacks == "one" else "natural"]
    changes = {"attack": model.attack.replace(**besides)} if besides else {}
    if method == "fat":
        changes |= {"lr": learner.lr, "optimizer": SGD(momentum=0.9, nesterov=False, weight_decay=0.0002)}
    assert learner == model.replace(objective=objective, **changes)
    assert learner_name == ("linf" if objective.attacks == "one" else "natural")
    glob = config.global_learner
    assert (glob.mix, glob.decay, glob.sync_unit) == ("raw", 0, "never")
    same = {"base_learners": generalist.base_learners, "global_learner": generalist.global_learner}
    same["data"] = config.data.replace(train_examples=None, extra=None) if method == "rst" else config.data
    assert config.replace(name=generalist.name, **same) == generalist


@pytest.mark.parametrize("name", [name for name in FAMILY_OF if name.endswith("rst.yaml")])
def test_rsts_teacher_is_natural_training(name, monkeypatch):
    """On the half that has labels; the header's commands make the file that the run reads."""
    monkeypatch.chdir(CONFIGS.parent)
    lines = [shlex.split(line)[3:] for line in header(name) if line.startswith("python -m genray.")]
    taught, said = train.parse_args(lines[0]), label.parse_args(lines[1])
    teacher, run = load_config(taught.config, taught.overrides), load(name)
    assert taught.config.endswith(name.replace("rst", "nt"))
    assert teacher.data == run.data.replace(extra=None) and run.data.train_examples == 25_000
    assert (said.model, said.output, said.data) == (f"runs/{taught.name}", run.data.extra.path, None)
    assert run.data.extra == ExtraConfig(source="npz", path=f"runs/{taught.name}/rest.npz")


@pytest.mark.parametrize("name", [name for name in PAPER if len(load(name).base_learners) == 1])
def test_one_learner_ships_the_network_itself(name):
    plan = plan_of(name)
    ((learner, section),) = plan.config.base_learners.items()
    glob = plan.config.global_learner
    assert section.data_order == "shared" and plan.num_redistributions == 0
    assert (glob.mix, glob.decay) == ("raw", 0.999 if name.endswith("seat.yaml") else 0)
    assert {plan.mixing_weight(learner, step) for step in range(0, plan.total_steps, 997)} == {1.0}


# --- Generalist's schedules ---------------------------------------------------------------------------------------


def test_official_schedules_are_the_codes_in_every_epoch():
    plan = plan_of(OFFICIAL, 50_000)
    assert plan.steps_per_epoch == 391
    for epoch, gamma in GAMMA_AT.items():
        for step in ((epoch - 1) * 391, epoch * 391 - 1):  # constant within an epoch
            assert plan.mixing_weight("linf", step) == pytest.approx(gamma, abs=1e-12)
            assert plan.mixing_weight("natural", step) == pytest.approx(1 - gamma, abs=1e-12)
    for epoch, rate in LR_AT.items():
        for step in ((epoch - 1) * 391, epoch * 391 - 1):
            assert plan.learning_rate("linf", step) == pytest.approx(rate, rel=1e-9)
            assert plan.learning_rate("natural", step) == plan.learning_rate("linf", step)  # overwritten in the code


def step_after(plan, epoch):
    """The step that follows `epoch` of 120 parts of the run, or its last one."""
    return min(round(plan.total_steps * epoch / 120), plan.total_steps - 1)


def redistributing_epochs(plan):
    return sorted({window.epoch for window in plan.windows if window.redistribute})


def test_official_hands_theta_g_back_after_every_step_of_ten_epochs():
    plan = plan_of(OFFICIAL, 50_000)
    assert plan.num_redistributions == 10 * 391
    assert redistributing_epochs(plan) == [75, 80, 85, 90, 95, 100, 105, 110, 115, 120]


@pytest.mark.parametrize("name", OURS)
def test_others_hand_theta_g_back_at_the_end_of_every_fifth_epoch(name):
    plan = plan_of(name)
    epochs = list(range(125, 201, 5)) if GENERALISTS[name].epochs == 200 else list(range(75, 121, 5))
    assert redistributing_epochs(plan) == epochs
    assert plan.num_redistributions == len(epochs)


# --- Generalist++ -------------------------------------------------------------------------------------------------

BALLS = {"l2": attack("l2", "128/255", "15/255", 10), "l1": attack("l1", 12, 3, 10, sparsity=0.05)}
LAST_WEIGHTS = {
    "d_norm": {"linf": 0.5, "l2": 0.5},
    "t": {"natural": 0.4, "linf": 0.3, "l2": 0.3},
    "q": {"natural": 0.4, "linf": 0.2, "l2": 0.2, "l1": 0.2},
}


@pytest.mark.parametrize("name", [name for name in PAPER if "generalistpp" in name])
def test_generalistpp_is_generalist_with_other_norms(name):
    """Our definition: Linf alone up to two thirds, then linearly to the last weights; all else as Generalist."""
    family, variant = name.removeprefix("paper/").removesuffix(".yaml").split("_generalistpp_")
    config, generalist = load(name), load(f"paper/{family}_generalist.yaml")
    last = LAST_WEIGHTS[variant]
    assert list(config.base_learners) == list(last)
    for learner_name, learner in config.base_learners.items():
        own = {"attack": BALLS[learner_name]} if learner_name in BALLS else {}
        assert learner == generalist.base_learners["linf" if own else learner_name].replace(**own)
    plan = plan_of(name)
    for learner_name, weight in last.items():
        first = 1.0 if learner_name == "linf" else 0.0
        for part, expected in ((0, first), (79, first), (80, first), (100, (first + weight) / 2), (120, weight)):
            got = plan.mixing_weight(learner_name, step_after(plan, part))
            assert got == pytest.approx(expected, abs=1e-4)
    glob = generalist.global_learner.replace(mixing_weights=config.global_learner.mixing_weights)
    assert config.global_learner == glob
    same = {"base_learners": generalist.base_learners, "global_learner": generalist.global_learner}
    assert config.replace(name=generalist.name, **same) == generalist


# --- Recipes of their own -----------------------------------------------------------------------------------------


def falls(first, *drops):
    """A rate that is `first` and from epoch n (1-based) on another one, as the papers' codes write it."""
    return lambda epoch: next((rate for at, rate in reversed(drops) if epoch >= at), first)


def interpolated(*points):
    return lambda epoch: float(np.interp(epoch, *zip(*points)))


RATES = {
    "cifar10_resnet18_fat": falls(0.1, (60, 0.01), (90, 0.001), (110, 0.0005)),
    "cifar10_resnet18_mart": falls(0.01, (75, 0.001), (90, 0.0001), (100, 0.00001)),
    "cifar10_wrn34_10_trades_awp": falls(0.1, (100, 0.01), (150, 0.001)),
    "cifar10_preact_resnet18_at_awp": falls(0.1, (101, 0.01), (151, 0.001)),
    "cifar10_preact_resnet18_e_at": falls(0.05, (41, 0.005), (61, 0.0005)),
    "cifar10_resnet18_seat": interpolated((0, 0.01), (40, 0.01), (80, 0.001), (120, 0.0001)),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_are_the_authors_in_every_epoch(name):
    plan = plan_of(f"paper/{name}.yaml")
    (learner,) = plan.config.base_learners
    for epoch in range(1, plan.config.training.epochs + 1):
        for step in ((epoch - 1) * 383, epoch * 383 - 1):
            assert plan.learning_rate(learner, step) == pytest.approx(RATES[name](epoch), rel=1e-9)


RAMPS = {
    "cifar10_preact_resnet18_": interpolated((0, 0), (20, 0.1), (40, 0.005), (50, 0)),
    "mnist_small_cnn_": interpolated((0, 0), (3, 0.05), (10, 0.001), (20, 0.0001)),
    "cifar10_wrn28_10_sat": interpolated((0, 0), (12, 0.21), (30, 0)),
}


@pytest.mark.parametrize(
    "name", [n for n in PAPER for ramp in RAMPS if ramp in n and not n.endswith(("awp.yaml", "e_at.yaml"))]
)
def test_ramps_are_the_authors_at_every_part_of_an_epoch(name):
    plan, rate = plan_of(name, 50_000), next(rate for ramp, rate in RAMPS.items() if ramp in name)
    (learner,) = plan.config.base_learners
    for step in range(0, plan.total_steps, 61):
        assert plan.learning_rate(learner, step) == pytest.approx(
            rate(step / plan.steps_per_epoch), rel=1e-6, abs=1e-12
        )


@pytest.mark.parametrize("name", [name for name in FAMILY_OF if name.endswith("fat.yaml")])
def test_tau_is_fats_in_every_epoch(name):
    plan = plan_of(name)
    for part in range(120):
        expected = 0 if part + 1 <= 50 else 1 if part + 1 <= 90 else 2
        epochs = plan.config.training.epochs
        first = -(-part * epochs * 383 // 120)
        last = -(-(part + 1) * epochs * 383 // 120) - 1
        assert [plan.tau("linf", step) for step in (first, last)] == [expected] * 2


SGD_5E4 = SGD(momentum=0.9, nesterov=False, weight_decay=5e-4)
RECIPES = {
    "cifar10_resnet18_mart": (120, 128, MartObjective(beta=5), SGD(momentum=0.9, weight_decay=0.0035), None),
    "cifar10_resnet18_seat": (120, 128, AdversarialObjective(beta=1), SGD(momentum=0.9, weight_decay=0.0035), None),
    "cifar10_preact_resnet18_at_awp": (200, 128, AdversarialObjective(beta=1), SGD_5E4, AwpConfig(gamma=0.01)),
    "cifar10_wrn34_10_trades_awp": (
        200,
        128,
        TradesObjective(beta=6),
        SGD_5E4,
        AwpConfig(gamma=0.005, warmup_epochs=9),
    ),
}
RECIPE_ATTACKS = {
    "cifar10_resnet18_mart": attack("linf", "0.031", "0.007", 10, start="gaussian"),
    "cifar10_resnet18_seat": attack("linf", "0.031", "0.007", 10),
    "cifar10_preact_resnet18_at_awp": attack("linf", "8/255", "2/255", 10, mode="train"),
    "cifar10_wrn34_10_trades_awp": attack("linf", "8/255", "2/255", 10, start="gaussian"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_own_recipes_hold_their_authors_constants(name):
    config = load(f"paper/{name}.yaml")
    (learner,) = config.base_learners.values()
    got = (config.training.epochs, config.training.batch_size, learner.objective, learner.optimizer, learner.awp)
    assert got == RECIPES[name]
    assert learner.attack == RECIPE_ATTACKS[name]
    padding = "reflect" if name.endswith("at_awp") else "zeros"
    assert learner.augmentation == AugmentationConfig(crop_padding=4, pad_mode=padding, flip=True)


CIFAR = {"start": "zero", "mode": "train"}
ONE_PIXEL_STEP = 20 * Fraction(1, 20)  # 0.05 * 20 / k on each of k pixels: L1 norm 1
SEVERAL_NORMS = {
    "cifar10_preact_resnet18": {
        "linf": attack("linf", "0.03", "0.003", 40, **CIFAR),
        "l2": attack("l2", "0.3", "0.05", 40, **CIFAR),
        "l1": attack("l1", 12, ONE_PIXEL_STEP, 40, sparsity=0.004, **CIFAR),
    },
    "mnist_small_cnn": {
        "linf": attack("linf", "0.3", "0.01", 100, start="zero"),
        "l2": attack("l2", "1.5", "0.1", 100, start="zero"),
        "l1": attack("l1", 12, ONE_PIXEL_STEP, 50, sparsity=0.016, start="zero"),
    },
}


@pytest.mark.parametrize("family", SEVERAL_NORMS)
def test_msd_papers_attacks(family):
    balls = SEVERAL_NORMS[family]
    for end, norm in (("p_inf", "linf"), ("p_2", "l2"), ("p_1", "l1")):
        (learner,) = load(f"paper/{family}_{end}.yaml").base_learners.values()
        assert (learner.objective, learner.attack) == (AdversarialObjective(beta=1), balls[norm])
    assert load(f"paper/{family}_avg.yaml").base_learners["robust"].attacks == balls
    if family == "mnist_small_cnn":  # its "worst" has steps of its own
        shorter = {"num_steps": 100, "step_size": 20 * Fraction(1, 50)}
        balls = balls | {"linf": balls["linf"].replace(num_steps=50), "l1": balls["l1"].replace(**shorter)}
    assert load(f"paper/{family}_max.yaml").base_learners["robust"].attacks == balls


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("cifar10_preact_resnet18", {"num_steps": 50, "linf": "0.005", "l2": "0.05", "l1": 1}),
        ("mnist_small_cnn", {"num_steps": 100, "linf": "0.01", "l2": "0.1", "l1": 1}),
    ],
)
def test_msd_takes_its_authors_steps(name, numbers):
    (learner,) = load(f"paper/{name}_msd.yaml").base_learners.values()
    assert learner.objective == MsdObjective(l1_pixels=(5, 20))
    balls = SEVERAL_NORMS[name]
    assert learner.attacks == {
        norm: balls[norm].replace(step_size=Fraction(numbers[norm]), num_steps=numbers["num_steps"], sparsity=None)
        for norm in ("linf", "l2", "l1")
    }


@pytest.mark.parametrize("family", SEVERAL_NORMS)
def test_msd_papers_rows_differ_in_loss_and_attack_only(family):
    names = [f"paper/{family}_{row}.yaml" for row in ("p_inf", "p_2", "p_1", "max", "avg", "msd")]
    stripped = set()
    for name in names:
        config = load(name)
        (learner,) = config.base_learners.values()
        rest = (learner.optimizer, learner.lr, learner.augmentation, learner.averaging, learner.awp)
        same = (config.seed, config.data, config.model, config.training, config.evaluation)
        stripped.add(repr((rest, same, config.global_learner.mix, config.global_learner.decay)))
    assert len(stripped) == 1


def test_sat_holds_its_authors_attacks():
    (learner,) = load("paper/cifar10_wrn28_10_sat.yaml").base_learners.values()
    assert learner.attacks == {
        "linf": attack("linf", "8/255", "1/255", 10, mode="train"),
        "l2": attack("l2", "128/255", "30/255", 10, mode="train"),
        "l1": attack("l1", "2000/255", 1, 20, mode="train", sparsity=0.01),
    }


def test_e_at_holds_its_authors_attacks():
    (learner,) = load("paper/cifar10_preact_resnet18_e_at.yaml").base_learners.values()
    assert (learner.objective, learner.optimizer) == (EatObjective(), SGD_5E4)
    adaptive = {"algorithm": "apgd", "num_steps": 10, "start": "zero", "mode": "eval"}
    assert learner.attacks == {
        "linf": AttackConfig(norm="linf", epsilon=Fraction(8, 255), **adaptive),
        "l1": AttackConfig(norm="l1", epsilon=Fraction(12), sparsity=0.05, **adaptive),
    }
