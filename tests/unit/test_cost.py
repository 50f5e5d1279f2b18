"""The cost model against passes that are counted in the last layer of the network and of its copies."""

import json
from dataclasses import replace

import pytest
import torch
from presets import PRESETS, load
from torch import nn

import genray
from genray.config import load_config
from genray.config.model import Section
from genray.data.splits import Split
from genray.learners.base_learner import BaseLearner
from genray.recording import dry_run
from genray.run.cost import Passes, run_cost, step_passes, table_in_steps
from genray.run.plan import make_plan
from genray.run.probe import PassSeconds, StepProbe, with_random_images
from genray.run.setup import RunSetup

L = "base_learners.linf"
ALONE = ["base_learners.natural=null", "global_learner.gamma=null"]
JUDGED = "evaluation.attack={norm: linf, epsilon: 0.2, step_size: 0.05, num_steps: 2}"
RUN = ["training.batch_size=16", "model.width=2", "model.batch_norm=true", f"{L}.attack.num_steps=2", JUDGED]
BATCH, IMAGES = 16, 50


@pytest.fixture
def counted():
    """Images that go forward and backward through the last layer of any network or copy of it."""
    counts = {"forward": 0, "backward": 0}

    def count(module, inputs, output):
        if isinstance(module, nn.Linear) and module.out_features == 10:
            counts["forward"] += len(output)
            if output.requires_grad:
                output.register_hook(lambda g: counts.update(backward=counts["backward"] + len(g)))

    hook = nn.modules.module.register_module_forward_hook(count)
    yield counts
    hook.remove()


def of(passes: Passes) -> dict:
    both = passes.training + passes.attack
    return {"forward": both + passes.forward, "backward": both}


