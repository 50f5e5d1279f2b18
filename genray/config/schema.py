"""The typed configuration: one model a YAML section, every field with its range and its meaning.

One `RunConfig` is one complete run. Plain values only (no torch, no ray): the same object is read by the planner,
both runtimes and Tune. `load.py` turns YAML into it and reports every mistake at once.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from genray.config.extra import ExtraConfig
from genray.config.model import Entries, Loggers, Options, OwnName, RunName, Section, Text, option, required
from genray.config.objectives import AnchorObjective, AnchorTarget, Objective
from genray.config.optimizers import SGD, Optimizer
from genray.config.values import AsTuple, Exact, Numbers, Pair, Real, RealPair, Schedule

Norm = Literal["linf", "l2", "l1"]
Texts = Annotated[tuple[Text, ...], AsTuple]
NETWORKS = (
    "small_cnn",
    "resnet18",
    "preact_resnet18",
    "preact_resnet18_softplus",
    "preact_resnet18_no_bn",
    "preact_resnet18_no_bn_raw_shortcut",
    "wrn_28_10",
    "wrn_32_10",
    "wrn_34_10",
)
LIBRARIES = ("timm:", "torchvision:")
OTHER_NETWORK = r"^((timm|torchvision):[A-Za-z0-9_.-]+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$"


def _known_form(name: str) -> str:
    if name not in NETWORKS and not re.match(OTHER_NETWORK, name):
        raise ValueError
    return name


NetworkName = Annotated[
    str,
    AfterValidator(_known_form),
    WithJsonSchema(
        {
            "anyOf": [{"enum": list(NETWORKS)}, {"type": "string", "pattern": OTHER_NETWORK}],
            "$comment": f"one of {', '.join(NETWORKS)}, timm:NAME, torchvision:NAME or package.module:FACTORY",
        }
    ),
]


class DataConfig(Section):
    source: Literal["digits", "cifar10", "cifar100", "mnist", "svhn", "parquet", "image_folder", "arrays"] = required(
        "where the images come from; arrays: they are passed to `genray.train(train=..., test=...)`"
    )
    path: Text | None = option(None, "folder or URI; for torchvision sets the download folder")
    image_column: Text | None = option(None, "Parquet column with the images; found by itself when null")
    label_column: Text | None = option(None, "Parquet column with the labels; found by itself when null")
    download: bool = option(True, "torchvision sets: download when absent")
    image_size: Pair | None = option(None, "resize to [height, width] (Parquet, image_folder)", ge=1, unit="pixels")
    train_examples: int | None = option(None, "only the first n training images", ge=1, unit="images")
    test_examples: int | None = option(None, "only the first n test images", ge=1, unit="images")
    validation_examples: int = option(
        1000, "held out of the training images, class-balanced, to choose by", ge=0, unit="images"
    )
    validation_seed: int = option(0, "seed of that split", ge=0)
    home: Literal["auto", "resident", "mapped", "files"] = option(
        "auto",
        "where the images are: on the device; in a file that each node makes once and maps into memory; in the image "
        "files (Parquet, image_folder), decoded batch by batch; auto: resident up to half of the free memory",
    )
    cache: Text | None = option(None, "folder of the files that each node makes; null: ~/.cache/genray/images")
    decoding_workers: int = option(
        2, "home files: processes of each learner that decode its next batches; 0: it decodes itself", ge=0
    )
    on_broken: Literal["fail", "skip"] = option(
        "fail", "an image file that cannot be decoded: name it and end; or leave it out (all are tried at the start)"
    )
    extra: ExtraConfig | None = option(None, "labelled images that are trained on beside these; null: none")

    def problems(self) -> Iterable[str]:
        if self.source in ("parquet", "image_folder") and self.path is None:
            yield f"path: missing, source {self.source} needs the folder or URI of the images"
        if self.home == "files" and self.source not in ("parquet", "image_folder"):
            yield f"home: expected auto, resident or mapped with source {self.source}, which has no image files"
        if self.source == "arrays" and self.path is not None:
            yield "path: has no effect with source arrays, which genray.train is given; remove it"
        if self.source == "arrays" and self.home in ("mapped", "files"):
            yield f"home: expected auto or resident with source arrays, which are in memory, got {self.home}"
        if self.source == "digits" and self.path is not None:
            yield "path: has no effect with source digits, which scikit-learn carries; remove it"
        for name, sources in (
            ("image_column", ("parquet",)),
            ("label_column", ("parquet",)),
            ("image_size", ("parquet", "image_folder")),
        ):
            if getattr(self, name) is not None and self.source not in sources:
                yield f"{name}: has no effect with source {self.source}; it is for {', '.join(sources)}"


class ModelConfig(Section):
    name: NetworkName = required("architecture")
    options: Options | None = option(None, "keyword arguments of a network that is not one of ours")
    weights: Text | None = option(None, "initial weights: a model file, a run folder or a URI; null: random")
    new_head: bool = option(False, "with weights: the layer that computes the logits begins at random weights")
    freeze: Texts | None = option(None, "parameters that are not trained: names, with * and ?")
    width: int | None = option(None, "channels of the first stage (WRN: widen factor); null: as published", ge=1)
    activation: Literal["relu", "silu"] = option("relu", "of our residual networks: max(x, 0), or x sigmoid(x) (swish)")
    batch_norm: bool = option(False, "small_cnn only: BatchNorm after every convolution")
    mean: Numbers | None = option(
        None, "normalisation inside the model, one value a channel", unit="pixel scale [0, 1]"
    )
    std: Numbers | None = option(
        None, "normalisation inside the model, one value a channel", gt=0, unit="pixel scale [0, 1]"
    )

    def problems(self) -> Iterable[str]:
        if (self.mean is None) != (self.std is None):
            yield "mean, model.std: expected both or neither"
        elif self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            yield f"std: expected {len(self.mean)} values as in model.mean, got {len(self.std)}"
        if ":" not in self.name and self.options is not None:
            yield f"options: has no effect with {self.name}; it is for networks of others"
        if ":" in self.name and self.width is not None:
            yield f"width: has no effect with {self.name}; use model.options"
        if self.new_head and self.weights is None:
            yield "new_head: has no effect without model.weights"
        if self.activation != "relu" and not re.match("(resnet|preact_resnet18(?!_softplus)|wrn)", self.name):
            yield f"activation: has no effect with {self.name}; it is for our residual networks"
        if self.batch_norm and self.name != "small_cnn":
            yield f"batch_norm: has no effect with {self.name}; it is for small_cnn"


class TrainingConfig(Section):
    epochs: int = required("passes over the training images", ge=1, unit="epochs")
    batch_size: int = option(128, "images a step, the same for every learner", ge=1, unit="images")
    drop_last: bool = option(False, "leave out the short last batch of an epoch")
    schedules_by: Literal["epoch", "step"] = option(
        "step", "schedules are read once a step, or once an epoch at its 1-based number (the official code)"
    )


class AttackConfig(Section):
    algorithm: Literal["pgd", "apgd"] | OwnName = option(
        "pgd", "steps of one size, the last image; or of an adaptive size, the image of the largest loss (as in E-AT)"
    )
    options: Options | None = option(None, "keyword arguments of an algorithm that is not ours")
    norm: Norm = required("norm of the ball")
    epsilon: Exact = required(
        "radius on the [0, 1] pixel scale; 8/255 is read exactly", gt=0, unit="pixel scale [0, 1]"
    )
    step_size: Exact | None = option(
        None,
        "pgd needs it: kappa, length of one step in the attack's norm, on the same scale",
        gt=0,
        unit="pixel scale [0, 1]",
    )
    num_steps: int = option(10, "K", ge=1, unit="steps")
    start: Literal["uniform", "gaussian", "zero"] | None = option(
        None, "in the ball; 0.001 N(0, 1); the image itself; null: uniform with pgd, zero with apgd and in msd"
    )
    mode: Literal["eval", "train"] = option("eval", "BatchNorm and dropout while the examples are made")
    sparsity: Real | None = option(
        None,
        "l1 only: fraction of the pixels that a step (apgd: the first step) moves; null: 0.05",
        gt=0,
        le=1,
        unit="fraction",
    )
    tau: Schedule | None = option(
        None,
        "FAT: an example stops this many steps after it is first misclassified; null: all steps",
        ge=0,
        unit="steps",
    )
    step_noise: Real = option(
        0.0, "omega: standard deviation of the noise added to every step (FAT: 0.001)", ge=0, unit="pixel scale [0, 1]"
    )

    scale: Schedule | None = option(
        None,
        "factor on epsilon and step_size over the run, 1 at the end: epsilon is the final radius, and what all records "
        "and evaluations have; null: 1",
        ge=0,
    )
    radius_clip: RealPair | None = option(
        None,
        "a radius per example: epsilon and step_size times mean(g) / g, clipped to this [smallest, largest], divided "
        "by the batch's mean; g: L2 norm of the cross-entropy's gradient at the image; null: epsilon for all",
        gt=0,
    )

    def problems(self) -> Iterable[str]:
        yield from linf_radius_problems(self)
        if self.scale and self.scale.values[-1] != 1:
            yield f"scale: expected 1 at the end (epsilon is the final radius), got {float(self.scale.values[-1]):g}"
        if self.radius_clip and not self.radius_clip[0] <= 1 <= self.radius_clip[1]:
            yield f"radius_clip: expected [smallest, largest] around 1, got {list(self.radius_clip)}"
        if self.algorithm == "pgd" and self.step_size is None:
            yield 'step_size: missing, expected a number such as "8/255" above 0 (algorithm pgd needs it)'
        own = ":" in self.algorithm
        for name, unused in (
            ("step_size", self.algorithm == "apgd"),
            ("tau", self.algorithm != "pgd"),
            ("radius_clip", own),
            ("options", not own),
        ):
            if unused and getattr(self, name) is not None:
                yield f"{name}: has no effect with algorithm {self.algorithm}; remove it"
        if self.norm != "l1" and self.sparsity is not None:
            yield f"sparsity: has no effect with norm {self.norm}; it is for l1"
        if self.step_noise and self.tau is None:
            yield "step_noise: has no effect without tau (it is part of FAT)"

    def scaled(self, factor: float) -> "AttackConfig":
        """The attack with epsilon and step size times a factor."""
        step_size = None if self.step_size is None else float(self.step_size) * factor
        return self.replace(epsilon=float(self.epsilon) * factor, step_size=step_size)


def linf_radius_problems(attack: Any) -> Iterator[str]:
    """A radius above 1 is a slip of the pen: it was meant in 255ths."""
    if attack.norm == "linf" and attack.epsilon is not None and attack.epsilon > 1:
        given = float(attack.epsilon)
        yield f"epsilon: expected at most 1 for linf (pixels are in [0, 1]), got {given:g}; write 8/255, not 8"


class AugmentationConfig(Section):
    crop_padding: int = option(0, "pixels of padding before a random crop of the image's size", ge=0, unit="pixels")
    pad_mode: Literal["zeros", "reflect"] = option("zeros", "what the padding holds")
    flip: bool = option(False, "horizontal flip of every second image")
    resized_crop: RealPair | None = option(
        None,
        "[smallest, largest] fraction of the area of a random crop (sides 3:4 to 4:3), which is resized to the image's "
        "size (ImageNet: [0.08, 1]); null: none",
        gt=0,
        le=1,
        unit="fraction",
    )
    policy: (
        Literal["randaugment", "trivialaugment", "autoaugment_cifar10", "autoaugment_imagenet", "autoaugment_svhn"]
        | None
    ) = option(None, "random changes of geometry and colours, by torchvision; null: none")
    num_ops: int = option(2, "randaugment: changes an image", ge=1, unit="changes")
    magnitude: int = option(9, "randaugment: their strength", ge=0, le=30)
    erasing: Real = option(
        0.0, "fraction of the images in which a random rectangle is set to zero", ge=0, le=1, unit="fraction"
    )
    cutout: int = option(0, "side of a square of zeros at a random place of each image; 0: none", ge=0, unit="pixels")
    cutmix: Real = option(
        0.0,
        "alpha of CutMix's Beta(alpha, alpha), an image's own share of the area and of the label; 0: none",
        ge=0,
        le=100,
    )

    def problems(self) -> Iterable[str]:
        if self.resized_crop and self.resized_crop[0] > self.resized_crop[1]:
            yield f"resized_crop: expected [smallest, largest], got {list(self.resized_crop)}"
        if self.resized_crop and self.crop_padding:
            yield f"crop_padding: expected 0 with resized_crop, got {self.crop_padding}"
        for name, usual in (("num_ops", 2), ("magnitude", 9)):
            if self.policy != "randaugment" and getattr(self, name) != usual:
                yield f"{name}: has no effect with policy {self.policy or 'null'}; it is for randaugment"


class AveragingConfig(Section):
    enabled: bool = option(True, "keep an exponential moving average of the learner's weights")
    decay: Real = option(0.999, "alpha; warmed up as min(alpha, (1+s)/(10+s))", ge=0, lt=1)


WORD = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
Accelerator = Annotated[str, Field(pattern=rf"^{WORD}$")]
LabelKey = Annotated[str, Field(pattern=rf"^([A-Za-z0-9.-]{{1,253}}/)?{WORD}$")]
LABEL_VALUE = rf"^!?(in\({WORD}(, ?{WORD})*\)|{WORD})$"
LabelValue = Annotated[
    Text,
    Field(pattern=LABEL_VALUE),
    WithJsonSchema(
        {"type": "string", "pattern": LABEL_VALUE, "$comment": "a label's value, !value, in(value, value) or !in(...)"}
    ),
]


class ResourcesConfig(Section):
    num_cpus: Real = option(
        1.0, "CPUs of the learner's bundle; torch's threads: at most its whole part", gt=0, unit="CPUs"
    )
    num_gpus: Real | Literal["auto"] = option(
        "auto",
        "GPUs of each of the learner's workers: 1, a fraction, 0; auto: one each, shared when there are fewer",
        ge=0,
        unit="GPUs",
    )
    accelerator_type: Accelerator | None = option(
        None, "kind of GPU of its nodes by Ray's name, such as T4, L4, A100 or H100 (with --runtime ray); null: any"
    )
    label_selector: dict[LabelKey, LabelValue] = option(
        {},
        "labels of its nodes as Ray selects by them, `market-type: on-demand`; a value may also be `!spot`, `in(a, b)` "
        "or `!in(a, b)` (with --runtime ray)",
    )

    def problems(self) -> Iterable[str]:
        if self.num_gpus != "auto" and self.num_gpus > 1:
            several = f"; for several GPUs set workers: {math.ceil(self.num_gpus)} and leave num_gpus at 1"
            yield f"num_gpus: expected at most 1, because a worker computes on one GPU, got {self.num_gpus:g}{several}"


class AwpConfig(Section):
    """Adversarial weight perturbation (AWP), around any objective."""

    gamma: Real = option(0.01, "size of the perturbation, relative to each weight tensor", ge=0)
    warmup_epochs: Real = option(0, "epochs without it", ge=0, unit="epochs")


class BaseLearnerConfig(Section):
    objective: Objective = required("what it minimises")
    attack: AttackConfig | None = option(None, "how its training examples are made (objectives with one attack)")
    attacks: Entries[AttackConfig] | None = option(None, "the same for objectives with several: name -> attack")
    awp: AwpConfig | None = option(None, "perturb the weights against each update; null: do not")
    optimizer: Optimizer = option(SGD, "its own optimiser")
    lr: Schedule = required("learning rate over the run", ge=0)
    augmentation: AugmentationConfig = option(AugmentationConfig, "its own augmentation")
    averaging: AveragingConfig = option(AveragingConfig, "its own weight averaging")
    data_order: Literal["shared", "own"] = option("shared", "the same minibatches as the others, or its own order")
    starts_from: Text | None = option(
        None, "another base learner, whose averaged weights are its own at from_epoch; null: the run's initial weights"
    )
    from_epoch: int = option(
        0,
        "with starts_from: epochs before its first step, in which its weight in theta_g is the other's",
        ge=0,
        unit="epochs",
    )
    until_epoch: int | None = option(
        None, "epochs of the run after which it takes no more steps; null: all", ge=1, unit="epochs"
    )
    workers: int | Literal["auto"] = option(
        1, "actors that train it together, each on a part of every batch; auto: as many as even out the learners", ge=1
    )
    resources: ResourcesConfig = option(ResourcesConfig, "what each of its actors holds")

    @property
    def all_attacks(self) -> dict[str, AttackConfig]:
        """Its attacks by name; one alone is called "attack"."""
        return self.attacks or ({"attack": self.attack} if self.attack else {})

    @property
    def placed_attacks(self) -> dict[str, AttackConfig]:
        """Its attacks by their place below the learner: "attack", or "attacks.<name>"."""
        return {f"attacks.{key}": attack for key, attack in (self.attacks or {}).items()} or self.all_attacks

    @property
    def wants(self) -> str:
        """The attacks of its objective: "none", "one" or "several"; of a user's class, as many as are given."""
        given = "several" if self.attacks else "one" if self.attack else "none"
        return self.objective.attacks or given

    @property
    def target(self) -> AnchorTarget | None:
        """The target network that its objective uses; None if it uses none."""
        objective = self.objective
        return objective.target if isinstance(objective, AnchorObjective) and objective.cross_entropy < 1 else None

    @property
    def is_robust(self) -> bool:
        return self.wants != "none"

    def problems(self) -> Iterable[str]:
        objective = self.objective.name
        wanted = {"none": None, "one": "attack", "several": "attacks"}[self.wants]
        for key in ("attack", "attacks"):
            if key == wanted and not getattr(self, key):
                yield f"{key}: missing, objective {objective} needs {'one' if key == 'attack' else 'at least one'}"
            if key != wanted and getattr(self, key) is not None:
                cure = f"it needs {wanted}" if wanted else "remove it"
                yield f"{key}: has no effect with objective {objective}; {cure}"
        for field, why in (("tau", "takes all steps of each attack"), ("radius_clip", "has one radius a norm")):
            if self.attacks and any(getattr(attack, field) is not None for attack in self.attacks.values()):
                yield f"attacks: expected no {field} with objective {objective}, which {why}"
        if self.attacks and len({attack.mode for attack in self.attacks.values()}) > 1:
            yield "attacks: expected one mode for all of them"
        if self.augmentation.cutmix:
            if objective not in ("natural", "adversarial") or getattr(self.objective, "mixup", False):
                mixing = "mixup" if objective == "natural" else f"objective {objective}"
                yield f"augmentation.cutmix: expected 0 with {mixing}; natural and adversarial mix labels, once"
            if any(attack.tau is not None for attack in self.all_attacks.values()):
                yield "augmentation.cutmix: expected 0 with attack.tau, which stops at a misclassified label"
        if (
            wanted and getattr(self, wanted) and hasattr(self.objective, "attack_problems")
        ):  # what it cannot do with them
            yield from self.objective.attack_problems(self.all_attacks)


