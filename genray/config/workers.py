"""Conditions of several actors for one batch (`workers`) and for all learners' attacks (`share_attack`)."""

from collections.abc import Iterator

from genray.config.schema import BaseLearnerConfig, RunConfig


def worker_problems(config: RunConfig) -> Iterator[str]:
    """Yields the settings that cannot be divided among actors, or would compute something else than one process."""
    learners = config.base_learners
    for name, learner in learners.items():
        for field in ("accelerator_type", "label_selector"):
            if learner.workers == "auto" and getattr(learner.resources, field):
                yield (
                    f"base_learners.{name}.workers: expected a number with resources.{field}, because auto takes all "
                    "nodes for equal; got auto"
                )
        if learner.workers != 1:
            yield from _divided(f"base_learners.{name}", learner, config)
    if config.runtime.share_attack:
        yield from _shared(config)


def _divided(at: str, learner: BaseLearnerConfig, config: RunConfig) -> Iterator[str]:
    size = config.training.batch_size
    if learner.workers != "auto" and learner.workers > size:
        yield f"{at}.workers: expected at most the {size} images of a batch, got {learner.workers}"
    if config.compute.compile:
        yield f"compute.compile: expected false with {at}.workers: {learner.workers}, whose layers talk to each other"
    for key, attack in learner.all_attacks.items():
        if attack.tau is not None and attack.mode == "train":
            field = "attack" if learner.attack else f"attacks.{key}"
            yield (
                f"{at}.{field}.mode: expected eval with tau and workers: {learner.workers}; the parts of a batch would "
                "stop at different steps, and BatchNorm looks at all of them"
            )


def _shared(config: RunConfig) -> Iterator[str]:
    field, learners = "runtime.share_attack", config.base_learners
    if not any(learner.is_robust for learner in learners.values()):
        yield f"{field}: has no effect, no base learner has an attack"
    elif len(learners) == 1 and next(iter(learners.values())).workers == 1:
        yield f"{field}: has no effect with one base learner; its own workers divide its attack"
    for name, learner in learners.items():
        if learner.workers == "auto":
            yield (
                f"base_learners.{name}.workers: expected a number with {field}, which spreads the attacks over all "
                "actors itself; got auto"
            )
        for key, attack in learner.all_attacks.items():
            if attack.mode == "train":
                at = "attack" if learner.attack else f"attacks.{key}"
                yield (
                    f"base_learners.{name}.{at}.mode: expected eval with {field}; in train mode BatchNorm looks across "
                    "the batch, and moves"
                )
