"""Test images with the predictions of two models: easy, hard, and adversarial for one and not for the other.

The layout is that of the slides' picture. Images and attack are those of the run's own evaluation: the same test
images, threat model, steps and random numbers.
"""

import io
from collections import Counter
from dataclasses import dataclass

import torch

from genray.attacks import ExampleDraw, build_attack
from genray.config import RunConfig, load_stored_config
from genray.config.load import yaml_mapping
from genray.core.determinism import full_precision
from genray.data.datasets import load_image_data
from genray.errors import CheckpointError, ConfigError, DataError
from genray.evaluation.contract import device_of
from genray.evaluation.robust import pgd_name
from genray.evaluation.sources import data_of
from genray.interop.load import load_model
from genray.recording.run_folder import LEARNERS
from genray.reporting.style import draw, label_text
from genray.storage import Storage, without_secrets
from genray.tables import printable

A_KIND = 5  # images shown of each kind
BLOCK = 50
KINDS = ("easy", "hard", "first", "second")


@dataclass(frozen=True)
class Side:
    """One of the two models: name, network, and the configuration of its run."""

    name: str
    network: torch.nn.Module
    config: RunConfig


@dataclass(frozen=True)
class Card:
    """One image: (C, H, W) arrays in [0, 1] of the image, its magnified perturbation and the attacked image; what
    both models say of the image and of the attacked one."""

    index: int
    label: str
    image: torch.Tensor
    perturbation: torch.Tensor
    attacked: torch.Tensor
    clean: tuple[str, str]
    under_attack: tuple[str, str]


@dataclass(frozen=True)
class Gallery:
    """Attributes:
    names: of the two models.
    examined: the first so many test images were looked at.
    attack: in words.
    cards: kind -> at most five.
    """

    names: tuple[str, ...]
    examined: int
    attack: str
    cards: dict[str, list[Card]]

    def heading(self, kind: str) -> tuple[str, str]:
        """Title and explanation of a kind."""
        first, second = self.names
        only = "{0} is fooled by the attack on itself; {1} is right on that image, and under the attack on itself."
        return {
            "easy": ("Easy", "Both models are right, and stay right under attack."),
            "hard": ("Hard", "At least one model is wrong without any attack."),
            "first": (f"Adversarial for {first}", only.format(first, second)),
            "second": (f"Adversarial for {second}", only.format(second, first)),
        }[kind]


def side_of(text: str) -> Side:
    """A model from what a user writes: a run folder (its theta_g), RUN:LEARNER, or a model file in a run folder.

    Raises:
        InputError: it is not one of these.
    """
    place, learner = Storage(text), ""
    if not place.exists() and ":" in text:
        head, _, learner = text.rpartition(":")
        place = Storage(head)
    run = _run_of(place)
    if run is None or not place.exists():
        shown = without_secrets(text)
        raise CheckpointError(f"--gallery: expected a run folder, RUN:LEARNER or a model file in a run, got {shown!r}")
    try:
        config = load_stored_config(yaml_mapping(run.read("config.yaml"), str(run / "config.yaml")))
    except (ConfigError, TypeError, ValueError):
        raise CheckpointError(f"{run / 'config.yaml'}: not of a genray run") from None
    if learner and learner not in config.base_learners:
        names = ", ".join(config.base_learners)
        raise CheckpointError(f"--gallery: expected a base learner of {place} ({names}), got {learner!r}")
    file = place / f"{LEARNERS}/{learner}.pt" if learner else place
    what = learner or ("theta_g" if place.root == run.root else place.name.removesuffix(".pt"))
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    return Side(printable(f"{config.name}: {what}", 60), load_model(file, device), config)


def _run_of(place):
    """The run folder that a place is or is in; None if it is in none."""
    while not place.is_file("config.yaml"):
        above = place.parent
        if above.root == place.root:
            return None
        place = above
    return place


def default_sides(runs) -> tuple[str, str] | None:
    """theta_g and the (first) robust base learner of the first run that has both."""
    for run in runs:
        robust = [name for name, learner in run.config.base_learners.items() if learner.is_robust]
        names = robust or list(run.config.base_learners)
        files = ["model.pt", *(f"{LEARNERS}/{name}.pt" for name in names[:1])]
        if run.results and len(run.config.base_learners) > 1 and all(map(run.place.is_file, files)):
            return run.place.uri, f"{run.place.uri}:{names[0]}"
    return None


def make_gallery(first: str, second: str, most: int, progress) -> Gallery:
    """Looks at test images of the first model's run, in their order, until every kind is full.

    Args:
        first, second: as `side_of` takes them.
        most: at most so many images.
        progress: a `Progress`.

    Raises:
        InputError: a model or the images cannot be read, or do not fit each other.
    """
    sides = [side_of(first), side_of(second)]
    if sides[0].config is not sides[1].config and sides[0].config.name == sides[1].config.name:
        short = [side.name.rpartition(": ")[2] for side in sides]
        sides = [Side(n, s.network, s.config) for n, s in zip(short, sides)] if len(set(short)) > 1 else sides
    config = sides[0].config
    data = load_image_data(**{**data_of(config), "download": False}, decode=("test",))  # a report fetches nothing
    _check_fits(sides, data)
    number, examined, found = min(most, len(data.test)), 0, {kind: [] for kind in KINDS}
    progress.phase(f"gallery: attacking {number} images,", number, unit="images")
    attack = build_attack(config.evaluation.attack)
    while examined < number and min(map(len, found.values())) < A_KIND:
        stop = min(number, examined + BLOCK)
        for kind, score, card in _look(sides, data, range(examined, stop), attack):
            found[kind].append((score, card))
        progress.steps(stop)
        examined = stop
    ball = config.evaluation.attack
    words = f"{pgd_name(ball)}, {ball.norm}, epsilon {float(ball.epsilon):.6g}"
    cards = {kind: _best(of) for kind, of in found.items()}
    return Gallery(tuple(side.name for side in sides), examined, words, cards)


