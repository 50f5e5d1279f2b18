"""What the evaluation command is pointed at: a run folder with its own data, or any model file with named data."""

from dataclasses import dataclass

from genray.config import RunConfig, load_stored_config
from genray.config.load import yaml_mapping
from genray.data.datasets import load_image_data
from genray.errors import CheckpointError, ConfigError
from genray.models import build_model
from genray.models.checkpoint_layouts import guess_architecture, load_into, read_checkpoint, read_file, read_metadata
from genray.models.load import load_model, model_of
from genray.storage import Storage


@dataclass(frozen=True)
class Named:
    """What the arguments of `python -m genray.evaluate` name, before anything large is read.

    Attributes:
        config: of a run folder; None for a model file.
        source: arguments of `load_image_data`.
        radii: norm -> number or text, where the arguments or the run say one.
    """

    config: RunConfig | None
    source: dict
    radii: dict


def look_at(args) -> Named:
    """Checks what the arguments name.

    Raises:
        InputError: something is absent or does not fit.
    """
    norms = args.norms.split(",")
    epsilon = given_by_norm("--epsilon", args.epsilon, norms)
    config = config_of(Storage(args.model))
    options = {"--arch": args.arch, "--width": args.width, "--normalize": args.normalize}
    for option, value in options.items():
        if config is not None and value is not None:
            raise ConfigError(f"{option}: has no effect on a run folder, whose model is known")
    source = _data_source(args.data) if args.data is not None else config and data_of(config)
    if not source:
        raise ConfigError(
            "--data: missing, expected SOURCE or SOURCE:PATH, for example cifar10 or parquet:/data/cifar10"
        )
    attack = config and config.evaluation.attack
    own = {attack.norm: attack.epsilon} if attack and attack.norm in norms else {}
    return Named(config, source, own | epsilon)


def load(args, named: Named, progress=None):
    """The model and its test images.

    Args:
        args: the arguments.
        named: of them.
        progress: as of `load_image_data`.

    Returns:
        (model, test split).

    Raises:
        InputError: something is unreadable or does not fit.
    """
    data = load_image_data(**named.source, decode=("test",), progress=progress)
    place = Storage(args.model)
    return (load_model(place) if named.config else _checkpoint(args, read_file(place), data)), data.test


def config_of(place: Storage):
    """The configuration of a run folder; None for a file.

    Raises:
        CheckpointError: nothing is there, or a folder that is no run's.
    """
    if not place.exists():
        raise CheckpointError(f"{place}: expected a run folder or a model file, there is nothing")
    if not place.is_folder():
        return None
    file = place / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{place}: expected a run folder or a model file, this folder has no config.yaml")
    try:
        return load_stored_config(yaml_mapping(file.read(), str(file)))
    except ConfigError as error:
        raise CheckpointError(f"{file}: not of this version of genray: {error.problems[0]}") from None


def data_of(config):
    keys = ("source", "path", "image_column", "label_column", "download", "image_size", "test_examples")
    return {key: getattr(config.data, key) for key in keys}


def _data_source(text):
    source, _, path = text.partition(":")
    return {"source": source, "path": path or None}


def _checkpoint(args, file, data):
    """A model file of any known producer, on the architecture that is named."""
    if not (args.arch or args.width or args.normalize) and "architecture" in read_metadata(file):
        return model_of(file)
    state = read_checkpoint(file)
    name = args.arch or guess_architecture(state)
    if name is None:
        raise CheckpointError(f"{file.where}: which architecture this is cannot be seen from its names; give --arch")
    shape = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": data.image_size}
    batch_norm = name == "small_cnn" and any(key.endswith(".running_mean") for key in state)
    model = build_model(name, width=args.width, batch_norm=batch_norm, **shape)
    load_into(model, file, normalize=args.normalize)
    return model.eval()


def given_by_norm(option, text, norms):
    """norm -> value from "8/255" (one norm) or "linf=8/255,l2=0.5"."""
    if text is None:
        return {}
    if "=" not in text:
        if len(norms) != 1:
            raise ConfigError(f"{option}: expected norm=value for each of {', '.join(norms)}, got {text!r}")
        return {norms[0]: text}
    pairs = [part.partition("=") for part in text.split(",")]
    unknown = [norm for norm, _, _ in pairs if norm not in norms]
    if unknown:
        raise ConfigError(f"{option}: expected those of {', '.join(norms)} (--norms), got one of {unknown[0]!r}")
    return {norm: radius for norm, _, radius in pairs}
