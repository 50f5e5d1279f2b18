"""No dead knobs: every field of the configuration, changed alone, changes what a run does."""

import hashlib
import io
import sys
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, every_write_made, timeless
from PIL import Image

import genray
from genray.config import load_config, schema
from genray.config.model import Section
from genray.config.objectives import OBJECTIVES
from genray.config.optimizers import OPTIMIZERS
from genray.config.reference import reference
from genray.core import user_code
from genray.errors import GenrayError
from genray.models import build_model
from genray.recording.run_folder import model_bytes
from genray.run.setup import prepare
from genray.runtime.ray.placement import make_placement

TINY = [
    "name=tiny",
    "training.epochs=3",
    "training.batch_size=30",
    "data.train_examples=110",
    "data.test_examples=24",
    "data.validation_examples=20",
    "model.width=4",
    "base_learners.linf.attack.num_steps=1",
    "global_learner.gamma=[[0, 0.9], [1, 0.3]]",
    "global_learner.warmup_epochs=1",
    "global_learner.sync_every=1",
    "global_learner.mix=raw",
    "evaluation.attack.num_steps=2",
    "evaluation.batch_size=16",
]
L, N, G, E = "base_learners.linf", "base_learners.natural", "global_learner", "evaluation"
L1 = f"{L}.attack={{norm: l1, epsilon: 2, step_size: 1, num_steps: 2}}"
L2 = f"{L}.attack={{norm: l2, epsilon: 2, step_size: 1, num_steps: 4}}"
TWO = "{linf: {norm: linf, epsilon: 0.1, step_size: 0.1, num_steps: 1}, l2: {norm: l2, epsilon: 2, step_size: 1}}"
MAX = [f"{L}.attack=null", f"{L}.objective=max", f"{L}.attacks={TWO}"]
RANDAUGMENT = [f"{L}.augmentation.policy=randaugment"]
ADAM = f"{L}.optimizer={{name: adam}}"
IMAGES = ["PARQUET", "data.extra={source: image_folder, path: IMAGES/a}"]
PNG = ["PARQUET", "data.extra={source: parquet, path: PARQUET, image_column: image, label_column: label}"]
RST = ["data.extra={source: npz, path: IMAGES/pseudo.npz}", f"{L}.objective=rst"]
ANCHOR = [f"{L}.objective={{name: anchor, target: {{learner: natural}}, loss: kl}}"]
STARTS = [f"{L}.starts_from=natural", f"{L}.from_epoch=1"]
# A user's classes, in a module that the fixture `folders` writes.
OWN = """
from genray.attacks import GradientAttack
from genray.objectives.adversarial import Adversarial
from types import SimpleNamespace
class Loss(Adversarial):
    def __init__(self, beta=0.7):
        super().__init__(SimpleNamespace(beta=beta, label_smoothing=0.0))
class Attack:
    def __init__(self, norm, epsilon, step_size, share=1.0):
        self.attack = GradientAttack(norm, share * epsilon, step_size, 1)
    def __call__(self, model, x, y, draw):
        return self.attack(model, x, y, draw)
"""
OWN_LOSS = [f"{L}.objective=own_of_fields:Loss"]
TIMM = ["model={name: timm:test_resnet}"]
MIX = [f"{G}.gamma=null", f"{G}.mixing_weights={{linf: 0.5, natural: rest}}"]

