"""Every shipped preset loads and says how to run it; those of a paper hold its constants, written again here."""

import dataclasses
import re
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from genray.config.load import DEFAULT_CONFIG, load_config, read_yaml, to_yaml
from genray.config.objectives import AdversarialObjective, NaturalObjective
from genray.config.schema import SGD, RunConfig
from genray.learners.plan import make_plan
from genray.models import build_model, count_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
SECTIONS = "|".join(field.name for field in dataclasses.fields(RunConfig))
OVERRIDE = re.compile(rf"'((?:{SECTIONS})[\w.]*=[^']+)'|(?<!\S)((?:{SECTIONS})[\w.]*=\S+)")

THIRD, TWO_THIRDS = Fraction(1, 3), Fraction(2, 3)
IN_255, IN_1000 = (Fraction(8, 255), Fraction(2, 255)), (Fraction(31, 1000), Fraction(7, 1000))
FALLS_TO_100TH = ("1", "1", "1/10", "1/100")  # of the first rate, at 0, 1/3, 2/3, 1
FALLS_TO_20TH = ("1", "1", "1/10", "1/20")


@dataclasses.dataclass(frozen=True)
class Published:
    """What a preset must hold. Rates are the first knot and the curve; None where the preset has no such learner."""

    model: tuple = ("resnet18", 11_173_962)
    source: str = "cifar10"
    epochs: int = 120
    seed: int = 0
    schedules_by: str = "step"
    validation: int = 1000
    natural_lr: tuple | None = ("0.1", FALLS_TO_100TH)
    linf_lr: tuple | None = ("0.01", FALLS_TO_100TH)
    linf_decay: float = 0.0035
    attack: tuple = (*IN_255, 10)
    evaluation: tuple = (*IN_255, 20)
    augmentation: tuple = (4, "zeros", True)
    warmup: float = 75
    sync_unit: str = "epoch_end"
    select_on: str = "validation"
    natural_floor: float = 0
    figures: tuple = ()  # natural, PGD-20, AutoAttack as printed in the tables; the header quotes them


GENERALIST_10 = ("89.09", "50.01", "46.07")
PUBLISHED = {
    "cifar10_resnet18_generalist.yaml": Published(figures=GENERALIST_10),
    "cifar10_resnet18_generalist_official.yaml": Published(
        seed=1,
        schedules_by="epoch",
        validation=0,
        natural_lr=("0.01", FALLS_TO_100TH),
        attack=(*IN_1000, 10),
        evaluation=(*IN_1000, 20),
        sync_unit="every_step_of_epoch",
        select_on="test",
        natural_floor=0.88,
        figures=GENERALIST_10,
    ),
    "cifar10_wrn32_10_generalist.yaml": Published(
        model=("wrn_32_10", 46_160_474),
        natural_lr=("0.1", FALLS_TO_20TH),
        linf_lr=("0.1", FALLS_TO_20TH),
        linf_decay=0.0007,
        figures=("91.03", "56.88", "52.91"),
    ),
    "cifar100_resnet18_generalist.yaml": Published(
        model=("resnet18", 11_220_132), source="cifar100", epochs=200, warmup=125, figures=("62.97", "29.48", "23.96")
    ),
    "mnist_resnet18_generalist.yaml": Published(
        model=("resnet18", 11_172_810),
        source="mnist",
        natural_lr=("0.01", FALLS_TO_100TH),
        attack=(Fraction(3, 10), Fraction(1, 100), 40),
        evaluation=(Fraction(3, 10), Fraction(3, 100), 20),
        augmentation=(0, "zeros", False),
        figures=("99.24", "96.14", "92.3"),
    ),
    "svhn_resnet18_generalist.yaml": Published(
        source="svhn", augmentation=(0, "zeros", False), figures=("94.11", "55.29", "45.41")
    ),
    "cifar10_resnet18_nt.yaml": Published(linf_lr=None, sync_unit="never", figures=("93.04", "0.00", "0.00")),
    "cifar10_resnet18_at.yaml": Published(natural_lr=None, sync_unit="never", figures=("84.32", "48.29", "44.37")),
}
GENERALISTS = [name for name in PUBLISHED if name.endswith(("generalist.yaml", "official.yaml"))]
SHAPES = {"cifar10": (10, 3, 32), "cifar100": (100, 3, 32), "svhn": (10, 3, 32), "mnist": (10, 1, 28)}