class GlobalLearnerConfig(Section):
    gamma: Schedule | None = option(
        None, "mixing ratio: weight of the robust learner, for one natural and one robust learner", ge=0, le=1
    )
    mixing_weights: Entries[Schedule | Literal["rest"]] | None = option(
        None, "weight of each learner, instead of gamma; one of them may be `rest`", ge=0, le=1
    )
    mix: Literal["averaged", "raw"] = option("averaged", "what is mixed: the learners' averaged or raw weights")
    decay: Real = option(0.999, "alpha' of theta_g, warmed up as min(alpha', (1+s)/(10+s))", ge=0, lt=1)
    warmup_epochs: Real | None = option(
        None, "t': no redistribution before; null: round(0.625 * epochs)", ge=0, unit="epochs"
    )
    sync_every: int = option(5, "c: redistribute every c steps or epochs", ge=1, unit="steps or epochs")
    sync_unit: Literal["step", "epoch_end", "every_step_of_epoch", "never"] = option(
        "epoch_end", "what c counts; every_step_of_epoch: after each step of every c-th epoch (the official code)"
    )
    batch_norm: Literal["mix", "reestimate"] = option(
        "mix", "running statistics of theta_g: mixed like the weights, or re-estimated on clean images when evaluated"
    )
    reestimate_batches: int = option(20, "training batches for that", ge=1, unit="batches")


