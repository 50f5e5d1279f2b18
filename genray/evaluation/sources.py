"""The model and data of the evaluation command: a run folder with its data, or any model file with named data."""

from dataclasses import dataclass, replace
from itertools import product

from genray.config import RunConfig, load_config
from genray.data.datasets import load_image_data
from genray.data.fingerprint import fingerprint
from genray.errors import CheckpointError, ConfigError
from genray.evaluation.job import as_pixels
from genray.evaluation.robust import correct_flags
from genray.interop.checkpoint_file import read_file
from genray.interop.checkpoint_layouts import UNKNOWN_NORMALIZATION, load_into, open_checkpoint, read_metadata
from genray.interop.load import load_model, model_of
from genray.interop.origin import origin_of
from genray.models import build_model
from genray.models.fit import fitting_architectures, listed
from genray.models.normalize import NORMALIZATIONS
from genray.storage import Storage
from genray.types import ThreatModel

PUBLISHED_SIDE = 32  # of the images of published networks with fixed pooling windows
TRIED = 100  # test images on which all networks that fit a file are compared


@dataclass(frozen=True)
class FileOptions:
    """How to read a model file that does not state it.

    Attributes:
        arch, width: of `build_model`.
        normalize: as in `load_into`.
        weights: name of one of several sets of weights.
    """

    arch: str | None = None
    width: int | None = None
    normalize: str | tuple | None = None
    weights: str | None = None

    def refuse(self):
        """Raises:
        ConfigError: one is given, for a run folder.
        """
        given = [f"--{name}" for name, value in vars(self).items() if value is not None]
        if given:
            raise ConfigError([f"{name}: has no effect on a run folder, whose model is known" for name in given])


@dataclass(frozen=True)
class Named:
    """A model and its data, before large files are read.

    Attributes:
        place: a run folder or a model file.
        config: of a run folder; None for a model file.
        options: of a model file.
        source: arguments of `load_image_data`.
        radii: norm -> number or text, set by the caller or the run.
    """

    place: Storage
    config: RunConfig | None
    options: FileOptions
    source: dict
    radii: dict


def look_at(
    model: str | Storage, data: str | None, norms, epsilon: dict, options: FileOptions = FileOptions()
) -> Named:
    """Checks the named model and data.

    Args:
        model: a run folder or a model file.
        data: SOURCE or SOURCE:PATH of the test images; None: the run's.
        norms: of the evaluation.
        epsilon: norm -> number or text, as far as given.
        options: of a model file.

    Raises:
        InputError: a file is absent or does not fit.
    """
    place = Storage(model)
    config = config_of(place)
    if config is not None:
        options.refuse()
    source = _data_source(data) if data is not None else config and data_of(config)
    if not source:
        raise ConfigError(
            "--data: missing, expected SOURCE or SOURCE:PATH, for example cifar10 or parquet:/data/cifar10"
        )
    return Named(place, config, options, source, (own_radius(config, norms) if config else {}) | epsilon)


def own_radius(config: RunConfig, norms) -> dict:
    """{norm: radius} of a run's own evaluation, if its norm is one of `norms`."""
    attack = config.evaluation.attack
    return {attack.norm: attack.epsilon} if attack.norm in norms else {}


def load(named: Named, progress=None):
    """The model and its test images.

    Args:
        named: what to load.
        progress: as in `load_image_data`.

    Returns:
        (model, test split).

    Raises:
        InputError: a file is unreadable or does not fit.
    """
    data = load_image_data(**named.source, decode=("test",), progress=progress)
    model = load_model(named.place) if named.config else model_of_file(named.options, read_file(named.place), data)
    origin = origin_of(model)
    if named.config and not origin.threats:  # a model file of an older version
        attack = named.config.evaluation.attack
        origin = replace(origin, threats=(ThreatModel(attack.norm, attack.epsilon),))
    other = look_at_data(origin, data.class_names, data.test, data.source)
    model.origin = replace(origin, findings=(*origin.findings, *other))  # type: ignore[assignment]
    return model, data.test


def look_at_data(origin, class_names, test, source) -> list[str]:
    """Findings about data that differ from those of the model's run.

    Args:
        origin: of the model.
        class_names, test, source: the data: one name a label, the `Split`, and the name as in `data.source`.
    """
    if not origin.class_names:
        return []
    if tuple(class_names) != origin.class_names:
        listed_names = [listed(names) for names in (origin.class_names, class_names)]
        counts = [len(origin.class_names), len(class_names)]
        return [
            f"the model tells {counts[0]} classes apart ({listed_names[0]}), the data are labelled with {counts[1]} "
            f"({listed_names[1]}): label numbers may mean something else"
        ]
    count = origin.data.get("test_images")
    if type(count) is not int or not 0 < count <= len(test):
        return []
    if fingerprint(*test.take(slice(count))) == origin.data.get("test_fingerprint"):
        return []
    own = origin.data.get("source")
    return [f"the images are not the test images of the model's run ({own}); they are of {source}"]


