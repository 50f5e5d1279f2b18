"""A figure of test images with the predictions of two models: easy, hard, and adversarial for one of the two only.

The images and the attack are those of the first model's run: same test images, threat model, steps and random numbers.
"""

from dataclasses import dataclass

import torch

from genray.attacks import ExampleDraw, build_attack
from genray.config import RunConfig, load_config
from genray.core.determinism import full_precision
from genray.data.datasets import load_image_data
from genray.errors import CheckpointError, ConfigError, DataError
from genray.evaluation.contract import device_of
from genray.evaluation.robust import pgd_name
from genray.evaluation.sources import data_of
from genray.interop.load import load_model
from genray.recording.run_folder import LEARNERS
from genray.reporting.content import Figure
from genray.reporting.style import VERMILION, draw, label_text
from genray.storage import Storage, without_secrets
from genray.tables import printable

A_KIND = 4  # images of each kind
BLOCK = 50
KINDS = ("easy", "hard", "first", "second")


@dataclass(frozen=True)
class Side:
    """One of the two models: name, network, and the configuration of its run."""

    name: str
    network: torch.nn.Module
    config: RunConfig


@dataclass(frozen=True)
class Example:
    """A test image (C, H, W) in [0, 1] and its attacked copy; the predictions of both models for each of the two."""

    index: int
    label: str
    image: torch.Tensor
    attacked: torch.Tensor
    clean: tuple[str, str]
    under_attack: tuple[str, str]


def side_of(text: str) -> Side:
    """A model from the text of a user: a run folder (its theta_g), or a model file in a run folder.

    Raises:
        InputError: it is not one of these.
    """
    place = Storage(text)
    run = _run_of(place)
    if run is None or not place.exists():
        shown = without_secrets(text)
        raise CheckpointError(f"--gallery: expected a run folder or a model file in a run, got {shown!r}")
    try:
        config = load_config(run / "config.yaml")
    except (ConfigError, TypeError, ValueError):
        raise CheckpointError(f"{run / 'config.yaml'}: not of a genray run") from None
    what = "theta_g" if place.root == run.root else place.name.removesuffix(".pt")
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    return Side(printable(f"{config.name}: {what}", 60), load_model(place, device), config)


def _run_of(place):
    """The run folder that contains a place; None without one."""
    while not place.is_file("config.yaml"):
        above = place.parent
        if above.root == place.root:
            return None
        place = above
    return place


def default_sides(runs) -> tuple[str, str] | None:
    """theta_g and the first robust base learner of the first run that has the files of both."""
    for run in runs:
        robust = [name for name, learner in run.config.base_learners.items() if learner.is_robust]
        name = [*robust, *run.config.base_learners][0]
        files = ["model.pt", f"{LEARNERS}/{name}.pt"]
        if run.results and len(run.config.base_learners) > 1 and all(map(run.place.is_file, files)):
            return run.place.uri, (run.place / files[1]).uri
    return None


def make_gallery(first: str, second: str, most: int, progress) -> Figure:
    """Attacks test images of the first model's run, in their order, until the figure has all kinds of images.

    Args:
        first, second: the models, as in `side_of`.
        most: largest number of images to attack.
        progress: a `Progress`.

    Raises:
        InputError: a model or the images cannot be read, or do not fit each other.
    """
    sides = [side_of(first), side_of(second)]
    config = sides[0].config
    data = load_image_data(**{**data_of(config), "download": False}, decode=("test",))  # a report fetches nothing
    _check_fits(sides, data)
    number, examined, found = min(most, len(data.test)), 0, {kind: [] for kind in KINDS}
    progress.phase(f"gallery: attacking {number} images,", number, unit="images")
    attack = build_attack(config.evaluation.attack)
    while examined < number and min(map(len, found.values())) < A_KIND:
        stop = min(number, examined + BLOCK)
        for kind, example in examples_of(sides, data, range(examined, stop), attack):
            found[kind] += [example] if len(found[kind]) < A_KIND else []
        progress.steps(stop)
        examined = stop
    ball, names = config.evaluation.attack, [side.name for side in sides]
    rows = [(kind, example) for kind in KINDS for example in found[kind]]
    caption = (
        f"Each: image, change by the attack (grey: none; magnified), attacked image, of the first {examined} test "
        f"images; {pgd_name(ball)}, {ball.norm}, epsilon {float(ball.epsilon):.6g}. 1: {names[0]}; 2: {names[1]}; a → "
        "b: prediction without and under attack. Easy: both are right, also under attack; hard: one is wrong without "
        "any attack; adversarial for a model: the attack on it fools it, and the other one is right on that image and "
        "under the attack on itself."
    )
    return Figure("gallery", printable(caption, 900), draw_examples(rows, ball))