class EvaluationAttackConfig(Section):
    norm: Norm | None = option(None, "null: as the first robust learner's")
    epsilon: Exact | None = option(None, "null: as the first robust learner's", gt=0, unit="pixel scale [0, 1]")
    step_size: Exact | None = option(None, "null: as the first robust learner's", gt=0, unit="pixel scale [0, 1]")
    num_steps: int = option(20, "K", ge=1, unit="steps")


class EvaluationConfig(Section):
    attack: EvaluationAttackConfig = option(EvaluationAttackConfig, "PGD on the validation and the test part")
    every_epochs: int = option(1, "evaluate theta_g on the validation part every n epochs", ge=1, unit="epochs")
    base_learners: bool = option(
        False, "and each base learner's own model at the same times: two more curves a learner, as much work again each"
    )
    batch_size: int = option(256, "images a forward pass", ge=1, unit="images")
    examples: int | None = option(None, "final table: the first n test images; null: all", ge=1, unit="images")
    select_on: Literal["validation", "test"] = option(
        "validation", "what the best checkpoint is chosen on; `test` is for reproducing papers and stamped on the table"
    )
    natural_floor: Real = option(
        0.0, "choose only among epochs with at least this natural accuracy", ge=0, le=1, unit="fraction"
    )


class CheckpointConfig(Section):
    every_epochs: int = option(1, "write a full checkpoint every n epochs, and at the end", ge=1, unit="epochs")
    every_steps: int | None = option(None, "and every n steps, where an epoch takes long", ge=1, unit="steps")
    keep: int = option(2, "how many to keep", ge=1, unit="checkpoints")


