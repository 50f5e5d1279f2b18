"""Objective anchor, learners that start from another one, and what a run hands over for both."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, timeless
from process_groups import together
from small_learners import small_network, through_a_file, unit_config

import genray
from genray.config import load_config
from genray.config.load import load_run
from genray.config.objectives import AnchorObjective, AnchorTarget
from genray.data.splits import Split
from genray.errors import InputError
from genray.learners.base_learner import BaseLearner
from genray.learners.crafting import share_crafting
from genray.models import build_model
from genray.objectives import TrainingStep, build_objective
from genray.recording.run_folder import model_bytes
from genray.run.plan import make_plan
from genray.run.setup import prepare

PGD = {"norm": "linf", "epsilon": 0.2, "step_size": 0.1, "num_steps": 3}
SGD = {"lr": [[0, 0.05], [1, 0.01]], "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01}}
FOLLOWS = {"name": "anchor", "target": {"learner": "natural"}, "scale": 0.1}
L, N = "base_learners.linf", "base_learners.natural"
STEPS = 3  # an epoch

ANCHORED = [
    "training.epochs=4",
    f"{L}.objective={{name: anchor, target: {{learner: natural}}, scale: 0.1, freeze_head: true}}",
    f"{L}.starts_from=natural",
    f"{L}.from_epoch=1",
    f"{L}.awp.gamma=0.005",
    f"{N}.until_epoch=3",
]


def images():
    numbers = torch.Generator().manual_seed(3)
    return Split(torch.randint(256, (80, 1, 8, 8), dtype=torch.uint8, generator=numbers), torch.arange(80) % 10)


def plan_of(objective, natural=None, **linf):
    learners = {"natural": {"objective": "natural", **SGD, **(natural or {})}}
    learners["linf"] = {"objective": objective, "attack": PGD, **SGD, **linf}
    return make_plan(unit_config(learners, global_learner={"gamma": 0.5}), 80)


def learner_of(plan, name="linf", target=None, **options):
    return BaseLearner(name, plan, small_network(), images(), target=target, **options)


def weights(learner):
    return torch.cat([learner.flat.weights, learner.average, learner.share])


def objective_of(**options):
    return build_objective(AnchorObjective(target=AnchorTarget(learner="natural"), **options))


def step_of(network, x, y, adversarial, target):
    return TrainingStep(network, x, y, lambda name: adversarial, target=target)


@pytest.fixture
def batch():
    numbers = torch.Generator().manual_seed(5)
    x, y = torch.rand(6, 1, 8, 8, generator=numbers), torch.arange(6)
    return x, (x + 0.1 * torch.rand(x.shape, generator=numbers)).clamp(0, 1), y


@pytest.mark.parametrize("loss", ["squared_error", "kl"])
def test_no_loss_and_no_gradient_where_target_and_learner_are_one_network_and_images_are_clean(batch, loss):
    network, (x, _, y) = small_network().eval(), batch
    target = network(x).detach()
    value, _ = objective_of(loss=loss)(step_of(network, x, y, x, target))
    value.backward()
    assert abs(value.item()) < 1e-6
    assert max(p.grad.abs().max() for p in network.parameters()) < 1e-6
    value, _ = objective_of(loss=loss)(step_of(network, x, y, x, target + torch.arange(10.0)))
    assert value > 0.01


def test_losses_against_loops(batch):
    network, (x, adversarial, y) = small_network().eval(), batch
    teacher = small_network().eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05)
        t, z = teacher(x).double(), network(adversarial).double()
    squared = sum((z[i, k] - t[i, k]) ** 2 for i in range(6) for k in range(10)) / 6
    entropy = -sum(torch.log(torch.exp(z[i, y[i]]) / torch.exp(z[i]).sum()) for i in range(6)) / 6
    p = torch.exp(t / 4) / torch.exp(t / 4).sum(1, keepdim=True)
    q = torch.exp(z / 4) / torch.exp(z / 4).sum(1, keepdim=True)
    divergence = 16 * sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for i in range(6) for k in range(10)) / 6
    step = step_of(network, x, y, adversarial, t.float())
    for options, expected in (
        ({}, squared),
        ({"scale": 0.05, "cross_entropy": 0.25}, 0.75 * 0.05 * squared + 0.25 * entropy),
        ({"loss": "kl", "temperature": 4}, divergence),
        ({"cross_entropy": 1}, entropy),
    ):
        assert objective_of(**options)(step)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("loss", "algorithm"), [("squared_error", "pgd"), ("kl", "pgd"), ("squared_error", "apgd")])
def test_the_attack_climbs_the_distance_from_the_target(batch, loss, algorithm):
    """One step from x is epsilon along the sign of the gradient of the distance, by finite differences of its own."""
    x, _, y = (t.double() if t.is_floating_point() else t for t in batch)
    network = small_network().eval().double()
    t = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = None if algorithm == "apgd" else 0.01
    config = plan_of({**FOLLOWS, "loss": loss}).config.base_learners["linf"].attack
    config = config.replace(algorithm=algorithm, epsilon=0.01, step_size=size, num_steps=1, start="zero")
    attack = objective_of(loss=loss).build_attacks({"attack": config})["attack"]
    found = attack(network, x, y, None, target=t)

    def distance(images):
        z = network(images)
        return (
            ((z - t) ** 2).sum()
            if loss == "squared_error"
            else F.kl_div(z.log_softmax(1), t.softmax(1), reduction="sum")
        )

    with torch.no_grad():
        pixels = [(i, 0, 1 + i, 3) for i in range(6)]
        for at in pixels:
            ahead, behind = x.clone(), x.clone()
            ahead[at] += 1e-6
            behind[at] -= 1e-6
            slope = (distance(ahead) - distance(behind)).item()
            expected = (x[at] + 0.01 * np.sign(slope)).clamp(0, 1)
            assert found[at].item() == pytest.approx(expected.item(), abs=1e-9)
        assert distance(found) > distance(x)


def test_cross_entropy_alone_is_adversarial_training():
    plans = plan_of("adversarial"), plan_of({**FOLLOWS, "cross_entropy": 1}), plan_of(FOLLOWS)
    plain, same, anchored = (learner_of(p, target=small_network() if p is plans[2] else None) for p in plans)
    for learner in (plain, same, anchored):
        learner.run_window(0, 2)
    assert torch.equal(weights(plain), weights(same)) and not torch.equal(weights(plain), weights(anchored))


def test_a_learner_as_target_is_its_snapshot_as_target():
    natural = learner_of(plan_of(FOLLOWS), "natural")
    natural.run_window(0, STEPS)
    handed, fixed, without = (learner_of(plan_of(FOLLOWS), target=small_network()) for _ in range(3))
    handed.load_target(natural.model_snapshot())
    network = small_network()
    with torch.no_grad():  # the tensors of the snapshot by name, without FlatWeights
        natural.flat.weights.copy_(natural.average)
        network.load_state_dict({name: value.clone() for name, value in natural.network.state_dict().items()})
    fixed = learner_of(plan_of(FOLLOWS), target=network)
    for learner in (handed, fixed, without):
        learner.run_window(0, STEPS)
    assert torch.equal(weights(handed), weights(fixed))
    assert not torch.equal(weights(handed), weights(without))


def test_the_targets_logits_are_those_of_eval_mode():
    target = small_network()
    plain = copy.deepcopy(target).eval()
    learner = learner_of(plan_of(FOLLOWS), target=target)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(learner.target(x), plain(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_frozen_head_stays_and_all_else_moves():
    plan = plan_of({**FOLLOWS, "freeze_head": True}, awp={"gamma": 0.01})
    learner = learner_of(plan, target=small_network())
    before = {name: p.clone() for name, p in learner.network.named_parameters()}
    learner.run_window(0, STEPS)
    moved = {name for name, p in learner.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("classifier.fc3")}


def test_state_from_the_middle_of_an_epoch():
    """With its target, which a checkpoint holds, and in a file."""
    natural = learner_of(plan_of(FOLLOWS), "natural")
    natural.run_window(0, STEPS)
    whole, second = (learner_of(plan_of(FOLLOWS), target=small_network()) for _ in range(2))
    whole.run_window(0, STEPS)
    whole.load_target(natural.model_snapshot())
    whole.run_window(STEPS, STEPS + 1)
    second.load_state_dict(through_a_file(whole.state_dict()))
    for learner in (whole, second):
        learner.run_window(STEPS + 1, 2 * STEPS)
    assert torch.equal(weights(whole), weights(second))


# --- when a learner trains -------------------------------------------------------------------------------------------


def test_hand_overs_of_a_plan():
    plan = plan_of(FOLLOWS, {"until_epoch": 2}, starts_from="natural", from_epoch=1)
    found = {step: plan.hand_overs(step) for step in range(1, 10) if plan.hand_overs(step)}
    both = [("linf", "natural", "start_from"), ("linf", "natural", "load_target")]
    assert found == {STEPS: both, 2 * STEPS: both[1:]}
    assert [plan.trains("natural", s) for s in range(9)] == [True] * 6 + [False] * 3
    assert [plan.trains("linf", s) for s in range(9)] == [False] * 3 + [True] * 6
    assert [plan.mixing_weight("natural", s) for s in (0, 2, 3, 8)] == [1, 1, 0.5, 0.5]
    assert [plan.mixing_weight("linf", s) for s in (0, 2, 3, 8)] == [0, 0, 0.5, 0.5]
    # A target that has stopped before is handed over at the first step.
    plan = plan_of(FOLLOWS, {"until_epoch": 1}, starts_from="natural", from_epoch=2)
    assert {s: plan.hand_overs(s) for s in range(1, 10) if plan.hand_overs(s)} == {2 * STEPS: both}


def test_epochs_of_learners_move_with_the_epochs_of_the_run():
    """Like schedules, which are fractions of the run; what is named stays."""
    file = yaml.safe_load((ROOT / "configs/cifar10_resnet18_anchored.yaml").read_text())
    found = load_run(file, ["training.epochs=25"])
    assert found.config.base_learners["natural"].until_epoch == found.config.base_learners["linf"].from_epoch == 10
    assert len([note for note in found.notes if "10 instead of 100" in note]) == 2
    longer = load_run(file, ["training.epochs=500", f"{N}.until_epoch=90"]).config.base_learners
    assert (longer["natural"].until_epoch, longer["linf"].from_epoch) == (90, 200)


def test_theta_g_is_loaded_by_learners_that_train():
    plan = plan_of(FOLLOWS, {"until_epoch": 2}, starts_from="natural", from_epoch=1)
    found = {name: [plan.takes_global(name, 3 * e) for e in range(4)] for name in ("natural", "linf")}
    assert found == {"natural": [True, True, False, False], "linf": [False, True, True, True]}


def test_weights_of_learners_that_wait_for_one_another():
    learners = {name: {"objective": "natural", **SGD} for name in "abc"}
    learners["b"] |= {"starts_from": "a", "from_epoch": 1}
    learners["c"] |= {"starts_from": "b", "from_epoch": 2}
    glob = {"mixing_weights": {"a": 0.5, "b": 0.25, "c": "rest"}}
    attack = {"norm": "linf", "epsilon": 0.1, "step_size": 0.1}
    plan = make_plan(unit_config(learners, global_learner=glob, evaluation={"attack": attack}), 80)
    found = [[plan.mixing_weight(name, epoch * STEPS) for name in "abc"] for epoch in range(3)]
    assert found == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]]


@pytest.mark.slow
def test_a_run_against_its_learners_by_hand(tmp_path, small_run):
    """theta_g of the first epochs is the natural learner's; the anchored one starts from its average."""
    overrides = [*small_run, *ANCHORED, "global_learner.sync_unit=never", "global_learner.batch_norm=mix"]
    genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    records = timeless((tmp_path / "digits" / "metrics.jsonl").read_text())
    assert [sorted(r["learners"]) for r in records] == [["natural"], ["linf", "natural"], ["linf", "natural"], ["linf"]]
    assert records[0]["mixing_weights"] == {"natural": 1, "linf": 0}
    own = {n: torch.load(tmp_path / f"digits/learners/{n}.pt", weights_only=True) for n in ("natural", "linf")}
    alone = [o for o in overrides if not o.startswith((L, "global_learner.gamma"))]
    alone += [f"{L}=null", "evaluation.attack={norm: linf, epsilon: 0.2, step_size: 0.05}", "name=alone"]
    alone += ["global_learner.gamma=null"]
    genray.train(None, alone, runtime="local", storage=str(tmp_path))
    natural = torch.load(tmp_path / "alone/learners/natural.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, own["natural"]["state_dict"][name]) for name, value in natural.items())


@pytest.mark.slow
def test_interrupted_in_the_middle_of_an_epoch_and_gone_on_with(tmp_path, small_run):
    """Checkpoints every 2 steps change no bit, nor does a run that is continued from one of them."""
    overrides = [*small_run, *ANCHORED]
    genray.train(None, overrides, runtime="local", storage=str(tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == 3:
            raise Stop

    often = [*overrides, "checkpoint.every_steps=2", "checkpoint.keep=30"]
    with pytest.raises(Stop):
        genray.train(None, often, runtime="local", storage=str(tmp_path / "parts"), on_epoch=stop)
    states = sorted((tmp_path / "parts/digits/checkpoints").glob("state-*"))
    middle = next(s for s in states if s.stem == "state-000000010")  # 7 steps an epoch; the learner started at 7
    for state in states:
        if state > middle:
            state.unlink()
    genray.train(None, often, runtime="local", storage=str(tmp_path / "parts"), resume=True)
    for name in ("model_last.pt", "learners/natural.pt", "learners/linf.pt"):
        one, two = (
            torch.load(tmp_path / k / "digits" / name, weights_only=True)["state_dict"] for k in ("whole", "parts")
        )
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_a_model_file_as_target(tmp_path, small_run):
    """A larger network that was trained before; the record names its file."""
    genray.train(
        None,
        [*small_run, "name=teacher", "training.epochs=1", "model.width=12"],
        runtime="local",
        storage=str(tmp_path),
    )
    anchored = f"{L}.objective={{name: anchor, target: {{model: {tmp_path}/teacher}}, loss: kl, temperature: 2}}"
    genray.train(None, [*small_run, anchored], runtime="local", storage=str(tmp_path))
    data = (tmp_path / "digits" / "data.json").read_text()
    assert "target of linf" in data and "teacher/model.pt" in data


@pytest.mark.slow
def test_attacks_made_together_with_a_target(small_run):
    """Two processes craft the anchored learner's images; the natural one no longer trains in the last steps."""
    plan = plan_of(FOLLOWS, {"until_epoch": 1})
    config = plan.config.replace(runtime=plan.config.runtime.replace(share_attack=True))
    plan = replace(plan, config=config)

    def windows(learner):
        learner.run_window(0, STEPS)
        learner.run_window(STEPS, 2 * STEPS)
        return weights(learner).numpy().copy()

    def work(worker, own, everyone):
        target = small_network() if worker.learner == "linf" else None
        learner = learner_of(plan, worker.learner, target, process_group=own, pack=True)
        learner.shared_crafting = share_crafting(learner, everyone, worker.owners, images(), small_network(), 10)
        return windows(learner)

    natural, linf = together({"natural": 1, "linf": 1}, work, share_attack=True)
    np.testing.assert_allclose(natural, windows(learner_of(plan, "natural")), rtol=0, atol=1e-6)
    np.testing.assert_allclose(linf, windows(learner_of(plan, target=small_network())), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("nowhere.pt", "nowhere.pt: no such file"),
        ("colour", "cannot take images"),
        ("three", "expected a network with"),
    ],
)
def test_target_files_that_do_not_fit(tmp_path, target, expected):
    for name, classes, channels in (("colour", 10, 3), ("three", 3, 1)):
        network = {
            "name": "small_cnn",
            "num_classes": classes,
            "in_channels": channels,
            "image_size": (8, 8),
            "width": 4,
        }
        state = build_model(**network).state_dict()
        (tmp_path / f"{name}.pt").write_bytes(model_bytes(state, {"architecture": network}))
    place = tmp_path / (target if "." in target else f"{target}.pt")
    with pytest.raises(InputError) as caught:
        prepare(load_config(None, [f"{L}.objective={{name: anchor, target: {{model: {place}}}}}"]))
    message = str(caught.value)
    assert message.startswith(f"{L}.objective.target.model: ") and expected in message and "\n" not in message


def test_a_run_with_cross_entropy_alone_hands_no_target_over(tmp_path, small_run):
    for name, objective in (
        ("plain", "adversarial"),
        ("alone", "{name: anchor, target: {learner: natural}, cross_entropy: 1}"),
    ):
        overrides = [*small_run, f"name={name}", f"{L}.objective={objective}"]
        genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    plain, alone = (
        torch.load(tmp_path / n / "model_last.pt", weights_only=True)["state_dict"] for n in ("plain", "alone")
    )
    assert all(torch.equal(plain[key], alone[key]) for key in plain)