# field -> (what else has to be so for it to matter, the change)
CHANGES = {
    "name": ([], "name=other"),
    "seed": ([], "seed=1"),
    "device": ([], "device=cuda"),  # refused here: the change is seen by the placement
    "data.source": ([], "data.source=parquet"),
    "data.path": (["PARQUET"], "data.path=OTHER"),
    "data.image_column": (["PARQUET"], "data.image_column=second"),
    "data.label_column": (["PARQUET"], "data.label_column=parity"),
    "data.download": (["data.source=cifar10", "data.path=EMPTY", "data.download=false"], "data.download=true"),
    "data.image_size": (["PARQUET"], "data.image_size=[9, 9]"),
    "data.train_examples": ([], "data.train_examples=100"),
    "data.test_examples": ([], "data.test_examples=23"),
    "data.validation_examples": ([], "data.validation_examples=10"),
    "data.validation_seed": ([], "data.validation_seed=1"),
    "data.extra.source": (IMAGES, "data.extra.source=parquet"),
    "data.extra.path": (IMAGES, "data.extra.path=IMAGES/b"),
    "data.extra.image_column": (PNG, "data.extra.image_column=second"),
    "data.extra.label_column": (PNG, "data.extra.label_column=parity"),
    "data.extra.resize": ([*IMAGES, "data.extra.path=IMAGES/large"], "data.extra.resize=true"),
    "data.extra.examples": (IMAGES, "data.extra.examples=20"),
    "data.extra.batch_share": (IMAGES, "data.extra.batch_share=0.4"),
    "model.name": ([], "model.name=resnet18"),
    "model.options": (TIMM, "model.options={drop_rate: 0.5}"),
    "model.weights": ([], "model.weights=IMAGES/weights.pt"),
    "model.new_head": (["model.weights=IMAGES/weights.pt"], "model.new_head=true"),
    "model.freeze": ([], "model.freeze=['classifier.*']"),
    "model.width": ([], "model.width=5"),
    "model.activation": (["model.name=resnet18", "model.batch_norm=false"], "model.activation=silu"),
    "model.batch_norm": ([], "model.batch_norm=false"),
    "model.mean": (["model.mean=[0.5]", "model.std=[1]"], "model.mean=[0.4]"),
    "model.std": (["model.mean=[0.5]", "model.std=[1]"], "model.std=[0.5]"),
    "training.epochs": ([], "training.epochs=2"),
    "training.batch_size": ([], "training.batch_size=31"),
    "training.drop_last": (["training.batch_size=40"], "training.drop_last=true"),
    "training.schedules_by": ([], "training.schedules_by=epoch"),
    "base_learners.attack.algorithm": (
        [f"{E}.attack.step_size=0.1"],
        f"{L}.attack={{algorithm: apgd, norm: linf, epsilon: 0.2, num_steps: 1, start: uniform}}",
    ),
    "base_learners.attack.options": (
        [f"{L}.attack.algorithm=own_of_fields:Attack"],
        f"{L}.attack.options={{share: 0.5}}",
    ),
    "base_learners.attack.norm": ([], f"{L}.attack.norm=l2"),
    "base_learners.attack.epsilon": ([], f"{L}.attack.epsilon=0.1"),
    "base_learners.attack.step_size": ([], f"{L}.attack.step_size=0.03"),
    "base_learners.attack.num_steps": ([], f"{L}.attack.num_steps=2"),
    "base_learners.attack.start": ([], f"{L}.attack.start=zero"),
    "base_learners.attack.mode": ([], f"{L}.attack.mode=train"),
    "base_learners.attack.sparsity": ([L1], f"{L}.attack.sparsity=0.5"),
    "base_learners.objective": ([], f"{L}.objective={{name: adversarial, beta: 0.5}}"),
    "own.name": ([], OWN_LOSS[0]),
    "own.options": (OWN_LOSS, f"{L}.objective.options={{beta: 0.5}}"),
    "base_learners.attack.tau": ([f"{L}.attack.num_steps=2", f"{L}.attack.tau=0"], f"{L}.attack.tau=2"),
    "base_learners.attack.step_noise": ([f"{L}.attack.tau=1"], f"{L}.attack.step_noise=0.1"),
    "base_learners.attack.scale": ([], f"{L}.attack.scale=[[0, 0], [0.5, 1]]"),
    "base_learners.attack.radius_clip": ([], f"{L}.attack.radius_clip=[0.5, 1.5]"),
    "base_learners.attacks": (MAX, f"{L}.attacks.l2.epsilon=3"),
    "base_learners.awp.gamma": ([f"{L}.awp.gamma=0.01"], f"{L}.awp.gamma=0.02"),
    "base_learners.awp.warmup_epochs": ([f"{L}.awp.gamma=0.01"], f"{L}.awp.warmup_epochs=1"),
    "base_learners.augmentation.cutout": ([], f"{L}.augmentation.cutout=3"),
    "base_learners.augmentation.resized_crop": ([], f"{L}.augmentation.resized_crop=[0.3, 1]"),
    "base_learners.augmentation.policy": ([], f"{L}.augmentation.policy=trivialaugment"),
    "base_learners.augmentation.num_ops": (RANDAUGMENT, f"{L}.augmentation.num_ops=1"),
    "base_learners.augmentation.magnitude": (RANDAUGMENT, f"{L}.augmentation.magnitude=20"),
    "base_learners.augmentation.erasing": ([], f"{L}.augmentation.erasing=0.5"),
    "base_learners.augmentation.cutmix": ([], f"{L}.augmentation.cutmix=1"),
    "natural.label_smoothing": ([], f"{N}.objective.label_smoothing=0.1"),
    "natural.mixup": ([], f"{N}.objective.mixup=1"),
    "anchor.target.learner": (ANCHOR, f"{L}.objective.target={{model: IMAGES/model.pt}}"),
    "anchor.target.model": (
        [f"{L}.objective={{name: anchor, target: {{model: IMAGES/model.pt}}}}"],
        f"{L}.objective.target.model=IMAGES/other.pt",
    ),
    "anchor.loss": (ANCHOR, f"{L}.objective.loss=squared_error"),
    "anchor.scale": (ANCHOR, f"{L}.objective.scale=0.1"),
    "anchor.temperature": (ANCHOR, f"{L}.objective.temperature=2"),
    "anchor.cross_entropy": (ANCHOR, f"{L}.objective.cross_entropy=0.5"),
    "anchor.freeze_head": (ANCHOR, f"{L}.objective.freeze_head=true"),
    "base_learners.starts_from": ([], STARTS),
    "base_learners.from_epoch": (STARTS, f"{L}.from_epoch=2"),
    "base_learners.until_epoch": ([], f"{N}.until_epoch=2"),
    "trades.beta": ([f"{L}.objective=trades"], f"{L}.objective.beta=1"),
    "trades.label_smoothing": ([f"{L}.objective=trades"], f"{L}.objective.label_smoothing=0.1"),
    "mart.beta": ([f"{L}.objective=mart"], f"{L}.objective.beta=1"),
    "msd.l1_pixels": (
        [f"{L}.attack=null", f"{L}.objective=msd", f"{L}.attacks={{l1: {{norm: l1, epsilon: 2, step_size: 1}}}}"],
        f"{L}.objective.l1_pixels=[1, 2]",
    ),
    "iat.alpha": ([f"{L}.objective=iat"], f"{L}.objective.alpha=0.5"),
    "rst.beta": (RST, f"{L}.objective.beta=0.4"),
    "rst.natural_weight": (RST, f"{L}.objective.natural_weight=0.4"),
    "rst.robust_weight": (RST, f"{L}.objective.robust_weight=0.4"),
    "adversarial.beta": ([], f"{L}.objective.beta=0.4"),
    "adversarial.label_smoothing": ([], f"{L}.objective.label_smoothing=0.1"),
    "base_learners.optimizer": ([], f"{L}.optimizer.name=adam"),
    "sgd.momentum": ([], f"{L}.optimizer.momentum=0.5"),
    "sgd.nesterov": ([], f"{L}.optimizer.nesterov=true"),
    "sgd.weight_decay": ([], f"{L}.optimizer.weight_decay=0.1"),
    "sgd.decay_norms_and_biases": (
        [f"{L}.optimizer.weight_decay=0.1"],
        f"{L}.optimizer.decay_norms_and_biases=false",
    ),
    "adam.decay_norms_and_biases": (
        [ADAM, f"{L}.optimizer.weight_decay=0.1"],
        f"{L}.optimizer.decay_norms_and_biases=false",
    ),
    "adamw.decay_norms_and_biases": (
        [ADAM.replace("adam}", "adamw}")],
        f"{L}.optimizer.decay_norms_and_biases=false",
    ),
    "sgd.clip_norm": ([], f"{L}.optimizer.clip_norm=0.1"),
    "adam.clip_norm": ([ADAM], f"{L}.optimizer.clip_norm=0.1"),
    "adamw.clip_norm": ([ADAM.replace("adam}", "adamw}")], f"{L}.optimizer.clip_norm=0.1"),
    "adam.beta1": ([ADAM], f"{L}.optimizer.beta1=0.5"),
    "adam.beta2": ([ADAM], f"{L}.optimizer.beta2=0.5"),
    "adam.weight_decay": ([ADAM], f"{L}.optimizer.weight_decay=0.1"),
    "adamw.beta1": ([ADAM.replace("adam}", "adamw}")], f"{L}.optimizer.beta1=0.5"),
    "adamw.beta2": ([ADAM.replace("adam}", "adamw}")], f"{L}.optimizer.beta2=0.5"),
    "adamw.weight_decay": ([ADAM.replace("adam}", "adamw}")], f"{L}.optimizer.weight_decay=0.5"),
    "base_learners.lr": ([], f"{L}.lr=0.03"),
    "base_learners.augmentation.crop_padding": ([], f"{L}.augmentation.crop_padding=1"),
    "base_learners.augmentation.pad_mode": ([f"{L}.augmentation.crop_padding=2"], f"{L}.augmentation.pad_mode=reflect"),
    "base_learners.augmentation.flip": ([], f"{L}.augmentation.flip=true"),
    "base_learners.averaging.enabled": ([f"{G}.mix=averaged"], f"{L}.averaging.enabled=false"),
    "base_learners.averaging.decay": ([f"{G}.mix=averaged"], f"{L}.averaging.decay=0.3"),
    "base_learners.data_order": ([], f"{L}.data_order=own"),
    "base_learners.workers": ([], f"{L}.workers=2"),
    "base_learners.resources.num_cpus": ([], f"{L}.resources.num_cpus=3"),
    "base_learners.resources.accelerator_type": ([], f"{L}.resources.accelerator_type=A100"),
    "base_learners.resources.label_selector": ([], f"{L}.resources.label_selector={{zone: a}}"),
    "base_learners.resources.num_gpus": ([], f"{L}.resources.num_gpus=0.5"),
    "global_learner.gamma": ([], f"{G}.gamma=0.5"),
    "global_learner.mixing_weights": (MIX, f"{G}.mixing_weights={{linf: 0.9, natural: rest}}"),
    "global_learner.mix": ([], f"{G}.mix=averaged"),
    "global_learner.decay": ([], f"{G}.decay=0.3"),
    "global_learner.warmup_epochs": ([], f"{G}.warmup_epochs=3"),
    "global_learner.sync_every": ([], f"{G}.sync_every=2"),
    "global_learner.sync_unit": ([], f"{G}.sync_unit=step"),
    "global_learner.batch_norm": ([], f"{G}.batch_norm=reestimate"),
    "global_learner.reestimate_batches": ([f"{G}.batch_norm=reestimate"], f"{G}.reestimate_batches=1"),
    "evaluation.attack.norm": ([], f"{E}.attack.norm=l2"),
    "evaluation.attack.epsilon": ([], f"{E}.attack.epsilon=0.01"),
    "evaluation.attack.step_size": ([], f"{E}.attack.step_size=0.01"),
    "evaluation.attack.num_steps": ([], f"{E}.attack.num_steps=1"),
    "evaluation.every_epochs": ([], f"{E}.every_epochs=2"),
    "evaluation.base_learners": ([], f"{E}.base_learners=true"),
    "evaluation.batch_size": (["CHUNKS"], f"{E}.batch_size=5"),
    "evaluation.examples": ([], f"{E}.examples=20"),
    "evaluation.select_on": ([], f"{E}.select_on=test"),
    "evaluation.natural_floor": ([], f"{E}.natural_floor=1"),
    "checkpoint.every_epochs": ([], "checkpoint.every_epochs=3"),
    "checkpoint.every_steps": ([], "checkpoint.every_steps=2"),
    "checkpoint.keep": ([], "checkpoint.keep=1"),
    "runtime.placement": ([], "runtime.placement=spread"),
    "loggers": ([], "loggers=[]"),
    "compute.precision": ([], "compute.precision=bf16"),
    "compute.channels_last": ([], "compute.channels_last=false"),
    "compute.fold_batch_norm": (
        [L2],  # an l2 step shows a rounding that signs hide
        "compute.fold_batch_norm=false",
    ),
}