# What the official code's np.interp over whole epochs gives, 1-based, for 120 epochs.
GAMMA_AT = {1: 1.0, 40: 1.0, 80: 1.0, 90: 0.85, 100: 0.70, 110: 0.55, 120: 0.40}
LR_AT = {1: 0.01, 40: 0.01, 60: 0.0055, 80: 0.001, 100: 0.00055, 120: 0.0001}
WIDE_LR_AT = {1: 0.1, 40: 0.1, 60: 0.055, 80: 0.01, 100: 0.0075, 120: 0.005}


def header(name):
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def overrides_in(line):
    return [quoted or bare for quoted, bare in OVERRIDE.findall(line)]


def launch_line(name):
    """The header's first command that runs this very file; the embedded default also runs without --config."""
    commands = [line for line in header(name) if line.startswith("python -m genray.")]
    embedded = (CONFIGS / name).resolve() == DEFAULT_CONFIG.resolve()
    own = [line for line in commands if f"configs/{name}" in line.split() or (embedded and "--config" not in line)]
    assert own, f"{name}: no command in its header runs it, only {commands}"
    return own[0]


def load(name):
    """The preset as its own launch command loads it: some need a path."""
    return load_config(CONFIGS / name, overrides_in(launch_line(name)))


@cache
def plan_of(name, num_train):
    return make_plan(load(name), num_train)


def left_out(cls, raw):
    """Fields of a section that the YAML leaves to their defaults."""
    return [f.name for f in dataclasses.fields(cls) if f.name not in raw]


