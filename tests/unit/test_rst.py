"""Robust self-training (methods C7): its loss, its pseudo-labels and its identities."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn

import genray
from genray.config import load_config
from genray.config.load import load_stored_config, read_yaml
from genray.config.objectives import RstObjective
from genray.data.datasets import load_image_data
from genray.data.splits import Split
from genray.learners.base_learner import BaseLearner
from genray.models import build_model
from genray.objectives import TrainingStep, build_objective
from genray.recording import RunRecorder
from genray.recording.table import results_table
from genray.run import pseudo_labels
from genray.run import setup as run_setup
from genray.run.plan import make_plan
from genray.run.setup import prepare

CLASSES, SIZE = 5, 12


# --- the loss ---------------------------------------------------------------------------------------------------------


def slow_loss(weights, x, adversarial, y, labelled, options):
    """((1 - beta) L_nat + beta L_rob, its gradient), one example after another in float64."""
    total, gradient = 0.0, np.zeros_like(weights)
    for images, u, factor in (
        (x, options.natural_weight, 1 - options.beta),
        (adversarial, options.robust_weight, options.beta),
    ):
        shares = [1 - u if own else u for own in labelled]
        if all(labelled) or not any(labelled):
            shares = [1.0] * len(labelled)
        for image, label, share in zip(images, y, shares):
            logits = weights @ image
            p = np.exp(logits - logits.max())
            p /= p.sum()
            part = factor * share / sum(shares)
            total -= part * np.log(p[label])
            p[label] -= 1
            gradient += part * np.outer(p, image)
    return total, gradient


MIXED = [True, False, False, True, False, True, True, True, False]


@pytest.mark.parametrize("labelled", [MIXED, [True] * 9, [False] * 9, [False] + [True] * 8], ids=str)
@pytest.mark.parametrize("beta, natural, robust", [(0.5, 0.9, 0.5), (0, 0.9, 0.5), (1, 0.2, 0.7), (0.3, 0, 1)])
def test_loss_and_gradient(beta, natural, robust, labelled):
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(CLASSES, SIZE))
    x = rng.random((9, SIZE))
    adversarial, y = x + 0.3 * rng.normal(size=x.shape), rng.integers(0, CLASSES, 9)
    network = nn.Linear(SIZE, CLASSES, bias=False)
    network.weight.data = torch.tensor(weights, dtype=torch.float32)
    options = RstObjective(beta=beta, natural_weight=natural, robust_weight=robust)
    images, crafted = (torch.tensor(a, dtype=torch.float32) for a in (x, adversarial))
    step = TrainingStep(
        network, images, torch.from_numpy(y), lambda name: crafted, labelled=torch.tensor(labelled, dtype=torch.bool)
    )
    loss, logits = build_objective(options)(step)
    loss.backward()
    expected, gradient = slow_loss(weights, x, adversarial, y, labelled, options)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert np.abs(network.weight.grad.numpy() - gradient).max() < 1e-6
    assert torch.equal(logits, network(images if beta == 0 else crafted))


# --- identities -------------------------------------------------------------------------------------------------------

ATTACK = {"norm": "linf", "epsilon": 0.1, "step_size": 0.05, "num_steps": 2}


def weights_after(objective, split, steps=20):
    """Weights of one learner after some steps on 80 digits, batches of 32, BatchNorm and augmentation on."""
    learner = {"objective": objective, "lr": 0.05, "augmentation": {"crop_padding": 1}}
    if objective not in ("natural", {"name": "natural"}):
        learner["attack"] = ATTACK
    config = load_config(
        {
            "name": "unit",
            "data": {"source": "digits", "unlabeled": {"source": "fraction", "fraction": 0.5}},
            "model": {"name": "small_cnn", "batch_norm": True, "width": 4},
            "training": {"epochs": 8, "batch_size": 32},
            "base_learners": {"only": learner},
            "evaluation": {"attack": {"norm": "linf", "epsilon": 0.1, "step_size": 0.05}},
        }
    )
    shape = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8), "width": 4, "batch_norm": True}
    network = build_model("small_cnn", seed=1, **shape)
    network.classifier.fc3.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    base_learner = BaseLearner("only", make_plan(config, len(split)), network, split)
    base_learner.run_window(0, steps)
    return base_learner.flat.weights.clone()


@pytest.fixture(scope="module")
def digits_80():
    return load_image_data("digits").train.first(80)


@pytest.mark.parametrize("kind", ["all labelled", "all pseudo-labelled", "u = 1/2"])
@pytest.mark.parametrize(
    "beta, plain",
    [
        (1, {"name": "adversarial"}),
        (0, {"name": "adversarial", "beta": 0}),
        (0.25, {"name": "adversarial", "beta": 0.25}),
    ],
    ids=["PGD-AT", "NT", "mixture"],
)
def test_equal_weights_give_the_plain_objective(digits_80, kind, beta, plain):
    """With all labels of one kind, or with u = 1/2, RST is PGD-AT (beta 1), NT (beta 0) or their mixture."""
    mask = {"all labelled": torch.ones(80), "all pseudo-labelled": torch.zeros(80)}.get(kind, torch.arange(80) % 3 > 0)
    split = Split(digits_80.images, digits_80.labels, mask.bool())
    options = {"name": "rst", "beta": beta}
    if kind == "u = 1/2":
        options |= {"natural_weight": 0.5, "robust_weight": 0.5}
    ours, theirs = weights_after(options, split), weights_after(plain, digits_80)
    assert (ours - weights_after(plain, digits_80, 1)).abs().max() > 1e-2  # it did learn
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    if beta == 0:
        assert torch.allclose(ours, weights_after("natural", digits_80), rtol=1e-4, atol=1e-5)


def test_without_a_mask_the_bits_are_those_of_adversarial_training(digits_80):
    assert torch.equal(weights_after({"name": "rst", "beta": 1}, digits_80), weights_after("adversarial", digits_80))


def test_weights_matter(digits_80):
    split = Split(digits_80.images, digits_80.labels, torch.arange(80) % 3 > 0)
    assert not torch.allclose(weights_after("rst", split), weights_after({"name": "rst", "natural_weight": 0.5}, split))


# --- whole runs -------------------------------------------------------------------------------------------------------

RUN = [
    "training.epochs=3",
    "training.batch_size=48",
    "data.train_examples=400",
    "data.test_examples=40",
    "data.validation_examples=50",
    "model.width=8",
    "base_learners.linf.attack.num_steps=1",
    "base_learners.linf.objective=rst",
    "evaluation.attack.num_steps=1",
    "data.unlabeled={source: fraction, fraction: 0.4, class_balanced: false, teacher: {epochs: 4, lr: 0.1}}",
]


def state(file):
    return torch.load(file, weights_only=True)["state_dict"]


def same_models(one, other, names=("model.pt", "model_last.pt", "teacher/model_last.pt")):
    for name in names:
        ours, theirs = state(one / name), state(other / name)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, results) of a Generalist run whose robust learner is RST."""
    storage = tmp_path_factory.mktemp("rst")
    results = genray.train(None, RUN, runtime="local", storage=str(storage))
    return storage / "digits", results