def setup_of(overrides, learner: Section | None = None) -> RunSetup:
    config = load_config(None, [*RUN, *ALONE, *overrides])
    if learner is not None:
        config = config.replace(base_learners={"linf": learner})
    images = torch.randint(256, (IMAGES, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(IMAGES) % 10)
    parts = dict.fromkeys(("train", "validation", "test"), split)
    return RunSetup(make_plan(config, IMAGES), parts, tuple("0123456789"))


def take(setup, steps):
    BaseLearner(
        "linf", setup.plan, setup.build_network(), setup.splits["train"], target=setup.target_network("linf")
    ).run_window(0, steps)


def several(objective, *steps, algorithm="pgd"):
    radii, size = {"linf": 0.2, "l2": 1, "l1": 2}, ", step_size: 0.1" if algorithm == "pgd" else ""
    attacks = ", ".join(
        f"{norm}: {{norm: {norm}, epsilon: {radius}, algorithm: {algorithm}, num_steps: {number}{size}}}"
        for (norm, radius), number in zip(radii.items(), steps)
    )
    return [f"{L}.attack=null", f"{L}.objective={objective}", f"{L}.attacks={{{attacks}}}"]


def shortened(learner):
    """Two steps an attack."""
    if learner.attacks:
        return learner.replace(attacks={key: attack.replace(num_steps=2) for key, attack in learner.attacks.items()})
    return learner.replace(attack=learner.attack.replace(num_steps=2)) if learner.attack else learner


def distinct_learners():
    """Of all presets, one of those that differ in nothing that the number of passes may depend on."""
    found = {}
    for name in PRESETS:
        for learner in map(shortened, load(name).base_learners.values()):
            how = {
                key: (a.algorithm, a.mode, a.tau is None, bool(a.radius_clip)) for key, a in learner.all_attacks.items()
            }
            objective = learner.objective.model_dump(mode="json")
            found.setdefault(json.dumps([objective, how, bool(learner.awp)]), (name, learner))
    return list(found.values())


def test_a_step_of_every_method_in_the_presets(counted):
    found = distinct_learners()
    methods = {learner.objective.name for _, learner in found}
    assert methods >= {"natural", "adversarial", "trades", "mart", "iat", "rst", "max", "avg", "msd", "sat", "e_at"}
    assert any(learner.awp for _, learner in found) and any(
        learner.attack and learner.attack.tau for _, learner in found
    )
    for name, learner in found:
        take(with_random_images(setup_of([], learner)), 1)
        assert counted == {kind: BATCH * n for kind, n in of(step_passes(learner)).items()}, (name, learner.objective)
        counted.update(forward=0, backward=0)


OTHERS = {
    "mixup": [f"{L}.attack=null", f"{L}.objective={{name: natural, mixup: 1}}"],
    "PGD-AT with beta = 0": [f"{L}.objective.beta=0"],
    "anchor": [f"{L}.objective={{name: anchor, target: {{model: x}}}}"],
    "anchor with CE alone": [f"{L}.objective={{name: anchor, target: {{model: x}}, cross_entropy: 1}}"],
    "TRADES with beta = 0": [f"{L}.objective={{name: trades, beta: 0}}"],
    "RST with beta = 0": [f"{L}.objective={{name: rst, beta: 0}}", "data.extra={source: npz, path: x}"],
    "MART with beta = 0 and AWP": [f"{L}.objective={{name: mart, beta: 0}}", f"{L}.awp.gamma=0.01"],
    "APGD": [f"{L}.attack={{algorithm: apgd, norm: linf, epsilon: 0.2, num_steps: 3}}"],
    "radius per example": [f"{L}.attack.radius_clip=[0.5, 1.5]"],
    "MAX of one norm": several("max", 3),
    "MAX of APGD and AWP": [*several("max", 2, 3, algorithm="apgd"), f"{L}.awp.gamma=0.01"],
    "AVG with unequal attacks": several("avg", 1, 2, 4),
}


@pytest.mark.parametrize("method", OTHERS)
def test_a_step_of_other_settings(counted, method):
    setup = with_random_images(setup_of(OTHERS[method]))
    take(setup, 1)
    assert counted == {kind: BATCH * n for kind, n in of(step_passes(setup.config.base_learners["linf"])).items()}


@pytest.mark.parametrize(("objective", "algorithm"), [("sat", "pgd"), ("e_at", "apgd")])
def test_one_norm_a_step_costs_their_mean(objective, algorithm):
    """The step that draws a norm costs what a learner with that norm alone does."""
    steps = (1, 2, 6)
    alone = [setup_of(several(objective, n, algorithm=algorithm)).config.base_learners["linf"] for n in steps]
    mixed = setup_of(several(objective, *steps, algorithm=algorithm)).config.base_learners["linf"]
    assert step_passes(mixed).units == pytest.approx(sum(step_passes(learner).units for learner in alone) / 3)


@pytest.mark.parametrize("drop_last", ["true", "false"])
def test_training_of_a_whole_run(counted, drop_last):
    """AWP for two of three epochs; 50 images are three whole batches and a short one."""
    awp = [f"{L}.awp={{gamma: 0.01, warmup_epochs: 1}}", "training.epochs=3", "global_learner.warmup_epochs=0"]
    setup = setup_of([*awp, f"training.drop_last={drop_last}"])
    take(setup, setup.plan.total_steps)
    assert counted == of(run_cost(setup.plan, setup.splits).learners["linf"])
    assert counted["backward"] == (48 if drop_last == "true" else 50) * (3 + 4 + 4)


def test_evaluations_of_a_whole_run(counted, small_run, tmp_path):
    """As counted, except for the attacks on images that are misclassified, which are left out."""
    genray.train(None, [*small_run, "evaluation.base_learners=true"], runtime="local", storage=str(tmp_path))
    config = load_config(tmp_path / "digits" / "config.yaml")
    sizes = json.loads((tmp_path / "digits" / "data.json").read_text())
    splits = {name: range(part["examples"]) for name, part in sizes.items()}
    cost = run_cost(make_plan(config, len(splits["train"])), splits)
    evaluations = cost.evaluations + cost.table
    assert cost.evaluations.forward == 2 * len(splits["validation"]) * 3 * config.training.epochs
    assert cost.table.forward == 2 * len(splits["test"]) * 4
    training = of(sum(cost.learners.values(), Passes()))
    clean = evaluations.forward / 2
    assert training["forward"] + clean < counted["forward"] <= training["forward"] + of(evaluations)["forward"]
    assert training["backward"] < counted["backward"] <= training["backward"] + evaluations.attack
    plan = make_plan(config, len(splits["train"]))
    a_step = (sum(p.units for p in cost.learners.values()) + cost.evaluations.units) / plan.total_steps
    assert table_in_steps(cost, plan, 1) == pytest.approx(cost.table.units / a_step)
    slowest = cost.learners["linf"].units / plan.total_steps
    assert table_in_steps(cost, plan, 3) == pytest.approx(cost.table.units / 3 / slowest)


def test_tau_stops_early_and_costs_at_most_all_steps(counted):
    setup = setup_of([f"{L}.attack.tau=0"])
    take(setup, 3)
    assert 2 * 48 < counted["backward"] < 48 * of(step_passes(setup.config.base_learners["linf"]))["backward"]


def test_random_images_keep_the_shape_and_the_plan_takes_few_steps():
    setup = setup_of([f"{L}.attack.tau=1", f"{L}.awp={{gamma: 0.1, warmup_epochs: 2}}"])
    small = with_random_images(replace(setup, splits={"train": setup.splits["train"]}))
    assert small.architecture == setup.architecture and len(small.splits["train"]) == 4 * BATCH
    learner = small.config.base_learners["linf"]
    assert learner.attack.tau is None and learner.awp.warmup_epochs == 0


def test_a_dry_run_predicts_the_time_of_the_run_by_its_steps(monkeypatch):
    """Two learners of 0.5 and 2 s a step, 3 epochs of 3 whole steps and one of 2 images; 40 passes a second."""
    setup = setup_of(
        ["training.epochs=3", "global_learner.warmup_epochs=0", f"{L}.workers=2", f"{L}.awp.warmup_epochs=3"]
    )
    natural = load_config(None, RUN).base_learners["natural"]
    config = setup.config.replace(base_learners={"natural": natural, **setup.config.base_learners})
    setup = replace(setup, plan=make_plan(config, IMAGES))
    pace, probe = PassSeconds(1 / 40, 1 / 40), StepProbe({"natural": 0.5, "linf": 2.0}, 3 * 2**30)
    monkeypatch.setattr(dry_run, "pass_seconds", lambda setup, device: pace)
    monkeypatch.setattr(dry_run, "probe_steps", lambda setup, device: probe)
    monkeypatch.setattr(dry_run.os, "cpu_count", lambda: 4)
    steps, whole, unperturbed = 3 * IMAGES / BATCH, 2 + 4 / 3, 1 + 4 / 3  # AWP's second pass is left out in the warm-up
    training = {"natural": 0.5 * steps, "linf": 2.0 * steps * unperturbed / whole}
    evaluations = (3 * IMAGES + 4 * IMAGES) * (2 + 2 / 3) / 40
    for runtime, seconds in (("local", sum(training.values())), ("ray", training["linf"] / 2)):
        time, memory = dry_run.measured_lines(setup, runtime)
        assert f"about {dry_run.duration_text(seconds + evaluations)};" in time
        assert "0.5 s (natural), 2 s (linf): the median of 3" in time and "3.00 GiB" in memory
    monkeypatch.setattr(dry_run, "pass_seconds", lambda setup, device: PassSeconds(10.0, 10.0))
    (only,) = dry_run.measured_lines(setup, "local")  # steps would take too long
    assert "predicted from a pass" in only