# These only show in how long something takes or how much is in flight; each has a test of its own.
TESTED_ELSEWHERE = {
    "data.home": "tests/unit/test_data_homes.py::test_batches_are_those_of_slow_code",
    "data.cache": "tests/unit/test_data_homes.py::test_a_file_is_made_once",
    "data.decoding_workers": "tests/unit/test_data_homes.py::test_processes_decode",
    "data.on_broken": "tests/unit/test_data_homes.py::test_broken_files_are_left_out_counted_and_recorded",
    "runtime.startup_timeout_s": "tests/ray/test_gpus.py::test_too_few_gpus_is_said_within_the_timeout",
    "runtime.max_failures": "tests/unit/test_recovery.py::test_losses_in_a_row_end_the_run",
    "runtime.grace_period_s": "tests/unit/test_recovery.py::test_a_stopped_run_waits_for_its_last_checkpoint",
    "runtime.storage_timeout_s": "tests/unit/test_recovery.py::test_results_that_cannot_be_written_end_the_run",
    "runtime.share_attack": "tests/ray/test_learner_workers.py::test_a_killed_worker_changes_nothing",
    "runtime.stall_timeout_s": "tests/ray/test_pipeline.py::test_a_stalled_learner_is_named",
    "compute.compile": "tests/unit/test_passes.py::test_compiled_passes_compute_the_same",
    "compute.deterministic": "tests/unit/test_determinism.py::test_a_run_computes_with_kernels_that_repeat",
    "runtime.max_ahead_gib": "tests/ray/test_pipeline.py::test_windows_ahead_fit_the_budget",
}


