"""What a model file says of its model beside the weights; `genray.interop.origin` is the way back."""

from genray.data.fingerprint import fingerprint
from genray.interop.origin import threat_records
from genray.types import ThreatModel

IMAGES = 100  # first test images that tell the data; few, so that a shorter test split can still be compared


def describe_model(setup, learner: str | None = None) -> dict:
    """Metadata of a model of a run, plain data.

    Args:
        setup: the run's `RunSetup`.
        learner: whose own model it is; None for theta_g and mixtures, which all learners made.

    Returns:
        {"architecture", "threat_models", "class_names", "data", "run", "seed"}; the first threat model is the one that
        the run is evaluated with, the others are those of its training.
    """
    config, test = setup.config, setup.splits["test"]
    learners = [config.base_learners[learner]] if learner else config.base_learners.values()
    attacks = [config.evaluation.attack, *(attack for part in learners for attack in part.all_attacks.values())]
    count = min(IMAGES, len(test))
    data = {"source": config.data.source, "test_images": count}
    data |= {"test_fingerprint": fingerprint(*test.take(slice(count)))}
    return {
        "architecture": {
            k: list(v) if isinstance(v, tuple) else v for k, v in setup.architecture.items() if k != "factory"
        },
        "threat_models": threat_records(ThreatModel(attack.norm, attack.epsilon) for attack in attacks),
        "class_names": list(setup.class_names),
        "data": data,
        "run": config.name,
        "seed": config.seed,
    }