def _check_fits(sides, data):
    for side in sides:
        try:
            classes = _predict(side, data.test.take(slice(1))[0].float() / 255).shape[1]
        except RuntimeError:
            classes = None
        if classes != data.num_classes:
            got = "other images" if classes is None else f"one of {classes}"
            raise DataError(f"--gallery: expected a model of {data.num_classes} classes for {side.name}, got {got}")


@torch.no_grad()
def _predict(side, x):
    """(n, K) logits."""
    with full_precision():
        return side.network(x.to(device_of(side.network))).cpu()


def examples_of(sides, data, indices, attack):
    """Attacks test images with both models; yields (kind, `Example`)."""
    config, names = sides[0].config, [printable(name, 24) for name in data.class_names]
    images, y = data.test.take(slice(indices.start, indices.stop))
    x = images.float() / 255
    attacked = []
    for side in sides:
        device = device_of(side.network)
        draws = ExampleDraw(config.seed, pgd_name(config.evaluation.attack), indices)
        with full_precision():
            attacked.append(attack(side.network, x.to(device), y.to(device), draws).detach().cpu())
    clean = [_predict(side, x).argmax(1) for side in sides]
    under = [[_predict(side, images).argmax(1) for side in sides] for images in attacked]  # [attack on][model]
    for i, label in enumerate(y.tolist()):
        right = [int(of[i]) == label for of in clean]
        holds = [[int(of[i]) == label for of in models] for models in under]
        found = []
        if not all(right):
            found = [("hard", 0)]
        elif holds[0][0] and holds[1][1]:
            found = [("easy", 0)]
        else:
            for kind, me, other in (("first", 0, 1), ("second", 1, 0)):
                found += [(kind, me)] if not holds[me][me] and holds[me][other] and holds[other][other] else []
        for kind, victim in found:
            said = (tuple(names[int(of[i])] for of in models) for models in (clean, under[victim]))
            yield kind, Example(indices[i], names[label], x[i], attacked[victim][i], *said)


def draw_examples(rows: list[tuple[str, Example]], attack) -> dict:
    """The images of (kind, `Example`), one a row with the predictions beside it: {"png": bytes, "svg": bytes}."""
    titles = dict(zip(KINDS, ("Easy", "Hard", "Adversarial for 1", "Adversarial for 2")))

    def paint(axes):
        axes = axes if isinstance(axes, list) else [axes]
        for axis in axes:
            axis.axis("off")
        for axis, (kind, example) in zip(axes, rows):
            parts = [example.image, _magnified(example.attacked - example.image, attack), example.attacked]
            strip = torch.cat(parts, 2)[: 3 if len(example.image) == 3 else 1].permute(1, 2, 0).numpy()
            axis.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_anchor("W")
            axis.text(1.04, 0.95, f"{titles[kind]}: label {label_text(example.label)}", va="top", fontsize=7,
                      transform=axis.transAxes)  # fmt: skip
            for number, said in enumerate(zip(example.clean, example.under_attack)):
                wrong = {"color": VERMILION} if set(said) != {example.label} else {}
                axis.text(1.04, 0.6 - 0.35 * number, f"{number + 1}: {label_text(said[0])} → {label_text(said[1])}",
                          va="top", fontsize=7, transform=axis.transAxes, **wrong)  # fmt: skip

    number = max(1, len(rows))
    return draw(paint, width=4.4, height=0.75 * number, rows=number)


def _magnified(delta, attack):
    """Grey without a change; the largest change that is allowed (linf) or made is black or white."""
    largest = float(attack.epsilon) if attack.norm == "linf" else float(delta.abs().max())
    return (0.5 + delta / (2 * largest)).clamp(0, 1) if largest else torch.full_like(delta, 0.5)
