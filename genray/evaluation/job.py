"""An evaluation as a list of small tasks, each of which gives the same flags wherever and whenever it runs.

A task is one attack in one norm on one *block*: a fixed range of consecutive examples of the data set. Blocks, not
workers or batches, carry the random numbers of attacks that draw for a whole batch, so results depend on the block
size (which is part of the protocol) and on nothing else.

AutoAttack's members run one after another, and so do the radii of a norm. The examples that resist a member, or a
radius, are packed into full blocks again, in order, so that the last and longest attacks use all workers. These tasks
become known when the stage before finishes; their examples depend on its flags alone.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
import torch

from genray.attacks import temporary_mode
from genray.attacks.losses import signed_margin
from genray.attacks.own import check_points
from genray.attacks.transfer import is_transfer
from genray.core.determinism import full_precision
from genray.core.memory import free_on
from genray.core.threads import threads_kept, work_threads
from genray.core.user_code import find, is_own
from genray.evaluation.engines import copies_kept, engine_of
from genray.evaluation.robust import correct_flags, predictions
from genray.evaluation.saved_images import Saved, saved_images
from genray.evaluation.suite import ATTACKS, CASCADE, AttackSettings, build_evaluation_attack, expand_names, stage
from genray.models.activation_memory import kept_bytes
from genray.models.flops import forward_flops
from genray.types import ThreatModel, ball_names

NATURAL = "natural"
STAGE = "aa_"  # prefix of a cascade member's name
MARGIN_SLACK = 1e-4  # of the largest logit: smaller margins are rounding, which depends on the batch size


@dataclass(frozen=True)
class Request:
    """An evaluation.

    Attributes:
        threats: threat models; of one norm, the smallest radius first.
        attacks: names of columns or groups.
        step_sizes: norm -> step size of the gradient attacks; epsilon / 4 by default.
        seed: of all random numbers.
        block_size: examples a block.
        engine: key of `ENGINES`, for the members of AutoAttack; None: each norm's default.
        save_images: results hold the adversarial images.
    """

    threats: tuple[ThreatModel, ...]
    attacks: tuple[str, ...]
    step_sizes: dict
    seed: int = 0
    block_size: int = 100
    engine: str | None = None
    save_images: bool = False

    def own(self) -> dict:
        """Name -> class, of the attacks that are the user's or made on other networks.

        Raises:
            ConfigError: one cannot be imported.
        """
        return {name: find(name, ATTACKS) for name in self.attacks if is_own(name) or is_transfer(name)}

    def columns(self, norm) -> list[str]:
        """The attacks in one norm, in the paper's order."""
        return expand_names(self.attacks, norm)

    def engine_of(self, norm) -> str:
        """The engine of AutoAttack's members in one norm."""
        return engine_of(self.engine, norm)

    def balls(self) -> dict[str, ThreatModel]:
        """The threat models by their `ball_names`."""
        return dict(zip(ball_names(threat.record() for threat in self.threats), self.threats))

    def chains(self) -> list[list[tuple[str, str]]]:
        """For each norm and column, the (ball, attack) of its stages: each attacks what resists the one before.

        A column has a stage a radius, `aa` one a member of the cascade and radius: what fell has fallen at every
        larger radius.
        """
        found, balls = [], self.balls()
        for norm in dict.fromkeys(threat.norm for threat in self.threats):
            of_norm = [ball for ball, threat in balls.items() if threat.norm == norm]
            for column in self.columns(norm):
                attacks = [f"{STAGE}{member}" for member in CASCADE] if column == "aa" else [column]
                found.append([(ball, attack) for ball in of_norm for attack in attacks])
        return found

    def settings(self, ball, num_classes) -> AttackSettings:
        """Settings of the attacks in one ball."""
        threat = self.balls()[ball]
        return AttackSettings(threat, num_classes, self.seed, self.step_sizes.get(threat.norm), self.engine)