def _check_fits(sides, data):
    for side in sides:
        try:
            classes = _predict(side, data.test.images[:1].float() / 255).shape[1]
        except RuntimeError:
            classes = None
        if classes != data.num_classes:
            got = "other images" if classes is None else f"one of {classes}"
            raise DataError(f"--gallery: expected a model of {data.num_classes} classes for {side.name}, got {got}")


@torch.no_grad()
def _predict(side, x):
    """(n, K) probabilities."""
    with full_precision():
        return side.network(x.to(device_of(side.network))).softmax(1).cpu()


def _look(sides, data, indices, attack):
    """Attacks test images with both models; yields (kind, how good an example: the lower, `Card`)."""
    config, names = sides[0].config, [printable(name, 24) for name in data.class_names]
    settings = config.evaluation.attack
    x, y = data.test.images[indices.start : indices.stop].float() / 255, data.test.labels[indices.start : indices.stop]
    attacked = []
    for side in sides:
        device, draw_ = device_of(side.network), ExampleDraw(config.seed, pgd_name(settings), indices)
        with full_precision():
            attacked.append(attack(side.network, x.to(device), y.to(device), draw_).detach().cpu())
    clean = [_predict(side, x) for side in sides]
    under = [[_predict(side, images) for side in sides] for images in attacked]  # [attack on][model]
    for i, label in enumerate(y.tolist()):

        def card(victim, i=i, label=label):
            said = ([names[int(of[i].argmax())] for of in model] for model in (clean, under[victim]))
            image, moved = x[i], attacked[victim][i]
            return Card(indices[i], names[label], image, _magnified(moved - image, settings), moved, *map(tuple, said))

        right = [bool(of[i].argmax() == label) for of in clean]
        holds = [[bool(of[i].argmax() == label) for of in models] for models in under]
        own = [float(under[k][k][i, label]) for k in (0, 1)]
        if all(right) and holds[0][0] and holds[1][1]:
            yield "easy", -min(own), card(0)
        elif not all(right):
            yield "hard", sum(float(of[i, label]) for of in clean), card(0)
        for kind, me, other in (("first", 0, 1), ("second", 1, 0)):
            if all(right) and not holds[me][me] and holds[me][other] and holds[other][other]:
                yield kind, own[me], card(me)


def _magnified(delta, attack):
    """Grey where nothing is changed; the largest change that is allowed (linf) or made becomes black or white."""
    largest = float(attack.epsilon) if attack.norm == "linf" else float(delta.abs().max())
    return (0.5 + delta / (2 * largest)).clamp(0, 1) if largest else torch.full_like(delta, 0.5)


def _best(found):
    """The best of each class, then their second best, and so on."""
    seen, rated = Counter(), []
    for score, card in sorted(found, key=lambda pair: (pair[0], pair[1].index)):
        rated.append((seen[card.label], score, card.index, card))
        seen[card.label] += 1
    return [card for *_, card in sorted(rated, key=lambda entry: entry[:3])[:A_KIND]]


def png_of(image: torch.Tensor) -> bytes:
    """A (C, H, W) image in [0, 1] as a PNG file; of other than one or three channels, the first."""
    from PIL import Image

    pixels = _pixels(image)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(image):
    channels = image if len(image) in (1, 3) else image[:1]
    return channels.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()


def draw_gallery(gallery: Gallery) -> dict:
    """The whole gallery as one figure: {"png": bytes, "svg": bytes}."""
    kinds = [kind for kind in KINDS if gallery.cards[kind]]

    def paint(axes):
        axes = axes if isinstance(axes, list) else [axes]
        for axis in axes:
            axis.axis("off")
        for row, kind in enumerate(kinds):
            for column, card in enumerate(gallery.cards[kind]):
                axis = axes[row * A_KIND + column]
                strip = torch.cat([card.image, card.perturbation, card.attacked], 2)
                pixels = _pixels(strip)
                axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255,
                            interpolation="nearest")  # fmt: skip
                said = [f"{n}: {c} → {u}" for n, c, u in zip(gallery.names, card.clean, card.under_attack)]
                axis.set_title("\n".join([label_text(f"label {card.label}"), *(label_text(s, 40) for s in said)]),
                               fontsize=6.5, loc="left")  # fmt: skip
            axes[row * A_KIND].text(-0.02, 0.5, label_text(gallery.heading(kind)[0], 40), rotation=90, fontsize=7,
                                    ha="right", va="center", transform=axes[row * A_KIND].transAxes)  # fmt: skip

    return draw(paint, width=12, height=1.5 * max(1, len(kinds)), rows=max(1, len(kinds)), columns=A_KIND)
