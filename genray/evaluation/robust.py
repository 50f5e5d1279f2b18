"""Natural and PGD accuracy of a model, per example, the same however the examples are batched or sharded."""

from collections.abc import Iterator

import torch

from genray.attacks import ExampleDraw, build_attack, temporary_mode
from genray.core.determinism import full_precision


def correct_flags(model, x, y) -> torch.Tensor:
    """Which examples a model classifies correctly.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, K); used in eval mode, its mode is restored.
        x: (N, C, H, W) in [0, 1].
        y: (N,) int64.

    Returns:
        (N,) bool on the CPU.
    """
    return predictions(model, x) == y.cpu()


@torch.no_grad()
def predictions(model, x) -> torch.Tensor:
    """The class of the largest logit of each image, (N,) int64 on the CPU; `model` and `x` as in `correct_flags`."""
    with temporary_mode(model, training=False), full_precision():
        return model(x).argmax(1).cpu()


@torch.no_grad()
def predicted(model, images, batch_size: int, device) -> Iterator[tuple[int, torch.Tensor]]:
    """The class of the largest logit of each image, batch by batch.

    Args:
        model: as in `correct_flags`, on the device.
        images: (N, C, H, W) uint8.
        batch_size: images in a forward pass.
        device: of the model.

    Yields:
        (index of the batch's first image, (n,) int64 on the CPU).
    """
    for start in range(0, len(images), batch_size):
        with temporary_mode(model, training=False), full_precision():
            x = images[start : start + batch_size].to(device).float().div_(255)
            found = model(x).argmax(1).cpu()
        yield start, found


def attacked_flags(model, x, y, attack, *, seed, name, indices, attacked=None) -> torch.Tensor:
    """Which examples stay correct under an attack; `x` should be classified correctly.

    Args:
        model, x, y: as in `correct_flags`.
        attack: a `GradientAttack`.
        seed, name: key of the attack's random numbers, with `indices`.
        indices: (N,) position of each example in its data set.
        attacked: the same function as the model's in eval mode, cheaper to attack; None: the model. What counts is the
            model's answer to the images.

    Returns:
        (N,) bool on the CPU.
    """
    attacked = model if attacked is None else attacked
    with temporary_mode(attacked, training=False), full_precision():
        adversarial = attack(attacked, x, y, ExampleDraw(seed, name, indices))
    return correct_flags(model, adversarial, y)


def evaluate_chunk(
    model, split, start, stop, *, attack_config, seed, device, name=None, attacked=None
) -> dict[str, torch.Tensor]:
    """Per-example flags of examples [start, stop) of a split: natural, and under PGD where natural is right.

    Args:
        name: of the attack; by default `pgd_name`.
        attacked: as of `attacked_flags`.

    Returns:
        {"natural": (n,) bool, "pgd<steps>": (n,) bool} on the CPU.
    """
    name = name or pgd_name(attack_config)
    images, y = (part.to(device) for part in split.take(slice(start, stop)))
    x = images.float().div_(255)
    natural = correct_flags(model, x, y)
    robust = natural.clone()
    keep = natural.nonzero().flatten()
    if len(keep):
        at, how = keep.to(device), {"seed": seed, "name": name, "indices": (keep + start).tolist()}
        robust[keep] = attacked_flags(model, x[at], y[at], build_attack(attack_config), attacked=attacked, **how)
    return {"natural": natural, name: robust}


def pgd_name(attack_config) -> str:
    """Column name of a PGD evaluation: "pgd20"."""
    return f"pgd{attack_config.num_steps}"


def final_attacks(config) -> dict:
    """Attacks of a run's final table: `evaluation.attack`, and its number of steps in each other norm of a learner's
    attacks, with the largest radius among them.

    Returns:
        name -> `EvaluationAttackConfig`: {"pgd20": ..., "pgd20_l2": ...}.
    """
    first = config.evaluation.attack
    largest = {}
    for learner in config.base_learners.values():
        for attack in learner.all_attacks.values():
            if attack.norm != first.norm and attack.epsilon > getattr(largest.get(attack.norm), "epsilon", 0):
                largest[attack.norm] = attack
    others = {
        f"{pgd_name(first)}_{norm}": first.replace(
            norm=norm, epsilon=attack.epsilon, step_size=attack.step_size or attack.epsilon / 4
        )
        for norm, attack in largest.items()
    }
    return {pgd_name(first): first, **others}