def test_all_presets_are_here():
    assert set(PUBLISHED) | {"digits.yaml"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_header_has_purpose_command_and_figures(name):
    lines = header(name)
    assert len(lines[0]) > 20 and lines[0].endswith(".")
    assert launch_line(name)
    assert any(re.search(r"\b(Expected|Published)\b", line) for line in lines)


@pytest.mark.parametrize("name", PRESETS)
def test_header_examples_are_valid_overrides(name):
    launch, examples = overrides_in(launch_line(name)), [line for line in header(name) if overrides_in(line)]
    assert examples, f"{name}: expected an example override in its header"
    for line in examples:
        before = [] if line.startswith("python -m") else launch
        changed = load_config(CONFIGS / name, [*before, *overrides_in(line)])
        assert changed != load(name) or line == launch_line(name)


@pytest.mark.parametrize("name", PRESETS)
def test_loads_and_round_trips(name):
    config = load(name)
    text = to_yaml(config)
    again = load_config(yaml.safe_load(text))
    assert again == config and to_yaml(again) == text


@pytest.mark.parametrize("name", PRESETS)
def test_run_name_is_the_file_name(name):
    assert load(name).name == Path(name).stem


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_quotes_the_published_figures(name):
    text = "\n".join(header(name))
    assert text.count("\nPublished (") == 1
    row = text.split("\nPublished (")[1].split("per cent:\n")[1].split("\n")[0]
    quoted = re.findall(r"(?<!\+- )\b\d+\.\d+", row)  # without the standard deviations
    assert tuple(quoted) == PUBLISHED[name].figures


@pytest.mark.parametrize("name", PUBLISHED)
def test_stands_alone(name):
    """A published constant is in the file itself, so that a changed default cannot change the preset."""
    raw = read_yaml(CONFIGS / name)
    assert {"seed", "data", "model", "training", "base_learners", "global_learner", "evaluation"} <= set(raw)
    assert {"epochs", "batch_size", "drop_last", "schedules_by"} <= set(raw["training"])
    assert {"source", "validation_examples"} <= set(raw["data"])
    for learner in raw["base_learners"].values():
        keys = {"objective", "optimizer", "lr", "augmentation", "averaging"}
        keys |= {"attack"} if learner["objective"]["name"] == "adversarial" else set()
        keys |= {"data_order"} if len(raw["base_learners"]) > 1 else set()
        assert keys <= set(learner)
        kind = {"natural": NaturalObjective, "adversarial": AdversarialObjective}[learner["objective"]["name"]]
        assert left_out(kind, learner["objective"]) == [] and left_out(SGD, learner["optimizer"]) == []
        assert set(learner["averaging"]) == {"enabled", "decay"}
        assert {"crop_padding", "flip"} <= set(learner["augmentation"])
        if "attack" in keys:
            assert set(learner["attack"]) == {"norm", "epsilon", "step_size", "num_steps", "start", "mode"}
    mixing = {"mix", "decay", "sync_unit"}
    mixing |= {"gamma", "warmup_epochs", "sync_every", "batch_norm"} if len(raw["base_learners"]) > 1 else set()
    assert set(raw["global_learner"]) == mixing
    assert set(raw["evaluation"]) == {"attack", "every_epochs", "select_on", "natural_floor"}
    assert set(raw["evaluation"]["attack"]) == {"norm", "epsilon", "step_size", "num_steps"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_run_constants(name):
    config, expected = load(name), PUBLISHED[name]
    assert (config.data.source, config.seed) == (expected.source, expected.seed)
    assert (config.data.train_examples, config.data.validation_examples) == (None, expected.validation)
    assert (config.model.name, config.model.width, config.model.mean) == (expected.model[0], None, None)
    training = config.training
    assert (training.epochs, training.batch_size, training.drop_last) == (expected.epochs, 128, False)
    assert training.schedules_by == expected.schedules_by
    wanted = ["natural"] * (expected.natural_lr is not None) + ["linf"] * (expected.linf_lr is not None)
    assert list(config.base_learners) == wanted


def knots(first, curve):
    return tuple(zip((Fraction(0), THIRD, TWO_THIRDS, Fraction(1)), (Fraction(first) * Fraction(c) for c in curve)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_base_learner_constants(name):
    config, expected = load(name), PUBLISHED[name]
    rates = {"natural": expected.natural_lr, "linf": expected.linf_lr}
    for learner_name, learner in config.base_learners.items():
        decay = {"natural": 0.0005, "linf": expected.linf_decay}[learner_name]
        assert learner.optimizer == SGD(momentum=0.9, nesterov=False, weight_decay=decay)
        assert learner.lr.knots == knots(*rates[learner_name])
        augmentation = learner.augmentation
        assert (augmentation.crop_padding, augmentation.pad_mode, augmentation.flip) == expected.augmentation
        assert (learner.averaging.enabled, learner.averaging.decay) == (True, 0.999)
        assert learner.data_order == "shared"
    if "natural" in config.base_learners:
        assert config.base_learners["natural"].objective == NaturalObjective(label_smoothing=0)
    if "linf" in config.base_learners:
        linf = config.base_learners["linf"]
        assert linf.objective == AdversarialObjective(beta=1, label_smoothing=0)
        attack = linf.attack
        assert (attack.epsilon, attack.step_size, attack.num_steps) == expected.attack
        assert (attack.norm, attack.start, attack.mode) == ("linf", "uniform", "eval")


@pytest.mark.parametrize("name", PUBLISHED)
def test_evaluation_constants(name):
    evaluation, expected = load(name).evaluation, PUBLISHED[name]
    attack = evaluation.attack
    assert (attack.norm, attack.epsilon, attack.step_size, attack.num_steps) == ("linf", *expected.evaluation)
    assert (evaluation.select_on, evaluation.natural_floor) == (expected.select_on, expected.natural_floor)
    assert (evaluation.every_epochs, evaluation.examples) == (1, None)


@pytest.mark.parametrize("name", GENERALISTS)
def test_global_learner_constants(name):
    glob, expected = load(name).global_learner, PUBLISHED[name]
    assert (glob.mix, glob.decay, glob.batch_norm) == ("averaged", 0.999, "mix")
    assert (glob.warmup_epochs, glob.sync_every, glob.sync_unit) == (expected.warmup, 5, expected.sync_unit)
    assert glob.mixing_weights["linf"].knots == knots(1, ("1", "1", "1", "2/5"))
    assert glob.mixing_weights["natural"].knots == knots(1, ("0", "0", "0", "3/5"))


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(GENERALISTS)))
def test_baselines_ship_the_network_itself(name):
    config = load(name)
    (learner,) = config.base_learners
    glob, plan = config.global_learner, plan_of(name, 49_000)
    assert (glob.mix, glob.decay) == ("raw", 0)
    assert glob.sync_unit == PUBLISHED[name].sync_unit and plan.num_redistributions == 0
    assert {plan.mixing_weight(learner, step) for step in range(0, plan.total_steps, 997)} == {1.0}


def test_official_schedules_are_the_codes_in_every_epoch():
    plan = plan_of("cifar10_resnet18_generalist_official.yaml", 50_000)
    assert plan.steps_per_epoch == 391
    for epoch, gamma in GAMMA_AT.items():
        for step in ((epoch - 1) * 391, epoch * 391 - 1):  # constant within an epoch
            assert plan.mixing_weight("linf", step) == pytest.approx(gamma, abs=1e-12)
            assert plan.mixing_weight("natural", step) == pytest.approx(1 - gamma, abs=1e-12)
    for epoch, rate in LR_AT.items():
        for step in ((epoch - 1) * 391, epoch * 391 - 1):
            assert plan.learning_rate("linf", step) == pytest.approx(rate, rel=1e-9)
            assert plan.learning_rate("natural", step) == plan.learning_rate("linf", step)  # overwritten in the code


@pytest.mark.parametrize("name", [name for name in GENERALISTS if not name.endswith("official.yaml")])
def test_schedules_when_an_epoch_is_over(name):
    plan, expected = plan_of(name, 49_000), PUBLISHED[name]
    assert plan.steps_per_epoch == 383
    natural_to_linf = float(Fraction(expected.natural_lr[0]) / Fraction(expected.linf_lr[0]))
    for epoch, gamma in GAMMA_AT.items():  # of 120; the same parts of a longer run
        if epoch > 1:  # a step moves gamma by 2e-5
            assert plan.mixing_weight("linf", step_after(plan, epoch)) == pytest.approx(gamma, abs=1e-4)
    for epoch, rate in (WIDE_LR_AT if "wrn" in name else LR_AT).items():
        if epoch > 1:
            step = step_after(plan, epoch)
            assert plan.learning_rate("linf", step) == pytest.approx(rate, rel=1e-3)
            assert plan.learning_rate("natural", step) == pytest.approx(rate * natural_to_linf, rel=1e-3)


def step_after(plan, epoch):
    """The step that follows `epoch` of 120 parts of the run, or its last one."""
    return min(round(plan.total_steps * epoch / 120), plan.total_steps - 1)


def redistributing_epochs(plan):
    return sorted({window.epoch for window in plan.windows if window.redistribute})


def test_official_hands_theta_g_back_after_every_step_of_ten_epochs():
    plan = plan_of("cifar10_resnet18_generalist_official.yaml", 50_000)
    assert plan.num_redistributions == 10 * 391
    assert redistributing_epochs(plan) == [75, 80, 85, 90, 95, 100, 105, 110, 115, 120]


@pytest.mark.parametrize("name", [name for name in GENERALISTS if not name.endswith("official.yaml")])
def test_others_hand_theta_g_back_at_the_end_of_every_fifth_epoch(name):
    plan = plan_of(name, 49_000)
    epochs = list(range(125, 201, 5)) if PUBLISHED[name].epochs == 200 else list(range(75, 121, 5))
    assert redistributing_epochs(plan) == epochs
    assert plan.num_redistributions == len(epochs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_builds_with_the_published_parameter_count(name):
    classes, channels, side = SHAPES[PUBLISHED[name].source]
    model_name, parameters = PUBLISHED[name].model
    options = dataclasses.asdict(load(name).model)
    model = build_model(**options, num_classes=classes, in_channels=channels, image_size=(side, side), seed=0).eval()
    assert options["name"] == model_name
    assert count_parameters(model) == parameters
    with torch.no_grad():
        assert model(torch.rand(1, channels, side, side)).shape == (1, classes)
