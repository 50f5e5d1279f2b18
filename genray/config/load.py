"""Reads a YAML file and overrides into one checked `RunConfig`, and writes it back as YAML."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from genray.config.extra import extra_problems
from genray.config.model import collect, wrong
from genray.config.schema import BaseLearnerConfig, EvaluationAttackConfig, RunConfig, linf_radius_problems
from genray.config.values import Schedule
from genray.config.workers import worker_problems
from genray.errors import ConfigError, RunFolderError, one_line

MAX_DEPTH = 20  # levels of a configuration; ours has six
DEFAULT_CONFIG = Path(__file__).parent / "digits.yaml"
RESERVED = ("global", "global_last")  # rows of the results beside the base learners
DROPPED = {  # fields of earlier versions
    "training": ("on_non_finite", "rollback_lr_factor", "max_rollbacks"),
    "data": ("unlabeled",),
}
FOLLOW_DATA = ("data.train_examples", "data.test_examples", "data.validation_examples", "evaluation.examples")


class _Loader(yaml.SafeLoader):
    """A safe loader with the few types of YAML 1.2; a repeated key is refused, where YAML keeps the last one.

    PyYAML's own rules are those of YAML 1.1, where `no` is false, `010` is 8, `1:20` is 80 and `2024-11-30` a date.
    What is a number, a truth value or null here is the same there, so that files that PyYAML wrote are read as before.
    """

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, str(key_node.value))
            if key in seen and isinstance(key_node, yaml.ScalarNode):
                problem = f"key {key_node.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


TAG = "tag:yaml.org,2002:"
for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"-?(0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(TAG + tag, re.compile(f"^({pattern})$"), first)


def parse_yaml(text: str, where: str) -> Any:
    """Returns the content of YAML text: safe tags only, a finite tree.

    Unquoted `true`, `false`, `null` (or `~`, or nothing) and decimal numbers without leading zeros have these types;
    everything else is text.

    Raises:
        ConfigError: anything else; PyYAML raises many kinds for hostile text.
    """
    try:
        content = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{where} is not valid YAML: nested too deeply") from None
    except Exception as error:
        raise ConfigError(f"{where} is not valid YAML: {_one_line(error)}") from None
    if not _is_finite(content):
        raise ConfigError(f"{where} is not valid YAML: nested too deeply, or an alias that contains itself")
    return content


def _is_finite(content: Any, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        return False
    children = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return all(_is_finite(child, depth + 1) for child in children)


def _one_line(error: Any) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if problem is None:
        return one_line(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def read_yaml(path: Any) -> dict:
    """Reads a mapping from a YAML file.

    Args:
        path: local path, URI or `Storage`.

    Raises:
        ConfigError: absent, unreadable, not YAML or not a mapping; names the file and the line.
    """
    from genray.storage import Storage  # not above: a configuration without a file needs no file systems

    try:
        place = Storage(path)
        content = place.read()
    except RunFolderError as error:
        raise ConfigError(str(error)) from None
    return yaml_mapping(content, str(place))


def yaml_mapping(content: bytes, where: str) -> dict:
    """Returns the mapping in the content of a YAML file; raises the errors of `read_yaml`, which name `where`."""
    try:
        text = content.decode()
    except ValueError:
        raise ConfigError(f"{where}: expected a YAML text file, got bytes that are not UTF-8") from None
    data = parse_yaml(text, f"{where}:")
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected key: value lines, got {type(data).__name__}")
    return data


def listed_overrides(overrides: Any) -> list:
    """Returns overrides of any accepted form as a list of "a.b.c=value" strings and mappings.

    Raises:
        ConfigError: something else is among them.
    """
    given = [overrides] if isinstance(overrides, (str, Mapping)) else overrides
    if not isinstance(given, Iterable):
        raise ConfigError(f"overrides: expected key=value strings or a mapping, got {given!r}")
    given = list(given)
    problems = [
        f"overrides: expected key=value strings or mappings, got {override!r}"
        for override in given
        if not isinstance(override, (str, Mapping))
    ]
    if problems:
        raise ConfigError(problems)
    return given


def apply_overrides(data: dict, overrides: Any) -> dict:
    """Returns `data` with every override applied, in order.

    Args:
        data: plain configuration.
        overrides: a list of "a.b.c=value" strings, whose value is read as YAML, and of mappings with nested or dotted
            keys, whose values are taken as they are; or one of these alone. null (None) removes a mapping's entry.

    Raises:
        ConfigError: an override without "=", with an empty key or a value that is not YAML.
    """
    problems, result = [], _copy(data)
    for override in listed_overrides(overrides):
        for parts, value in _leaves(override) if isinstance(override, Mapping) else _read_override(override, problems):
            _put(result, parts, value, ".".join(parts), problems)
    if problems:
        raise ConfigError(problems)
    return result


def _read_override(text: str, problems: list[str]) -> list[tuple[list[str], Any]]:
    """[(parts of the key, value)] of "a.b.c=value"; empty after adding to `problems`."""
    key, equals, text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        cure = "--config for a file" if key.endswith((".yaml", ".yml")) else "for example training.epochs=10"
        problems.append(f"{key + equals + text!r}: expected key=value, {cure}")
        return []
    try:
        return [(parts, parse_yaml(text, f"{key}: value {text if len(text) < 80 else text[:77] + '...'!r}"))]
    except ConfigError as error:
        problems += error.problems
        return []


def _leaves(mapping: Mapping[str, Any], above: Any = ()) -> Iterator[tuple[list[str], Any]]:
    """(parts of the key, value) of everything in a nested mapping that is no section itself.

    A section that says its name is a choice with settings of its own, and is put in as a whole.
    """
    for key, value in mapping.items():
        parts = [*above, *str(key).split(".")]
        if isinstance(value, Mapping) and value and "name" not in value:
            yield from _leaves(value, parts)
        else:
            yield parts, _copy(value)


def _put(node: dict[str, Any], parts: list[str], value: Any, key: str, problems: list[str]) -> None:
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        elif isinstance(child, str) and part in ("objective", "optimizer"):
            child = node[part] = {"name": child}  # a bare name grows into a section
        if not isinstance(child, dict):
            problems.append(f"{key}: {part} is not a section but {child!r}")
            return
        node = child
    node[parts[-1]] = value


def _copy(data: Any) -> Any:
    """A copy of the sections, whose keys are text, even `7`."""
    if not isinstance(data, Mapping):
        return data
    return {str(key) if type(key) is int else key: _copy(value) for key, value in data.items()}


@dataclass(frozen=True)
class Loaded:
    """Attributes:
    config: the run's.
    follows: its fields, as "section.field", that nobody has asked for in this run, and that follow its data: defaults,
        and those of a file whose data was overridden.
    notes: a line for each field that has followed another already.
    """

    config: RunConfig
    follows: frozenset
    notes: tuple


def load_config(source: Any = None, overrides: Any = ()) -> RunConfig:
    """Reads, overrides, completes and checks one run's configuration.

    Args:
        source: path or `Storage` of a YAML file, a mapping, a `RunConfig`, or None for the embedded digits run. The
            `versions` in a run's own `config.yaml` are a record, not configuration.
        overrides: as in `apply_overrides`.

    Raises:
        ConfigError: with one line for every mistake found.
    """
    return load_run(source, overrides).config


def load_run(source: Any = None, overrides: Any = ()) -> Loaded:
    """Loads a configuration as `load_config`, with its derived and data-dependent fields named."""
    if isinstance(source, RunConfig):
        source = to_dict(source)
    if source is not None and not isinstance(source, (str, os.PathLike, Mapping)):
        raise ConfigError(f"config: expected the path of a YAML file or a mapping, got {type(source).__name__}")
    data = source if isinstance(source, Mapping) else read_yaml(DEFAULT_CONFIG if source is None else source)
    data = {key: value for key, value in data.items() if key != "versions"}
    before, data, typed = data, apply_overrides(data, overrides), _typed(overrides)
    notes = (*_drop_fields(data), *_follow_epochs(before, data, typed))
    config, problems = collect(RunConfig, data)
    if config is not None:
        config = complete(config, problems)
    if config is None or problems:
        raise ConfigError(problems)
    return Loaded(config, _following(data, typed), notes)


def _typed(overrides: Any) -> set[str]:
    """Keys that overrides name."""
    listed = (
        _leaves(override) if isinstance(override, Mapping) else _read_override(override, [])
        for override in listed_overrides(overrides)
    )
    return {".".join(parts) for leaves in listed for parts, _ in leaves}


def _follow_epochs(before: dict[str, Any], data: dict[str, Any], typed: set[str]) -> tuple[str, ...]:
    """Where only the epochs were overridden, lowers t' with them, and moves the epochs at which learners begin and end.

    Returns:
        A line for each change.
    """
    epochs, was = (_positive(config.get("training"), "epochs") for config in (data, before))
    if epochs is None or was is None or "training.epochs" not in typed:
        return ()
    learners = data.get("base_learners")
    sections = {f"base_learners.{name}": one for name, one in (learners if isinstance(learners, dict) else {}).items()}
    notes = []
    for path, section in {"global_learner": data.get("global_learner"), **sections}.items():
        for name in ("warmup_epochs",) if path == "global_learner" else ("from_epoch", "until_epoch"):
            found, moved = _positive(section, name), None
            if found and f"{path}.{name}" not in typed and (path in sections or epochs < found <= was):
                moved = max(round(found / was * epochs), int(path in sections))
            if moved is not None and moved != found:
                section[name] = moved
                notes.append(
                    f"{path}.{name}: {moved} instead of {found:g}, as training.epochs is {epochs:g} instead of {was:g}"
                )
    return tuple(notes)


def _drop_fields(data: dict[str, Any]) -> Iterator[str]:
    """Removes fields that only earlier versions had; yields a line for each that asked for something."""
    for section, fields in DROPPED.items():
        given: Any = data.get(section)
        for name in fields if isinstance(given, Mapping) else ():
            value = given.pop(name, None)
            if name == "unlabeled" and value is not None:
                problem = "no longer read; `genray label` writes pseudo-labels, and data.extra trains on them"
                raise ConfigError(f"data.unlabeled: {problem}")
            if value == "rollback":
                yield f"{section}.{name}: rollback no longer exists; a learner whose numbers fail ends the run"


def _positive(section: Any, name: str) -> Any:
    value = section.get(name) if isinstance(section, Mapping) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None


def _following(data: dict[str, Any], typed: set[str]) -> frozenset[str]:
    other_data = any(key == "data" or key.startswith("data.") for key in typed)
    written = {f"{section}.{name}" for section in ("data", "evaluation") for name in data.get(section) or {}}
    return frozenset(key for key in FOLLOW_DATA if key not in typed and (other_data or key not in written))


def complete(config: RunConfig, problems: list[str]) -> RunConfig:
    """Fills what is derived (mixing weights, t', the evaluation's attack) and checks conditions between fields."""
    _check_learners(config, problems)
    problems += extra_problems(config)
    problems += worker_problems(config)
    glob = config.global_learner.replace(
        gamma=None,
        mixing_weights=_mixing_weights(config, problems),
        warmup_epochs=_warmup(config, problems),
    )
    evaluation = config.evaluation.replace(attack=_evaluation_attack(config, problems))
    if evaluation.select_on == "validation" and config.data.validation_examples == 0:
        problems.append(
            "data.validation_examples: expected at least 1 with evaluation.select_on: validation, got 0 "
            "(evaluation.select_on: test chooses on the test images instead)"
        )
    return config.replace(global_learner=glob, evaluation=evaluation)


def _check_learners(config: RunConfig, problems: list[str]) -> None:
    for name, learner in config.base_learners.items():
        path, gpus = f"base_learners.{name}", learner.resources.num_gpus
        if name in RESERVED:
            problems.append(f"{path}: expected another name; results keep {name} for theta_g")
        problems += _interval_problems(path, name, config)
        if config.compute.compile and any(attack.tau is not None for attack in learner.all_attacks.values()):
            problems.append(
                f"{path}.attack.tau: expected none with compute.compile: each of its steps has another size"
            )
        if config.device == "cpu" and gpus not in ("auto", 0):
            problems.append(f"{path}.resources.num_gpus: expected 0 with device: cpu, got {gpus:g}")
        if config.device == "cuda" and gpus == 0:
            problems.append(f"{path}.resources.num_gpus: expected more than 0 with device: cuda, got 0")


def _interval_problems(path: str, name: str, config: RunConfig) -> Iterator[str]:
    """What is wrong with when a learner trains, and from which weights or towards which target."""
    learner, epochs = config.base_learners[name], config.training.epochs
    others = [other for other in config.base_learners if other != name]
    target = getattr(learner.objective, "target", None)
    for field, other in (("starts_from", learner.starts_from), ("objective.target.learner", target and target.learner)):
        if other is not None and other not in others:
            yield wrong(
                f"{path}.{field}", f"another base learner ({', '.join(others) or 'there is none'})", other, others
            )
    stop = epochs if learner.until_epoch is None else learner.until_epoch
    if stop > epochs:
        yield f"{path}.until_epoch: expected at most training.epochs ({epochs}), got {stop}"
    elif learner.from_epoch >= stop:
        yield f"{path}.from_epoch: expected less than the epoch at which it ends ({stop}), got {learner.from_epoch}"
    if bool(learner.from_epoch) != (learner.starts_from is not None):
        yield f"{path}.from_epoch: expected starts_from and an epoch from 1 on, or neither, got {learner.from_epoch}"
    elif learner.starts_from in others and config.base_learners[learner.starts_from].from_epoch >= learner.from_epoch:
        yield f"{path}.from_epoch: expected an epoch after the first of {learner.starts_from}, got {learner.from_epoch}"


def _mixing_weights(config: RunConfig, problems: list[str]) -> dict[str, Schedule] | None:
    """`gamma` or `mixing_weights` as one schedule a learner; the weights sum to 1 at every position."""
    learners, glob = config.base_learners, config.global_learner
    given = glob.mixing_weights
    if glob.gamma is not None and given is not None:
        problems.append("global_learner.gamma: expected gamma or mixing_weights, got both")
        return None
    if given is None and len(learners) == 1 and glob.gamma is None:
        given = {name: "rest" for name in learners}
    elif given is None:
        given = _weights_of_gamma(learners, glob.gamma, problems)
        if given is None:
            return None
    unknown, missing = set(given) - set(learners), set(learners) - set(given)
    for name in sorted(unknown | missing):
        words = "no base learner has this name" if name in unknown else "missing"
        problems.append(f"global_learner.mixing_weights.{name}: {words}")
    rest = [name for name, weight in given.items() if weight == "rest"]
    if len(rest) > 1:
        problems.append(f"global_learner.mixing_weights: expected at most one `rest`, got {', '.join(rest)}")
    if unknown or missing or len(rest) > 1:
        return None
    return _filled(given, rest, problems)


def _weights_of_gamma(
    learners: dict[str, BaseLearnerConfig], gamma: Schedule | None, problems: list[str]
) -> dict[str, Any] | None:
    natural = [name for name, learner in learners.items() if not learner.is_robust]
    robust = [name for name in learners if name not in natural]
    if gamma is None:
        problems.append("global_learner.mixing_weights: missing (or gamma, for one natural and one robust learner)")
    elif len(natural) != 1 or len(robust) != 1:
        problems.append(
            "global_learner.gamma: expected one natural and one robust learner, got "
            f"{', '.join(learners)}; use mixing_weights"
        )
    else:
        return {robust[0]: gamma, natural[0]: "rest"}
    return None


def _filled(given: dict[str, Any], rest: list[str], problems: list[str]) -> dict[str, Schedule] | None:
    fixed = [weight for weight in given.values() if weight != "rest"]
    positions = sorted({at for weight in fixed for at, _ in weight.knots} | {Fraction(0)})
    jumps = any(len({at for at, _ in w.knots}) < len(w.knots) for w in fixed)
    if jumps and len(given) > 1:
        problems.append("global_learner.gamma, mixing_weights: expected strictly increasing positions, got a jump")
        return None
    sums = {at: sum((weight.exact(at) for weight in fixed), Fraction(0)) for at in positions}
    for at, total in sums.items():
        if total > 1 or (not rest and total != 1):
            problems.append(
                f"global_learner.mixing_weights: expected a sum of 1 everywhere, got {float(total):g} at position "
                f"{float(at):g}"
            )
            return None
    others = Schedule(tuple((at, 1 - sums[at]) for at in positions))
    return {name: others if weight == "rest" else weight for name, weight in given.items()}


def _warmup(config: RunConfig, problems: list[str]) -> float:
    glob, epochs = config.global_learner, config.training.epochs
    if glob.warmup_epochs is None:
        return float(round(Fraction(5, 8) * epochs))
    if glob.warmup_epochs > epochs:
        problems.append(
            f"global_learner.warmup_epochs: expected at most training.epochs ({epochs}), got "
            f"{glob.warmup_epochs:g}; null takes 0.625 of it, sync_unit: never switches redistribution off"
        )
    return glob.warmup_epochs


def _evaluation_attack(config: RunConfig, problems: list[str]) -> EvaluationAttackConfig:
    attack = config.evaluation.attack
    learners = config.base_learners.values()
    model = next((attack for learner in learners for attack in learner.all_attacks.values()), None)
    filled = {}
    for field in ("norm", "epsilon", "step_size"):
        value = getattr(attack, field)
        filled[field] = getattr(model, field) if value is None and model else value
        if filled[field] is None and model is None and not any(learner.is_robust for learner in learners):
            problems.append(f"evaluation.attack.{field}: missing, and no base learner has an attack to take it from")
        elif filled[field] is None and model and model.algorithm != "pgd":
            problems.append(
                f"evaluation.attack.{field}: missing, and the first robust learner's attack has none to take "
                f"({model.algorithm} needs none); PGD needs one, for example epsilon / 4"
            )
    completed = attack.replace(**filled)
    if attack.epsilon is not None or attack.norm is not None:
        problems += [f"evaluation.attack.{problem}" for problem in linf_radius_problems(completed)]
    return completed


def to_dict(config: RunConfig) -> dict:
    """Returns the resolved configuration as plain YAML data; `load_config` of it returns an equal object."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """Returns the resolved configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=110, default_flow_style=None)
