"""The metadata of a model file: threat models and data of the training, and open questions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from genray.config.values import parse_fraction
from genray.types import NORMS, ThreatModel, fraction_text


@dataclass(frozen=True)
class Origin:
    """Attributes:
    threats: threat models that the model was chosen by (the first) and trained for.
    image_shape: (C, H, W) that it was trained on; empty where it is not known.
    class_names: of its logits, in their order; empty where it is not known.
    data: {"source", "test_images": n, "test_fingerprint": of the first n test images} of its run; may be empty.
    findings: what the file leaves open, one sentence each; they go into the record of an evaluation.
    """

    threats: tuple[ThreatModel, ...] = ()
    image_shape: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    data: Mapping = field(default_factory=dict)
    findings: tuple[str, ...] = ()

    @classmethod
    def of(cls, metadata: Mapping) -> "Origin":
        """What the metadata of a model file say; files of older versions say less.

        Raises:
            ValueError: they are not what genray writes.
        """
        try:
            threats = [ThreatModel(t["norm"], parse_fraction(t["epsilon"])) for t in metadata.get("threat_models", [])]
            if any(threat.norm not in NORMS or threat.epsilon <= 0 for threat in threats):
                raise ValueError("threat_models")
            architecture = metadata.get("architecture") or {}
            shape = (architecture.get("in_channels"), *architecture.get("image_size", ()))
            return cls(
                tuple(threats),
                shape if len(shape) == 3 and all(type(side) is int for side in shape) else (),
                tuple(str(name) for name in metadata.get("class_names") or ()),
                dict(metadata.get("data") or {}),
            )
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def radii(self) -> dict:
        """norm -> radius to be measured at: that it was chosen by, or the largest that it was trained for."""
        found = {}
        for threat in sorted(self.threats, key=lambda threat: -threat.epsilon):
            found.setdefault(threat.norm, threat.epsilon)
        return found | {threat.norm: threat.epsilon for threat in self.threats[:1]}


def origin_of(model: nn.Module) -> Origin:
    """The origin that `load_into` gave a model; an empty one for any other model."""
    found = getattr(model, "origin", None)
    return found if isinstance(found, Origin) else Origin()


def threat_records(threats) -> list[dict]:
    """Threat models as a model file holds them, each once."""
    return [{"norm": threat.norm, "epsilon": fraction_text(threat.epsilon)} for threat in dict.fromkeys(threats)]