def test_pseudo_labels_are_the_teachers_classes(finished):
    folder, results = finished
    labels = np.load(folder / "pseudo_labels.npy", allow_pickle=False)
    setup = prepare(load_config(None, RUN))
    train = setup.splits["train"]
    assert len(train) == 350 and len(labels) == 140 and not (train.labels[~train.labelled] >= 0).any()
    teacher = genray.load_model(folder / "teacher" / "model_last.pt")
    with torch.no_grad():
        logits = torch.cat([teacher(image[None] / 255) for image in train.images[~train.labelled]])
    assert np.array_equal(logits.argmax(1).numpy(), labels)
    right = results["protocol"]["unlabeled"]["right"]
    assert right["examples"] == 140 and right["value"] == np.mean(labels == setup.dropped_labels.numpy())
    assert right["value"] > 0.4  # the teacher learned something
    assert json.loads((folder / "results.json").read_text())["protocol"] == results["protocol"]


def test_teacher_is_an_ordinary_run_on_the_labelled_images(finished, tmp_path):
    """Its stored configuration, run on its own, gives its bits; nothing of the unlabelled images is in it."""
    folder, _ = finished
    config = load_stored_config(read_yaml(folder / "teacher" / "config.yaml"))
    setup = prepare(config)
    train, mixed = setup.splits["train"], prepare(load_config(None, RUN)).splits["train"]
    assert train.labelled is None and setup.dropped_labels is None
    assert torch.equal(train.images, mixed.images[mixed.labelled])
    assert torch.equal(train.labels, mixed.labels[mixed.labelled])
    genray.train(config, runtime="local", storage=str(tmp_path))
    assert same_models(folder / "teacher", tmp_path / "teacher", ["model_last.pt"])


def test_dropped_labels_change_nothing(finished, tmp_path, monkeypatch):
    """Other true labels of the unlabelled images: the same bits of everything but the count of right pseudo-labels."""
    folder, results = finished
    original = prepare(load_config(None, RUN))
    split = run_setup.validation_split

    def with_wrong_labels(*args, **options):
        train, validation = split(*args, **options)
        wrong = train.labels.clone()
        unknown = ~original.splits["train"].labelled
        wrong[unknown] = wrong[unknown].flip(0)
        assert not torch.equal(wrong, train.labels)
        return Split(train.images, wrong), validation

    monkeypatch.setattr(run_setup, "validation_split", with_wrong_labels)
    again = genray.train(None, RUN, runtime="local", storage=str(tmp_path))
    assert same_models(folder, tmp_path / "digits")
    assert (folder / "pseudo_labels.npy").read_bytes() == (tmp_path / "digits" / "pseudo_labels.npy").read_bytes()
    assert again["models"] == results["models"]
    assert again["protocol"]["unlabeled"]["right"]["value"] < results["protocol"]["unlabeled"]["right"]["value"] - 0.1