def config_of(place: Storage):
    """The configuration of a run folder; None for a file.

    Raises:
        CheckpointError: absent, or a folder without a run.
    """
    if not place.exists():
        raise CheckpointError(f"{place}: expected a run folder or a model file, there is nothing")
    if not place.is_folder():
        return None
    file = place / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{place}: expected a run folder or a model file, this folder has no config.yaml")
    try:
        return load_config(file)
    except ConfigError as error:
        raise CheckpointError(f"{file}: not of this version of genray: {error.problems[0]}") from None


def data_of(config):
    keys = ("source", "path", "image_column", "label_column", "download", "image_size", "test_examples")
    broken = {"on_broken": "skip"} if config.data.on_broken == "skip" else {}  # older records do not have it
    return {key: getattr(config.data, key) for key in keys} | broken


def test_images_of(run):
    """As `genray.test_images`, which describes the argument."""
    place = Storage(run)
    config = config_of(place)
    if config is None:
        raise CheckpointError(f"{place}: expected a run folder, got a file")
    return tuple(tensor.numpy() for tensor in load_image_data(**data_of(config), decode=("test",)).test.take())


def _data_source(text):
    source, _, path = text.partition(":")
    return {"source": source, "path": path or None}


def model_of_file(options: FileOptions, file, data):
    """Loads a model file of any known producer into the named architecture.

    Args:
        options: of the file.
        file: result of `read_file`.
        data: the `ImageData` that it is to be used on.

    Raises:
        CheckpointError: it is unreadable or does not fit.
    """
    if options == FileOptions() and "architecture" in read_metadata(file):
        return model_of(file)
    checkpoint = open_checkpoint(file, options.weights)
    described = checkpoint.metadata.get("architecture") or {}
    said, activation = described.get("name"), described.get("activation", "relu")
    names = [options.arch or said] if options.arch or said else fitting_architectures(checkpoint.state)
    if not names:
        first = listed(dict.fromkeys(name.partition(".")[0] for name in checkpoint.state))
        raise CheckpointError(
            f"{file.where}: which architecture this is cannot be seen from its names ({first}, ...); give --arch, "
            "or --weights for those that begin alike"
        )
    shape = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": data.image_size}
    batch_norm = any(key.endswith(".running_mean") for key in checkpoint.state)

    def build(name, normalize):
        own = {"width": options.width, "batch_norm": batch_norm and name == "small_cnn", "activation": activation}
        model = build_model(name, **own, **shape)
        load_into(model, file, normalize=normalize, part=options.weights)
        return model.eval()

    model = build(names[0], options.normalize)
    inputs = [options.normalize]
    if options.normalize is None and not checkpoint.says_normalization:
        inputs = ["none", *NORMALIZATIONS] if data.in_channels == 3 else ["none"]
    findings = [text for text in model.origin.findings if text != UNKNOWN_NORMALIZATION]
    if len(names) > 1 or inputs[0] != options.normalize:
        examples = data.test.first(min(len(data.test), TRIED))
        findings.append(_open_choice(names, inputs, build, examples, inputs[0] != options.normalize))
    if said is not None and said != names[0]:
        findings.append(f"the file says that it is a {said}, it was read as --arch {names[0]}")
    height, width = data.image_size
    if not said and names[0] != "small_cnn" and max(height, width) > PUBLISHED_SIDE:
        findings.append(
            f"the published {names[0]} pools windows that fit images of {PUBLISHED_SIDE} x {PUBLISHED_SIDE} pixels, on "
            f"{height} x {width} all positions are pooled: an average over more than its own code may take"
        )
    model.origin = replace(model.origin, findings=tuple(findings))
    return model


def _open_choice(names, normalizations, build, examples, is_silent) -> str:
    """The finding about a file that fits several networks: the options that select each."""
    images, y = examples.take()
    x = as_pixels(images)
    found = []
    for name, normalize in product(names, normalizations):
        words = [f"--arch {name}"] if len(names) > 1 else []
        words += [f"--normalize {normalize}"] if is_silent else []
        right = int(correct_flags(build(name, normalize), x, y).sum())
        found.append(f"{' '.join(words)} ({right} of {len(y)} images right)")
    others = f", not {', '.join(found[1:])}" if found[1:] else ""
    end = ", or --normalize MEAN:STD" if is_silent else ""
    return f"the file does not tell all of its network; taken was {found[0]}{others}: pass what it is{end}"