def fields(cls, prefix=""):
    """Names of all leaf fields, tagged sections under their own tag."""
    for name, f in cls.model_fields.items():
        path = f"{prefix}{name}"
        sections = [h for h in _leaves(f.annotation) if isinstance(h, type) and issubclass(h, Section)]
        if len(sections) > 1:
            yield path
            for section in sections:
                tag = section.model_fields["name"].default
                yield from fields(section, f"{tag if isinstance(tag, str) else 'own'}.")
        elif sections and name != "attacks":  # sections like `attack`
            yield from fields(sections[0], f"{path}.")
        elif prefix.rstrip(".") not in (*OBJECTIVES, *OPTIMIZERS) or name != "name":
            yield path


def _leaves(hint):
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    return (
        [leaf for a in args for leaf in _leaves(a)]
        if args and typing.get_origin(hint) is not typing.Literal
        else [hint]
    )


def test_every_field_is_in_the_table():
    named = set(fields(schema.RunConfig))
    assert named == set(CHANGES) | set(TESTED_ELSEWHERE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Parquet folders with two columns of each kind, and one that is empty."""
    noise = np.random.default_rng(0)
    made = {}
    for name in ("PARQUET", "OTHER"):
        made[name] = tmp_path_factory.mktemp(name)
        for part, count in (("train", 110), ("test", 24)):
            columns = {key: pa.array([_encoded(noise) for _ in range(count)]) for key in ("image", "second")}
            labels = np.arange(count) % 4
            table = pa.table({**columns, "label": labels, "parity": labels % 2})
            pq.write_table(table, made[name] / f"{part}-00000-of-00001.parquet")
    made["IMAGES"] = tmp_path_factory.mktemp("images")
    for name, side in (("a", 8), ("b", 8), ("large", 10)):
        (made["IMAGES"] / name / "1").mkdir(parents=True)
        columns = {"image": pa.array([_encoded(noise) for _ in range(25)]), "label": np.arange(25) % 4}
        pq.write_table(pa.table(columns), made["IMAGES"] / name / "extra.parquet")
        for i in range(30):
            (made["IMAGES"] / name / "1" / f"{i:02d}.png").write_bytes(_encoded(noise, side)["bytes"])
    images = noise.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(made["IMAGES"] / "pseudo.npz", image=images, label=np.arange(60) % 10, pseudo=True)
    sizes = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8), "width": 4}
    state = build_model("small_cnn", **sizes, batch_norm=True, seed=9).state_dict()
    state["classifier.fc3.weight"] += 0.1  # a new network has zeros there
    torch.save(state, made["IMAGES"] / "weights.pt")
    for name in ("model.pt", "other.pt"):
        state["classifier.fc3.bias"] = state["classifier.fc3.bias"] + torch.arange(10) / 10
        described = {"architecture": {"name": "small_cnn", **sizes, "batch_norm": True}}
        (made["IMAGES"] / name).write_bytes(model_bytes(state, described))
    made["EMPTY"] = tmp_path_factory.mktemp("empty")
    (made["EMPTY"].parent / "own_of_fields").mkdir()
    (made["EMPTY"].parent / "own_of_fields/own_of_fields.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch, user_code.only_here():
        patch.syspath_prepend(str(made["EMPTY"].parent / "own_of_fields"))
        user_code.allow_import("own_of_fields")
        yield made
    sys.modules.pop("own_of_fields", None)


def _encoded(noise, side=8):
    buffer = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (side, side), dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": ""}


def prepared(overrides, folders):
    """Overrides with the folders put in."""
    for override in overrides:
        if override == "PARQUET":
            yield "data.source=parquet"
            yield f"data.path={folders['PARQUET']}"
            yield "data.image_column=image"
            yield "data.label_column=label"
        elif override == "data.source=parquet":
            yield from prepared(["PARQUET"], folders)
        elif override != "CHUNKS":
            for name, folder in folders.items():
                override = override.replace(name, str(folder))
            yield override


@pytest.fixture(autouse=True)
def all_checkpoints():
    with every_write_made():
        yield


def fingerprint(overrides, storage, chunks=False):
    """Everything that can be seen of a run: its placement, weights, metrics, results and files."""
    try:
        config = load_config(None, [*TINY, *overrides])
        setup = prepare(config)
        placement = make_placement(setup.plan, 1000, {"CPU": 8, "GPU": 4})
        results = genray.train(config, runtime="local", storage=str(storage))
    except GenrayError as error:
        return str(error)
    folder = storage / config.name
    weights = hashlib.sha256()
    for file in sorted(folder.glob("model*.pt")):
        state = genray.load_model(file).state_dict()
        for value in state.values():
            weights.update(value.numpy().tobytes())
    records = timeless((folder / "metrics.jsonl").read_text())
    results["protocol"].pop("extra", None)  # words; what they say has to act as well
    states = sorted(p.name for p in (folder / "checkpoints").iterdir())
    states.append((folder / "tensorboard").exists())
    seen = [repr(placement), weights.hexdigest(), records, results["models"], results["protocol"], states, config.name]
    if chunks:  # a batch size must not change results, only how many examples are evaluated at once
        from genray.evaluation import chunks as cut

        return [seen, cut(24, config.evaluation.batch_size)]
    return seen


@pytest.fixture(scope="module")
def unchanged(folders, tmp_path_factory):
    """Fingerprint of the run before a change, made once for each set of base overrides."""
    made = {}

    def get(base):
        if tuple(base) not in made:
            storage = tmp_path_factory.mktemp("before")
            made[tuple(base)] = fingerprint(list(prepared(base, folders)), storage, "CHUNKS" in base)
        return made[tuple(base)]

    return get


@pytest.mark.slow
def test_a_fingerprint_is_repeatable(unchanged, tmp_path):
    """Otherwise the test below could not fail."""
    assert fingerprint([], tmp_path) == unchanged([])


@pytest.mark.slow
@pytest.mark.parametrize("field", CHANGES)
def test_field_acts(field, folders, unchanged, tmp_path):
    base, change = CHANGES[field]
    chunks = "CHUNKS" in base
    before = unchanged(base)
    changes = change if isinstance(change, list) else [change]  # several, where one field alone is refused
    after = fingerprint(list(prepared([*base, *changes], folders)), tmp_path, chunks)
    assert before != after
    if chunks:
        assert before[0] == after[0]


def test_every_field_stands_in_the_reference_as_it_is():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m genray.config reference > docs/configuration.md"