def test_resumed_after_the_teacher(finished, tmp_path, monkeypatch):
    """Stopped in the first window after the stage: resumed, it reads the pseudo-labels and ends with the same bits."""
    folder, results = finished
    calls = []
    classify = pseudo_labels.classify
    monkeypatch.setattr(pseudo_labels, "classify", lambda *args: calls.append(1) or classify(*args))

    begun = RunRecorder.window_done

    def stop_the_student(self, *args):
        if self.setup.config.name != "teacher":
            raise KeyboardInterrupt
        begun(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "window_done", stop_the_student)
        with pytest.raises(KeyboardInterrupt):
            genray.train(None, RUN, runtime="local", storage=str(tmp_path))
    assert calls == [1]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "digits" / "teacher").rglob("*")}
    again = genray.train(None, RUN, runtime="local", storage=str(tmp_path), resume=True)
    assert calls == [1]
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "digits" / "teacher").rglob("*")}
    assert same_models(folder, tmp_path / "digits") and again["models"] == results["models"]
    assert again["protocol"] == results["protocol"]


def test_resumed_in_the_middle_of_the_teacher(finished, tmp_path, monkeypatch):
    folder, results = finished
    begun, steps = RunRecorder.window_done, []

    def stop_in_epoch_two(self, window, *args):
        steps.append(window.start)
        if len(steps) == 2:
            raise KeyboardInterrupt
        begun(self, window, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "window_done", stop_in_epoch_two)
        with pytest.raises(KeyboardInterrupt):
            genray.train(None, RUN, runtime="local", storage=str(tmp_path))
    assert not (tmp_path / "digits" / "config.yaml").exists()
    assert len(list((tmp_path / "digits" / "teacher" / "checkpoints").iterdir())) == 1
    again = genray.train(None, RUN, runtime="local", storage=str(tmp_path), resume=True)
    assert same_models(folder, tmp_path / "digits") and again["models"] == results["models"]


@pytest.mark.ray
def test_ray_gives_the_same_bits(finished, tmp_path, monkeypatch, capfd):
    """Actors that get the packed mixture, and a cluster that classifies in tasks and loses a worker meanwhile."""
    import ray

    from genray.runtime.ray import labelling
    from genray.runtime.ray.actors import pack, unpack

    class Dying(labelling.LabellingWorker):
        def run(self, start, stop):
            if start and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(start, stop)

    folder, results = finished
    setup = prepare(load_config(None, RUN))
    back = unpack(*pack(setup)).splits["train"]
    assert torch.equal(back.labelled, setup.splits["train"].labelled) and pack(setup)[0].dropped_labels is None
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        again = genray.train(None, RUN, runtime="ray", storage=str(tmp_path))
        network = genray.load_model(folder / "teacher" / "model_last.pt")
        config = load_config(None, [*RUN, "evaluation.batch_size=4"])  # three tasks
        monkeypatch.setattr(labelling, "LabellingWorker", Dying)
        labels = labelling.classify_on_cluster(network, pseudo_labels.unlabeled_images(setup), config)
    finally:
        ray.shutdown()
    assert same_models(folder, tmp_path / "digits") and again["models"] == results["models"]
    assert again["protocol"] == results["protocol"]
    assert (folder / "pseudo_labels.npy").read_bytes() == (tmp_path / "digits" / "pseudo_labels.npy").read_bytes()
    assert np.array_equal(labels.numpy(), np.load(folder / "pseudo_labels.npy"))
    lost = r"pseudo-labels worker \d of \d, images \d+ to \d+: its process died: .*; another one is started"
    assert re.search(lost, capfd.readouterr().err)


def test_a_given_teacher_labels_without_training(finished, tmp_path):
    folder, _ = finished
    overrides = [*RUN, "data.unlabeled.teacher=null", f"data.unlabeled.teacher.path={folder}", "training.epochs=1"]
    results = genray.train(None, overrides, runtime="local", storage=str(tmp_path))
    assert not (tmp_path / "digits" / "teacher").exists()
    assert results["protocol"]["unlabeled"]["teacher"] == str(folder)
    setup, teacher = prepare(load_config(None, RUN)), genray.load_model(folder)
    with torch.no_grad():
        expected = teacher(pseudo_labels.unlabeled_images(setup) / 255).argmax(1)
    assert np.array_equal(np.load(tmp_path / "digits" / "pseudo_labels.npy"), expected.numpy())


def test_what_is_said(finished, genray_command):
    _, results = finished
    done = genray_command("train", "--dry-run", "--runtime", "local", *RUN)
    for text in (results_table(results), done.stdout):
        assert "140 pseudo-labelled beside 210 labelled training images" in text
        assert "training images whose labels were dropped (fraction 0.4, of all alike, seed 0)" in text
        assert "teacher: natural training on the labelled images, 4 epochs, lr 0.1 to 0.1" in text
    right = 100 * results["protocol"]["unlabeled"]["right"]["value"]
    assert f"{right:.1f} % of its labels are right" in results_table(results)