class RuntimeConfig(Section):
    placement: Literal["pack", "spread"] = option("pack", "learners close together, or over the nodes")
    share_attack: bool = option(False, "all learners' actors make each learner's adversarial images together")
    startup_timeout_s: Real = option(120.0, "how long the cluster may take to hold the run", gt=0, unit="s")
    stall_timeout_s: Real = option(1800.0, "how long a learner may go without finishing a step", gt=0, unit="s")
    max_failures: int = option(
        5, "lost processes in a row, with no new checkpoint in between, that end a run", ge=0, unit="processes"
    )
    grace_period_s: Real = option(20.0, "for the last checkpoint of a run that is stopped or fails", gt=0, unit="s")
    storage_timeout_s: Real = option(300.0, "how long a finished run waits for storage that fails", gt=0, unit="s")
    max_ahead_gib: Real = option(2.0, "object-store memory for windows submitted ahead", gt=0, unit="GiB")


class ComputeConfig(Section):
    """How the same training is computed; all but `precision` change results by rounding only."""

    precision: Literal["fp32", "tf32", "bf16"] = option(
        "fp32",
        "forward and backward passes in float32; on a GPU with inputs rounded to TF32; in bfloat16. Weights, losses, "
        "averages and evaluation stay float32",
    )
    channels_last: bool = option(True, "images and convolution weights in NHWC order")
    fold_batch_norm: bool = option(True, "attacks run on a copy whose BatchNorm is folded into the convolutions")
    compile: bool = option(False, "torch.compile for training and attack passes; needs a C++ compiler on CPU")
    deterministic: bool = option(
        False, "operations whose bits repeat, which on a GPU is slower; on a CPU they do anyway; others give a warning"
    )


