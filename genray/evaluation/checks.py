"""Reasons to distrust a robustness number (methods D7): checks of the model before, and of the numbers after.

Each finding is one sentence: the observation, its meaning, and what to do. A sound model gives none.
"""

import torch

from genray.attacks.gradient import input_gradient, temporary_mode
from genray.attacks.losses import LOSSES
from genray.attacks.transfer import is_transfer
from genray.core.determinism import full_precision
from genray.evaluation.hidden_gradients import look_at_layers
from genray.evaluation.suite import COLUMNS

FORWARDS = 5
LOGIT_TOLERANCE = 1e-4
PROBABILITY_TOLERANCE = 1e-5
PGD_SLACK, SQUARE_SLACK, CW_SLACK = 0.005, 0.002, 0.1  # differences of accuracies, as fractions
USE_EVAL = "use running statistics, as in eval mode"
CHANCE = 2  # examples whose result may differ with another random start
ROUNDING = 1e-9
NO_GRADIENT = "the outputs are not differentiable in the images: white-box attacks cannot work"


def look_at_origin(origin, threats, image_shape) -> list[str]:
    """Findings about a model's training and the threat models that it is measured in.

    Args:
        origin: the model's `Origin`.
        threats: the `ThreatModel`s of the evaluation.
        image_shape: (C, H, W).
    """
    findings = list(origin.findings)
    of_training = {threat.norm for threat in threats if threat in origin.threats}  # the other radii make its curve
    other = [threat for threat in threats if threat.norm not in of_training] if origin.threats else []
    if other:
        made_for = ", ".join(map(str, origin.threats))
        findings.append(f"measured at {', '.join(map(str, other))}, the model was trained for {made_for}")
    if origin.image_shape and tuple(image_shape) != origin.image_shape:
        shapes = [" x ".join(map(str, shape)) for shape in (image_shape, origin.image_shape)]
        findings.append(f"the images are {shapes[0]} (C x H x W), the model was trained on {shapes[1]}")
    return findings


def look_at_model(model, x, y) -> list[str]:
    """Findings about a model, from a batch.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, K), unwrapped.
        x: (N, C, H, W) float32, N >= 2.
        y: (N,) int64.
    """
    findings = []
    if any(module.training for module in model.modules()):
        findings.append("the model was in train mode; it is evaluated in eval mode")
    # Full precision: TF32's rounding would look like outputs that depend on the batch.
    with temporary_mode(model, training=False), full_precision():
        with torch.no_grad():
            runs = [model(x) for _ in range(FORWARDS)]
        logits = runs[0]
        if not bool(logits.isfinite().all()):
            return [
                *findings,
                "the outputs are NaN or infinite for some images: their flags mean nothing; mend the model",
            ]
        # Random outputs differ between batches too: only one of the two is reported.
        findings += _randomised(runs, y) or _batch_dependent(model, x, logits)
        findings += _softmax(logits) + _dynamic(model, x) + look_at_layers(model, x[:2])
        correct = logits.argmax(1) == y
        findings += _no_gradient(model, x[correct], y[correct]) if correct.any() else []
    return findings


def _randomised(runs, y):
    correct = {int((logits.argmax(1) == y).sum()) for logits in runs}
    units = [logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-12) for logits in runs]
    spread = max(float((unit - units[0]).norm(dim=1).max()) for unit in units)
    if len(correct) == 1 and spread <= LOGIT_TOLERANCE:
        return []
    return [
        "the outputs are random: attacks need gradients averaged over the randomness, and these do not average; do "
        "it in an attack of your own, these numbers are too high"
    ]


def _softmax(logits):
    inside = bool((logits >= 0).all() and (logits <= 1).all())
    sums = bool(((logits.sum(1) - 1).abs() <= PROBABILITY_TOLERANCE).all())
    if not (inside and sums):
        return []
    return [
        "the outputs are probabilities, not logits: losses saturate and attacks look weak; return what goes into the "
        "softmax"
    ]


