"""The plan of a run as text, for `--dry-run`."""

import os
from collections.abc import Sequence

import torch

from genray.core.memory import bytes_text, free_memory
from genray.data.home_choice import FILE_SOURCES, choose_home
from genray.recording.table import extra_lines
from genray.run.cost import run_cost, step_passes
from genray.run.device_memory import memory_line
from genray.run.devices import local_device
from genray.run.probe import STEPS, pass_seconds, probe_steps, with_random_images
from genray.run.setup import RunSetup
from genray.types import ThreatModel

MIB = 2**20
MOST_PROBE_S = 10.0  # a probe of whole steps that would take longer is left out


def plan_text(setup: RunSetup, *, parameters: int, places: list[str], measured: Sequence[str] = ()) -> str:
    """The plan of a run.

    Args:
        setup: the prepared run.
        parameters: trainable scalars of the network.
        places: a line for each actor's placement.
        measured: result of `measured_lines`.
    """
    plan, config = setup.plan, setup.config
    splits = ", ".join(f"{len(split)} {name}" for name, split in setup.splits.items())
    shape = "x".join(str(side) for side in setup.splits["train"].shape)
    of_first = " like the first image" if config.data.source in ("parquet", "image_folder") else ""
    lines = [
        f"data           {config.data.source}: {splits}; {shape}{of_first}, {len(setup.class_names)} classes",
        *_data_lines(setup),
        f"model          {config.model.name}, {parameters:,} parameters, {setup.weight_bytes / MIB:.2f} MiB",
        f"steps          {config.training.epochs} epochs x {plan.steps_per_epoch} = {plan.total_steps} a learner, "
        f"batches of {config.training.batch_size}",
        f"compute        {_compute(config.compute)}",
        *(_learner_line(plan, name) for name in config.base_learners),
        _windows_line(plan),
        f"traffic        {len(config.base_learners)} x {setup.weight_bytes / MIB:.2f} MiB to the global learner at the "
        f"end of {sum(w.hands_over for w in plan.windows)} windows, as much back at each redistribution",
        f"checkpoints    every {config.checkpoint.every_epochs} epochs, {config.checkpoint.keep} kept",
        memory_line(setup),
        *(f"{'placement' if i == 0 else '':<14} {place}" for i, place in enumerate(places)),
        *measured,
    ]
    return "\n".join(lines)


def measured_lines(setup: RunSetup, runtime: str) -> list[str]:
    """Time and peak memory of a run on this machine, by three steps of each learner on random images.

    Where these would take too long, the time is that of one small pass times the passes of the cost model.
    """
    config, plan = setup.config, setup.plan
    if config.device == "cuda" and not torch.cuda.is_available():
        return ["time           not measured: this machine has no CUDA device"]
    device, cost, size = local_device(config), run_cost(plan, setup.splits), config.training.batch_size
    pace, an_image = pass_seconds(setup, device), {n: step_passes(lr) for n, lr in config.base_learners.items()}
    steps, how = {name: size * pace.of(passes) for name, passes in an_image.items()}, "predicted from a pass"
    memory = []
    if (STEPS + 1) * sum(steps.values()) <= MOST_PROBE_S:
        probe = probe_steps(with_random_images(setup), device)
        steps, how = probe.seconds, f"the median of {STEPS}"
        memory = [f"memory         {bytes_text(probe.peak_bytes)} at the peak of these steps, without the images"]
    training = {n: steps[n] * cost.learners[n].units / (size * an_image[n].units) for n in steps}
    seconds = sum(training.values())
    if runtime == "ray":
        devices = os.cpu_count() or 1 if device == "cpu" else torch.cuda.device_count()
        seconds = max(seconds / devices, *(training[name] / number for name, number in plan.workers.items()))
    seconds += pace.of(cost.evaluations + cost.table)
    each = ", ".join(f"{duration_text(steps[name])} ({name})" for name in steps)
    return [f"time           about {duration_text(seconds)}; a step takes {each}: {how}, on {device} now", *memory]


def duration_text(seconds: float) -> str:
    """A duration as text, with two digits."""
    unit, size = next((unit, size) for unit, size in UNITS if seconds < 100 * size or unit == "days")
    return f"{seconds / size:,.0f} {unit}" if seconds >= 100 * size else f"{seconds / size:.2g} {unit}"


UNITS = (("s", 1), ("min", 60), ("h", 3600), ("days", 86400))


def _data_lines(setup):
    data = setup.config.data
    columns = [f"{role} column {name}" for role, name in (("image", data.image_column), ("label", data.label_column))]
    lines = [*setup.notes, *(f"warning: {warning}" for warning in setup.warnings)]
    lines += [", ".join(columns)] if data.source == "parquet" else []
    nbytes, free = sum(split.home.nbytes for split in setup.splits.values()), free_memory()
    there = "" if free is None else f", {bytes_text(free)} are free on this machine"
    lines += extra_lines(setup.extra)
    kind, chosen = choose_home(data.home, nbytes, data.cache, data.source in FILE_SOURCES)
    takes = f"images take {bytes_text(nbytes)} of memory{there}"
    lines.append(takes if kind == "resident" else chosen or f"data.home: {kind}")
    return [f"{'':<14} {line}" for line in lines]


def _learner_line(plan, name):
    learner = plan.config.base_learners[name]
    how = " and ".join(_attack(attack) for attack in learner.all_attacks.values()) or "clean images"
    first, last = (plan.learning_rate(name, step) for step in (0, plan.total_steps - 1))
    weights = [plan.mixing_weight(name, step) for step in (0, plan.total_steps - 1)]
    method = f"{learner.objective.name}{', AWP' * bool(learner.awp)}"
    return (
        f"learner        {name}: {method}; {how}; lr {first:.4g} -> {last:.4g}; weight in theta_g "
        f"{weights[0]:.3g} -> {weights[1]:.3g}"
    )


def _attack(attack):
    steps = "APGD steps" if attack.algorithm == "apgd" else f"steps of {float(attack.step_size):.4g}"
    grows = f" (times {float(attack.scale.values[0]):g} -> 1)" if attack.scale else ""
    return f"{ThreatModel(attack.norm, attack.epsilon)}{grows}, {attack.num_steps} {steps}"


def _compute(compute):
    parts = [compute.precision, "channels_last" if compute.channels_last else "contiguous"]
    parts += ["BatchNorm folded for attacks"] * compute.fold_batch_norm + ["compiled"] * compute.compile
    parts += ["deterministic"] * compute.deterministic
    return ", ".join(parts)


def _windows_line(plan):
    first = next((w for w in plan.windows if w.redistribute), None)
    glob = plan.config.global_learner
    when = f"the first after epoch {first.epoch}" if first else "none"
    return (
        f"windows        {len(plan.windows)}, {plan.num_redistributions} redistributions "
        f"({glob.sync_unit}, c = {glob.sync_every}, t' = {glob.warmup_epochs:g}), {when}"
    )