class RunConfig(Section):
    name: RunName = required("run name: the folder under the storage")
    seed: int = option(0, "of everything random", ge=0)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU where the learner holds one")
    data: DataConfig = required("images and labels")
    model: ModelConfig = required("the network, one architecture for all learners")
    training: TrainingConfig = required("what all learners have in common")
    base_learners: Entries[BaseLearnerConfig] = required(
        "the learners by name, one or more, each with a task of its own"
    )
    global_learner: GlobalLearnerConfig = option(GlobalLearnerConfig, "how the learners are mixed into theta_g")
    evaluation: EvaluationConfig = option(EvaluationConfig, "how theta_g is measured, and its best epoch chosen")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "what a run can go on from")
    runtime: RuntimeConfig = option(RuntimeConfig, "the processes of a run, and how long each is waited for")
    compute: ComputeConfig = option(ComputeConfig, "how the numbers are computed")
    loggers: Loggers[Literal["tensorboard", "mlflow", "wandb"]] = option(
        ("tensorboard",),
        "who is sent the numbers of each epoch, beside `metrics.jsonl`; trackers read their settings from their own "
        "variables of the environment",
    )

    @property
    def own_code(self) -> dict[str, str]:
        """Field -> `package.module:NAME` of the user's networks, objectives and attacks."""
        found = {} if self.model.name.startswith(LIBRARIES) else {"model.name": self.model.name}
        for name, learner in self.base_learners.items():
            at = f"base_learners.{name}"
            found[f"{at}.objective.name"] = learner.objective.name
            found |= {f"{at}.{key}.algorithm": attack.algorithm for key, attack in learner.placed_attacks.items()}
        return {field: name for field, name in found.items() if ":" in name}