def _batch_dependent(model, x, logits):
    try:
        with torch.no_grad():
            alone = torch.cat([model(x[i : i + 1]) for i in range(min(4, len(x)))])
    except ValueError:  # BatchNorm in train mode refuses a single value a channel
        return [f"an image's outputs depend on the others in its batch (alone it cannot be classified); {USE_EVAL}"]
    difference = float((alone - logits[: len(alone)]).abs().max() / logits.abs().max().clamp_min(1e-12))
    if difference <= LOGIT_TOLERANCE * 10:
        return []
    return [
        f"an image's outputs depend on the others in its batch (by {difference:.2g} of the largest logit); {USE_EVAL}"
    ]


def _dynamic(model, x):
    """A finding if the model computes gradients while it predicts, as a defence that optimises does."""
    calls, names = [], ("grad", "backward")  # Tensor.backward calls torch.autograd.backward
    originals = {name: getattr(torch.autograd, name) for name in names}

    def counted(original):
        return lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]

    try:
        for name, original in originals.items():
            setattr(torch.autograd, name, counted(original))
        with torch.no_grad():
            model(x[:2])
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)
    return ["gradients are computed during inference: only an attack adapted to that is a fair test"] if calls else []


def _no_gradient(model, x, y):
    """Findings for correctly classified images: only they are attacked, and the loss of others may be flat."""
    try:
        gradient = input_gradient(model, x, y, LOSSES["margin"])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [NO_GRADIENT]
    zero = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    if not zero:
        return []
    return [
        f"{zero} of {len(x)} images have a zero gradient of the margin loss: gradients are masked or saturated; trust "
        "square, fab_t and transfer more than the other columns"
    ]


def look_at_numbers(accuracy: dict, examples: int) -> list[str]:
    """Findings about the accuracies of one norm.

    Args:
        accuracy: column -> fraction, `natural` included.
        examples: N; a difference that two of them explain is no finding.
    """
    findings = []

    def below(first, second, slack):
        """Whether column `first` is lower than `second` by more than the slack."""
        if first not in accuracy or second not in accuracy:
            return False
        return accuracy[first] < accuracy[second] - max(slack, CHANCE / examples) - ROUNDING

    if below("pgd20", "pgd100", PGD_SLACK):
        findings.append(
            "PGD-100 leaves more standing than PGD-20: more steps should not be weaker; try a smaller --step-size"
        )
    white_box = [name for name in ("apgd_ce", "apgd_t", "fab_t") if name in accuracy]
    if white_box and all(below("square", name, SQUARE_SLACK) for name in white_box):
        findings.append(
            "Square, which sees no gradients, beats the white-box attacks: gradients are masked; believe the lower "
            "number"
        )
    for member in ("apgd_ce", "apgd_t", "fab_t", "square"):
        if below(member, "aa", SQUARE_SLACK):
            findings.append(
                f"AA is above its own member {member}: believe the lower number, and report it with the record"
            )
    if below("aa_square", "aa_fab_t", SQUARE_SLACK):
        findings.append(
            "Square lowers the white-box result of AA by more than 0.2 points: gradients may be masked; look for "
            "layers that hide them, and add transfer"
        )
    on_the_model = [name for name in accuracy if name in COLUMNS]
    for name in filter(is_transfer, accuracy):
        if on_the_model and all(below(name, other, SQUARE_SLACK) for other in on_the_model):
            findings.append(
                f"{name}, whose images are made on other networks, beats every attack on the model itself: gradients "
                "are masked; believe the lower number, and add square, which needs none"
            )
    if below("cw", "pgd20", CW_SLACK):
        findings.append("CW breaks far more than PGD-20: the cross-entropy may be saturated; look at the margin losses")
    return findings


def look_at_images(counts: dict) -> list[str]:
    """Findings about stored images: attack -> result of `scored_again`."""
    return [
        f"{of['stored'] - of['wrong']} of {of['stored']} stored images of {attack} are classified correctly when they "
        "are read back: they lie so near the boundary that rounding decides, or the outputs depend on the batch or on "
        "chance; where they are more than a few, look at the findings about the model"
        for attack, of in counts.items()
        if of["wrong"] < of["stored"]
    ]