def default_block_size(shape) -> int:
    """Default number of examples a block, from the shape (C, H, W) of one: 100, or for tiny images as many as have
    16,384 values (256 of 8 x 8), 1,000 at most.

    Part of the protocol, so the rule does not depend on the machine. 100 tiny images are too few to use a core; more
    than 100 larger ones are no faster on a CPU.
    """
    return max(100, min(1000, 16_384 // math.prod(shape)))


# Images: those that resist an attack are packed into blocks again, and of few blocks some workers would have none.
MOST_ON_A_GPU = 3_200


def block_size_on(device: torch.device, model, shape) -> int:
    """Default number of examples a block on a device; on a GPU it depends on what is free, so the protocol states it.

    `default_block_size` on a CPU. On a GPU this is doubled as long as a gradient pass takes at most half of the free
    memory.

    Args:
        device: of the model.
        model: images (N, C, H, W) in [0, 1] -> logits (N, K).
        shape: (C, H, W) of an image.
    """
    free = free_on(device) if device.type != "cpu" else None
    if free is None:
        return default_block_size(shape)
    return doubled(default_block_size(shape), pass_bytes(model, shape, device), free // 2)


def doubled(size: int, each: float, room: int) -> int:
    """`size`, doubled while twice as many images of `each` bytes fit into `room` bytes; `MOST_ON_A_GPU` at most."""
    while 2 * size <= MOST_ON_A_GPU and 2 * size * each <= room:
        size *= 2
    return size


def pass_bytes(model, shape, device) -> float:
    """Bytes an image of a gradient pass: what it keeps, as much for gradients on their way, and 16 float32 images."""
    with temporary_mode(model, training=False), torch.enable_grad():
        kept = kept_bytes(lambda x: model(x.requires_grad_()), shape, device)
    return 2 * kept + 16 * 4 * math.prod(shape)


@dataclass(frozen=True)
class Task:
    """One attack (or `natural`, in the ball "none"; or a member of the cascade, `aa_<member>`) on one block."""

    attack: str
    ball: str  # of `Request.balls`
    block: int
    examples: tuple[int, ...] | None = None  # positions in the data set; None: the block's range

    @property
    def key(self) -> str:
        """A file name."""
        return quote(f"{self.ball}-{self.attack.replace(':', '.')}-{self.block:06d}", safe="=")


@dataclass(frozen=True)
class BlockResult:
    """Result of a task.

    Attributes:
        flags: column -> (n,) bool, True for examples that stayed correctly classified.
        longest: largest perturbation norm of a returned point, as a fraction of epsilon.
        problems: errors of returned points, one sentence each.
        seconds: run time.
        images: the `Saved` images that fell, if the request asks for them.
    """

    flags: dict
    longest: float = 0.0
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    images: Saved | None = None

    def record(self) -> dict:
        flags = {name: "".join("01"[int(flag)] for flag in values) for name, values in self.flags.items()}
        return {"flags": flags, "longest": self.longest, "problems": list(self.problems), "seconds": self.seconds}

    @classmethod
    def of_record(cls, record: dict) -> "BlockResult":
        flags = {name: np.array([c == "1" for c in text]) for name, text in record["flags"].items()}
        return cls(flags, record["longest"], tuple(record["problems"]), record["seconds"])


def run_here(queue, model, images, labels, num_classes, device, first=()):
    """Yields (task, result) of a `TaskQueue`, run in this process; the caller passes each to `queue.finish`.

    `first`: tasks taken from the queue before.
    """
    with fitting_threads(model, images, device) as (fit, _), copies_kept(model):
        while batch := first or queue.take():
            first = ()
            for task in batch:
                fit(queue.size(task))
                yield task, run_task(task, queue.request, model, images, labels, num_classes, device)


@contextmanager
def fitting_threads(model, images, device):
    """Yields (fit, FLOPs of an example's forward pass): `fit(batch size)` sets torch's threads by the work of a batch,
    at most as many as before; the number is restored at the end."""
    with threads_kept() as most:
        with torch.no_grad(), temporary_mode(model, training=False):
            flops = forward_flops(model, as_pixels(images[:1]).to(device))

        def fit(size):
            torch.set_num_threads(work_threads(size * flops, most))

        yield fit, flops


def run_task(task: Task, request: Request, model, images, labels, num_classes: int, device) -> BlockResult:
    """Runs one task.

    Args:
        task, request: the task and its evaluation.
        model: images (N, C, H, W) in [0, 1] -> logits (N, K), on `device`.
        images: (N, C, H, W) float32 in [0, 1] or uint8: the whole data set.
        labels: (N,) int64.
        num_classes: K.
        device: of the computation.
    """
    began = time.perf_counter()
    start = task.block * request.block_size
    examples = task.examples or range(len(labels))[start : start + request.block_size]
    x = as_pixels(images[list(examples)]).to(device)
    y = labels[list(examples)].to(device)
    natural = correct_flags(model, x, y)
    if task.attack == NATURAL:
        problems = check_outputs(model, x)
        return BlockResult({NATURAL: natural.numpy()}, 0.0, tuple(problems), time.perf_counter() - began)
    keep = natural.nonzero().flatten()
    at = keep.to(device)
    settings = request.settings(task.ball, num_classes)
    threat = settings.threat
    adversarial = _attacked(task, request, settings, model, x[at], y[at], [examples[i] for i in keep])
    after = predictions(model, adversarial) if len(keep) else keep
    survived = after == y[at].cpu()
    flags = np.zeros(len(x), dtype=bool)
    flags[keep.numpy()] = survived.numpy()
    longest, problems = check_points(x[at], adversarial, threat.norm, threat.radius)
    problems += check_scores(model, adversarial, y[at], survived)
    images = None
    if request.save_images:
        fell = ~survived
        images = saved_images(
            [examples[i] for i in keep[fell]],
            task.attack,
            threat,
            x[at][fell],
            adversarial[fell],
            y[at][fell],
            after[fell],
        )
    return BlockResult({task.attack: flags}, longest, tuple(problems), time.perf_counter() - began, images)


def _attacked(task, request, settings, model, x, y, indices):
    """Adversarial points for examples that are classified correctly."""
    if len(x) == 0:
        return x
    if task.attack.startswith(STAGE):
        position = task.block * request.block_size
        return stage(task.attack.removeprefix(STAGE), model, x, y, indices, settings, position)
    attack, _ = build_evaluation_attack(task.attack, settings)
    return attack(model, x, y, indices)


@torch.no_grad()
def check_outputs(model, x) -> list[str]:
    """Sentences about outputs that are not finite; none if all are."""
    with temporary_mode(model, training=False), full_precision():
        return _not_finite(model(x))


def _not_finite(logits) -> list[str]:
    wrong = int((~logits.isfinite()).any(1).sum())
    found = f"the outputs are NaN or infinite for {wrong} of {len(logits)} images: their flags mean nothing"
    return [found] if wrong else []


@torch.no_grad()
def check_scores(model, adversarial, y, survived) -> list[str]:
    """Sentences about returned points that are classified differently when the model gets them in another order.

    Points on the decision boundary, where attacks of least distance end, may be on either side of it by rounding;
    they are ignored.
    """
    if len(adversarial) == 0:
        return []
    with temporary_mode(model, training=False), full_precision():
        logits = model(adversarial.flip(0)).flip(0)
    margin = signed_margin(logits, y)
    clear = (margin.abs() > MARGIN_SLACK * logits.abs().amax(1)).cpu()
    different = int(((logits.argmax(1) == y).cpu().ne(survived) & clear).sum())
    found = _not_finite(logits)
    return [*found, f"{different} points are judged otherwise when scored again"] if different else found


def as_pixels(images) -> torch.Tensor:
    """float32 in [0, 1], from uint8 or float images."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
