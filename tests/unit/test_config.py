"""Configuration: exact numbers, round trips, every mistake at once, overrides, and junk that must never do worse."""

import copy
import subprocess
import sys
from fractions import Fraction

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from genray.config import load_config, load_run, to_dict, to_yaml
from genray.config.load import parse_yaml
from genray.config.objectives import AdversarialObjective, NaturalObjective
from genray.config.optimizers import SGD, Adam, AdamW
from genray.config.values import number_to_yaml, parse_fraction
from genray.errors import ConfigError
from genray.types import ThreatModel, fraction_text

ATTACK = {"norm": "linf", "epsilon": "8/255", "step_size": "2/255"}


def minimal(**sections):
    """The shortest complete configuration: one natural and one robust learner."""
    return {
        "name": "unit",
        "data": {"source": "digits"},
        "model": {"name": "small_cnn"},
        "training": {"epochs": 120},
        "base_learners": {
            "natural": {"objective": "natural", "lr": 0.1},
            "robust": {"objective": "adversarial", "lr": 0.01, "attack": dict(ATTACK)},
        },
        "global_learner": {"gamma": 0.5},
        **sections,
    }


def problems(source=None, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(minimal() if source is None else source, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def one_problem(source=None, overrides=()):
    (problem,) = problems(source, overrides)
    return problem


# --- exact numbers -------------------------------------------------------------------------------------------------


READ = {
    "8/255": Fraction(8, 255), "8 / 255": Fraction(8, 255), "0.031": Fraction(31, 1000), "0.1": Fraction(1, 10),
    "5e-4": Fraction(1, 2000), "5.0e-4": Fraction(1, 2000), "1": Fraction(1), "1/3": Fraction(1, 3),
    "0.30000000000000004": Fraction("0.30000000000000004"),
}  # fmt: skip


@pytest.mark.parametrize(("written", "exact"), READ.items())
def test_numbers_are_read_as_they_are_written(written, exact):
    """`written` stands in YAML without quotes, where PyYAML makes text, floats or integers of it."""
    config = load_config(minimal(), [f"base_learners.robust.attack.epsilon={written}"])
    assert config.base_learners["robust"].attack.epsilon == exact
    assert load_config(minimal(), [f"base_learners.natural.lr={written}"]).base_learners["natural"].lr.exact(0) == exact
    config = load_config(minimal(), [f"base_learners.robust.optimizer={{name: sgd, weight_decay: {written}}}"])
    assert config.base_learners["robust"].optimizer.weight_decay == float(exact)


def test_two_threat_models_that_look_alike_stay_apart():
    assert parse_fraction("8/255") != parse_fraction(0.031) != parse_fraction(8 / 255)
    assert str(ThreatModel("linf", Fraction(8, 255))) == "linf 8/255 (0.0313725)"
    assert str(ThreatModel("linf", Fraction(31, 1000))) == "linf 0.031 (0.031)"


NO_NUMBERS = ["nan", "inf", "1/0", "", "eight", "1/2/3", True, None, float("nan"), float("inf"), [1], {}, "0x10", b"1"]


@pytest.mark.parametrize("value", [*NO_NUMBERS, "1 0", "0.1 5", "1 2/3"])
def test_what_is_not_a_number(value):
    with pytest.raises(ValueError):
        parse_fraction(value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.fractions(max_denominator=10**6),
        st.floats(-1e15, 1e15).filter(lambda f: f == 0 or abs(f) > 1e-15).map(lambda f: Fraction(repr(f))),
        st.integers(0, 1000).map(lambda n: Fraction(n, 255)),
    )
)
def test_yaml_form_of_a_number_is_exact(value):
    through_yaml = yaml.safe_load(yaml.safe_dump({"x": number_to_yaml(value)}))["x"]
    assert parse_fraction(through_yaml) == value
    assert parse_fraction(fraction_text(value)) == value


@pytest.mark.parametrize("text", ["8/255", "17/255", "0.031", "1/3", "3", "0.5", "128/255", "2/7", "0"])
def test_numbers_are_written_as_people_write_them(text):
    # 17/255 is 1/15 and 128/255 cannot be shortened: pixel fractions are shown as such where they look like one.
    assert fraction_text(Fraction(text)) == text


# --- schedules -----------------------------------------------------------------------------------------------------


# --- round trips ---------------------------------------------------------------------------------------------------


def floats(low, high):
    """Plain decimals; what lies beyond the range of floats has tests of its own."""
    return st.floats(low, high).map(lambda value: round(value, 9))


fractions = (
    st.integers(1, 255).map(lambda n: f"{n}/255")
    | floats(1e-6, 1)
    | st.fractions("1/999", 1, max_denominator=999).map(str)
)
rates = floats(0, 1) | st.lists(st.tuples(st.integers(0, 20), floats(0, 1)), min_size=1, max_size=4).map(
    lambda knots: [[f"{at * (len(knots) > 1)}/20", value] for at, value in sorted(knots)]
)
record = st.fixed_dictionaries
optimizers = (
    st.sampled_from(["sgd", "adam", "adamw"])
    | record({"name": st.just("sgd"), "momentum": floats(0, 0.99), "nesterov": st.booleans()})
    | record({"name": st.just("adamw"), "beta2": floats(0, 0.9999), "weight_decay": floats(0, 1)})
)
extras = {
    "averaging": record({"enabled": st.booleans(), "decay": floats(0, 0.9999)}),
    "data_order": st.sampled_from(["shared", "own"]),
    "resources": record({"num_gpus": st.sampled_from(["auto", 0, 0.5, 1])}),
}
attacks = record(
    {"norm": st.sampled_from(["linf", "l2", "l1"]), "epsilon": fractions, "step_size": fractions},
    optional={"num_steps": st.integers(1, 50), "start": st.sampled_from(["uniform", "gaussian", "zero"])},
)
objectives = st.just("adversarial") | record({"name": st.just("adversarial"), "beta": floats(0, 1)})
naturals = record({"objective": st.just("natural"), "lr": rates, "optimizer": optimizers}, optional=extras)
robusts = record({"objective": objectives, "lr": rates, "attack": attacks}, optional=extras)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(
    lambda n: n not in ("global", "global_last")
)


@st.composite
def configurations(draw):
    one, two = draw(st.lists(names, min_size=2, max_size=2, unique=True))
    gamma = [["0", draw(fractions)], [draw(fractions), draw(fractions)]]
    ways = {"gamma": gamma}, {"mixing_weights": {one: "rest", two: gamma}}, {"mixing_weights": {two: "rest", one: 0.25}}
    return minimal(
        base_learners={one: draw(naturals), two: draw(robusts)},
        seed=draw(st.integers(0, 2**63 - 1)),
        global_learner=draw(st.sampled_from(ways)),
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configurations())
def test_resolved_configuration_gives_the_same_run(source):
    config = load_config(source)
    assert load_config(to_dict(config)) == config
    assert load_config(yaml.safe_load(to_yaml(config))) == config
    assert load_config(config) == config
    weights = list(config.global_learner.mixing_weights.values())
    for at in {at for w in weights for at, _ in w.knots} | {Fraction(1, 7), Fraction(1)}:
        assert sum(w.exact(at) for w in weights) == 1


def test_source_is_not_changed():
    source = minimal()
    before = copy.deepcopy(source)
    load_config(source, ["training.epochs=3", "base_learners.robust.attack.num_steps=2", "global_learner.gamma=0.1"])
    assert source == before


# --- every mistake at once -----------------------------------------------------------------------------------------


def paths_of(found):
    return sorted(problem.split(":")[0] for problem in found)


def test_every_mistake_is_listed_with_its_path():
    """Architecture section 4: unknown keys, wrong types, impossible combinations, all in one message."""
    source = minimal()
    source["sed"] = 3
    source["training"] = {"epochs": "ten", "batch_size": 0, "drop_last": "yes"}
    source["base_learners"]["natural"]["lr"] = -1
    source["base_learners"]["robust"]["attack"] = {"norm": "l3", "epsilon": 0, "step_size": "2/0", "steps": 3}
    source["base_learners"]["robust"]["optimizer"] = {"name": "sdg"}
    source["base_learners"]["a b"] = {"objective": "natural", "lr": 1}
    source["data"] = {"source": "digits", "train_examples": True}
    found = problems(source)
    attack = [f"base_learners.robust.attack.{name}" for name in ("epsilon", "norm", "step_size", "steps")]
    assert paths_of(found) == sorted(
        ["sed", "training.epochs", "training.batch_size", "training.drop_last", "base_learners.a b", *attack]
        + ["base_learners.natural.lr", "base_learners.robust.optimizer.name", "data.train_examples"]
    )
    assert "training.epochs: expected a whole number at least 1, got 'ten'" in found
    assert "training.drop_last: expected true or false, got 'yes'" in found
    assert any("'a b'" in line for line in found)


def test_impossible_combinations_are_listed_together():
    source = minimal(device="cpu", typo=1)
    source["base_learners"]["natural"] |= {"attack": dict(ATTACK), "resources": {"num_gpus": 1}}
    del source["base_learners"]["robust"]["attack"]
    source["model"]["mean"] = [0.5]
    others = {"path": "x", "label_column": "y", "image_size": [8, 8], "validation_examples": 0}
    source["data"] = {"source": "digits", **others}
    source["global_learner"] = {"gamma": 0.5, "mixing_weights": {"natural": "rest", "robust": 1}, "warmup_epochs": 121}
    assert paths_of(problems(source)) == sorted(
        ["typo", "model.mean, model.std", *(f"data.{name}" for name in others), "base_learners.robust.attack"]
        + ["base_learners.natural.attack", "base_learners.natural.resources.num_gpus"]
        + ["global_learner.gamma", "global_learner.warmup_epochs"]
    )


def test_missing_fields_say_what_is_expected():
    found = problems({})
    assert [p.split(":")[0] for p in found] == ["name", "data", "model", "training", "base_learners"]
    assert found[0] == "name: missing, expected text of letters, digits, . _ and -, up to 100"
    assert "data.source: missing, expected one of digits, cifar10" in one_problem(minimal(data={}))


# --- files ---------------------------------------------------------------------------------------------------------


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nseed: 1\nname: b\n", "line 3: key 'name' stands twice"),
        ("training:\n  epochs: 1\n  epochs: 2\n", "line 3: key 'epochs' stands twice"),
        ("a: [1, 2\nb: 3\n", "not valid YAML: line 2"),
        ("- 1\n- 2\n", "expected key: value lines, got list"),
        ("", "expected key: value lines, got NoneType"),
        ("just text", "expected key: value lines, got str"),
        (b"\xff\xfe\x00bad", "not UTF-8"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_broken_files_are_named(tmp_path, text, words):
    path = written(tmp_path, text)
    problem = one_problem(path)
    assert problem.startswith(f"{path}: ") and words in problem


def test_merge_keys_of_yaml_work(tmp_path):
    """Anchors and `<<` are plain YAML; a file that repeats a learner's settings will use them."""
    source = """
name: unit
data: {source: digits}
model: {name: small_cnn}
training: {epochs: 120}
base_learners:
  natural: &common {objective: natural, lr: 0.1}
  robust:
    <<: *common
    objective: adversarial
    lr: 0.01
    attack: {norm: linf, epsilon: 8/255, step_size: 2/255}
global_learner: {gamma: 0.5}
"""
    assert load_config(written(tmp_path, source)) == load_config(minimal())


NASTY_YAML = [
    "!!map [1]", "!!map x", "!!set [1]", "!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!int abc",
    "!!binary '%'", "!!omap {a: 1}", "!!pairs [1]", "!!python/object/apply:os.system ['true']", "!custom 1",
    "{[1, 2]: 3}", "{{a: 1}: 2}", "*nothing", "&a [*a]", "&a {b: *a}", "2001-99-99", "0b_", "0x_", "1:99:99",
    "{? a, ? a}", "\x00", "\ud800", "'", "[" * 1000, "{a: " * 1000, "%TAG", "--- 1\n--- 2", "? ", "<<: 1",
    "{<<: [1]}", "=", "!!value =", "!!merge <<", "1e400", "-.inf",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY_YAML, ids=range(len(NASTY_YAML)))
def test_nasty_yaml_is_a_config_error(tmp_path, text):
    """As a file, as the value of an override, and as a value inside a file."""

    def refused(*arguments):
        with pytest.raises(ConfigError):
            load_config(*arguments)

    if "\ud800" not in text:
        refused(written(tmp_path, text))
        refused(written(tmp_path, yaml.safe_dump(minimal(training=None)) + "extra: " + text))
    refused(minimal(), [f"training.epochs={text}"])
    refused(minimal(), [f"training={text}"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text("01_:.-+xoeEnyN~ =<", max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.no", max_size=3), inner, max_size=3),
        max_leaves=6,
    )
)
def test_what_pyyaml_wrote_is_read_as_it_was(value):
    """Its YAML 1.1 quotes every text that we read as something else, so that older files keep their meaning."""
    assert parse_yaml(yaml.safe_dump({"x": value}), "") == {"x": value}


def test_fields_that_older_versions_wrote_are_ignored():
    older = minimal()
    older["training"] |= {"on_non_finite": "halt", "rollback_lr_factor": 0.5, "max_rollbacks": 3}
    assert load_run(older).config == load_config(minimal()) and load_run(older).notes == ()
    asked = load_run(minimal(), ["training.on_non_finite=rollback"])
    assert asked.config == load_config(minimal()) and "training.on_non_finite: rollback" in asked.notes[0]


@pytest.mark.parametrize("text", ["no", "Yes", "on", "010", "0x1F", "0o17", "1_000", "1:20", "2024-11-30", "1e3", "+5"])
def test_what_looks_like_no_plain_number_is_text(text):
    assert parse_yaml(f"{{{text}: [{text}]}}", "") == {text: [text]}


def test_names_of_numbers_are_text(tmp_path):
    plain = yaml.safe_dump(minimal(name=20240501)).replace("natural:", "7:")
    config = load_config(written(tmp_path, plain), ["base_learners.7.lr=0.5"])
    assert config.name == "20240501" and config.base_learners["7"].lr.exact(Fraction(0)) == Fraction(1, 2)


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_as_a_mapping():
    nested = {
        "training": {"epochs": 9},
        "base_learners.robust.attack": {"num_steps": 3, "epsilon": "4/255"},
        "base_learners": {"natural": {"lr": [[0, 0.1], [1, "1/1000"]], "optimizer": {"name": "adam"}}},
        "model.width": None,
        "name": "no",
    }
    attack, natural = "base_learners.robust.attack", "base_learners.natural"
    listed = ["training.epochs=9", f"{attack}.num_steps=3", f"{attack}.epsilon=4/255", "model.width=null", "name='no'",
              f"{natural}.lr=[[0, 0.1], [1, 1/1000]]", f"{natural}.optimizer={{name: adam}}"]  # fmt: skip
    assert load_config(minimal(), nested) == load_config(minimal(), listed) == load_config(minimal(), [nested])
    assert load_config(minimal(), ["seed=3", {"seed": 4}]).seed == 4
    assert load_config(minimal(), "training.epochs=9").training.epochs == 9


def test_overrides_reach_every_depth_and_apply_in_order():
    wanted = ["training.epochs=7", "training.epochs=9", "base_learners.robust.attack.num_steps=3", "seed = 5",
              "checkpoint.keep=4"]  # fmt: skip
    config = load_config(minimal(), wanted)
    assert config.training.epochs == 9 and config.base_learners["robust"].attack.num_steps == 3 and config.seed == 5
    assert config.checkpoint.keep == 4 and config.checkpoint.every_epochs == 1  # a section that was not there


def test_an_override_can_add_and_remove_a_learner():
    l2 = "base_learners.l2={objective: adversarial, lr: 0.1, attack: {norm: l2, epsilon: 0.5, step_size: 0.1}}"
    config = load_config(minimal(), [l2, "base_learners.robust=null", "evaluation.attack.num_steps=5"])
    assert list(config.base_learners) == ["natural", "l2"]
    assert (config.evaluation.attack.norm, config.evaluation.attack.num_steps) == ("l2", 5)
    weights = "global_learner.mixing_weights"
    gone = ["base_learners.natural=null", f"{weights}.natural=null", f"{weights}.robust=1"]
    without = load_config(minimal(global_learner={"mixing_weights": {"natural": 0.5, "robust": "rest"}}), gone)
    assert list(without.global_learner.mixing_weights) == ["robust"]


def test_null_takes_a_default_back():
    source = minimal(model={"name": "small_cnn", "width": 8})
    assert load_config(source).model.width == 8 and load_config(source, ["model.width=null"]).model.width is None


def test_objective_and_optimizer_shorthands_grow():
    def learner(name, *overrides):
        return load_config(minimal(), [f"base_learners.{name}.{o}" for o in overrides]).base_learners[name]

    assert learner("robust", "objective.beta=0.5").objective == AdversarialObjective(beta=0.5)
    smooth = learner("natural", "objective.label_smoothing=0.1").objective
    assert smooth == NaturalObjective(label_smoothing=0.1)
    assert learner("natural", "optimizer=adamw", "optimizer.beta1=0.8").optimizer == AdamW(beta1=0.8)
    assert learner("robust").optimizer == SGD(momentum=0.9, nesterov=False, weight_decay=5e-4)
    assert type(learner("natural", "optimizer=adam").optimizer) is Adam


def test_mistaken_overrides_are_listed_together():
    found = problems(overrides=["nonsense", "training.epochs=[", "name.first=x"])
    assert len(found) == 3 and "'nonsense'" in found[0]
    assert found[1].startswith("training.epochs: value '[' is not valid YAML")
    assert found[2] == "name.first: name is not a section but 'unit'"


def test_an_empty_value_is_null():
    assert load_config(minimal(), ["model.width="]).model.width is None
    assert one_problem(overrides=["training.epochs="]).endswith("at least 1, got null")


# --- mixing --------------------------------------------------------------------------------------------------------


def weights_at(config, position):
    return {name: w.exact(Fraction(position)) for name, w in config.global_learner.mixing_weights.items()}


def test_gamma_is_the_share_of_the_robust_learner():
    config = load_config(minimal(global_learner={"gamma": [[0, 1], ["2/3", 1], [1, 0.4]]}))
    assert config.global_learner.gamma is None
    assert weights_at(config, "1/2") == {"robust": 1, "natural": 0}
    assert weights_at(config, "5/6") == {"robust": Fraction(7, 10), "natural": Fraction(3, 10)}
    assert weights_at(config, 1) == {"robust": Fraction(2, 5), "natural": Fraction(3, 5)}


@pytest.mark.parametrize("gamma", [0, 1])
def test_gamma_at_its_ends(gamma):
    """[trap] a ratio of 0 must not mean "not given"."""
    config = load_config(minimal(global_learner={"gamma": gamma}))
    assert weights_at(config, 0) == {"robust": gamma, "natural": 1 - gamma}


def test_gamma_and_mixing_weights_say_the_same():
    gamma = [[0, 1], ["2/3", 1], [1, 0.4]]
    of = ({"mixing_weights": {"robust": gamma, "natural": "rest"}}, {"gamma": gamma})
    by_weights, by_gamma = (load_config(minimal(global_learner=options)) for options in of)
    assert all(weights_at(by_weights, Fraction(i, 30)) == weights_at(by_gamma, Fraction(i, 30)) for i in range(31))


L2 = {"norm": "l2", "epsilon": "128/255", "step_size": "15/255"}
THREE = {
    "natural": {"objective": "natural", "lr": 0.1},
    "linf": {"objective": "adversarial", "lr": 0.01, "attack": dict(ATTACK)},
    "l2": {"objective": "adversarial", "lr": 0.01, "attack": L2},
}


def test_three_learners_with_rest():
    weights = {"natural": [["2/3", 0], [1, 0.4]], "linf": "rest", "l2": [["2/3", 0], [1, 0.3]]}
    config = load_config(minimal(base_learners=THREE, global_learner={"mixing_weights": weights}))
    assert weights_at(config, 0) == {"natural": 0, "linf": 1, "l2": 0}
    assert weights_at(config, 1) == {"natural": Fraction(2, 5), "linf": Fraction(3, 10), "l2": Fraction(3, 10)}


@pytest.mark.parametrize(
    ("weights", "path", "words"),
    [
        (None, "", "missing (or gamma"),
        ({"natural": 0.5, "linf": 0.5}, ".l2", "missing"),
        ({"natural": 0.5, "linf": "rest", "l2": 0.1, "l1": 0.1}, ".l1", "no base learner"),
        ({"natural": 0.5, "linf": 0.2, "l2": 0.2}, "", "expected a sum of 1 everywhere, got 0.9 at position 0"),
        ({"natural": 0.7, "linf": "rest", "l2": 0.4}, "", "expected a sum of 1 everywhere, got 1.1 at position 0"),
        ({"natural": [[0, 0], [0.5, 1]], "linf": "rest", "l2": [[0, 0.5], [1, 0]]}, "", "got 1.25 at position 0.5"),
        ({"natural": "rest", "linf": "rest", "l2": 0.4}, "", "got natural, linf"),
        ({"natural": -0.1, "linf": "rest", "l2": 0.4}, ".natural", "expected"),
        ({"natural": "remainder", "linf": "rest", "l2": 0.4}, ".natural", "expected"),
        ({}, "", "expected one or more"),
    ],
)
def test_wrong_mixing(weights, path, words):
    source = minimal(base_learners=THREE, global_learner={} if weights is None else {"mixing_weights": weights})
    assert any(p.startswith(f"global_learner.mixing_weights{path}: ") and words in p for p in problems(source))
    two = one_problem(minimal(base_learners=THREE, global_learner={"gamma": 0.5}))
    assert two.startswith("global_learner.gamma: expected one natural and one robust learner, got natural, linf, l2")


def test_thirds_sum_to_one_exactly():
    def options(weight):
        return minimal(base_learners=THREE, global_learner={"mixing_weights": dict.fromkeys(THREE, weight)})

    assert weights_at(load_config(options("1/3")), 1)["l2"] == Fraction(1, 3)
    assert "got 0.999" in one_problem(options(0.333))


def test_a_single_learner_has_all_the_weight():
    source = minimal(global_learner={}, base_learners={"robust": minimal()["base_learners"]["robust"]})
    assert weights_at(load_config(source), "1/2") == {"robust": 1}


# --- derived fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "warmup"), [(120, 75), (200, 125), (1, 1), (2, 1)])
def test_warm_up_is_five_eighths_of_the_run(epochs, warmup):
    assert load_config(minimal(training={"epochs": epochs})).global_learner.warmup_epochs == warmup


def test_given_warm_up_is_kept():
    for value in (0, 7.5, 120):
        assert load_config(minimal(), [f"global_learner.warmup_epochs={value}"]).global_learner.warmup_epochs == value


def test_evaluation_attack_is_the_first_robust_learners():
    source = minimal(base_learners=THREE, global_learner={"mixing_weights": {"natural": 0.5, "linf": 0.5, "l2": 0}})
    attack = load_config(source).evaluation.attack
    assert attack.norm == "linf" and attack.num_steps == 20
    assert (attack.epsilon, attack.step_size) == (Fraction(8, 255), Fraction(2, 255))
    attack = load_config(source, ["evaluation.attack.epsilon=0.01", "evaluation.attack.num_steps=3"]).evaluation.attack
    assert (attack.epsilon, attack.step_size, attack.num_steps) == (Fraction(1, 100), Fraction(2, 255), 3)


def test_without_a_robust_learner_the_evaluation_attack_must_be_given():
    source = minimal(global_learner={}, base_learners={"n": THREE["natural"]})
    assert [p.split(":")[0] for p in problems(source)] == [
        f"evaluation.attack.{f}" for f in ("norm", "epsilon", "step_size")
    ]
    attack = {"norm": "l2", "epsilon": 0.5, "step_size": 0.1}
    assert load_config(source | {"evaluation": {"attack": attack}}).evaluation.attack.norm == "l2"


# --- junk ----------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-100, 1000), st.floats(-1e6, 1e6), st.floats(),
    st.sampled_from([
        0, 1, -1, 0.5, "", " ", "1/3", "8/255", "1/0", "0/0", "-1/2", "nan", "inf", "1e-4", "rest", "auto", "sgd",
        "adversarial", "natural", "linf", "l2", "null", "\x00", "\n", "é", "a.b", "../x", 10**20, -(10**20), 2**64,
    ]),
    st.text(max_size=12), st.binary(max_size=4), st.dates(), st.datetimes(), st.complex_numbers(max_magnitude=9),
    st.fractions(max_denominator=50),
)  # fmt: skip
keys = st.one_of(
    st.text(max_size=8), st.integers(-3, 3), st.none(), st.booleans(), st.sampled_from(["name", "lr", "objective"])
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4), st.tuples(inner, inner)
    ),
    max_leaves=8,
)
COMPLETE = to_dict(load_config())
del COMPLETE["global_learner"]["gamma"]


def nodes(data, path=()):
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from nodes(value, (*path, key))


PATHS = list(nodes(COMPLETE))


def put(data, path, value):
    for key in path[:-1]:
        if not isinstance(data.get(key), dict):
            return
        data = data[key]
    data[path[-1]] = value


def accepted_or_refused(data, overrides=()):
    """Loads; whatever is accepted must also survive being written and read again."""
    try:
        config = load_config(data, overrides)
    except ConfigError as error:
        assert error.problems and all(isinstance(p, str) and p.strip() for p in error.problems)
        return
    assert load_config(yaml.safe_load(to_yaml(config))) == config


NEW_PATHS = st.tuples(st.sampled_from([(), *PATHS]), keys).map(lambda found: (*found[0], found[1]))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(PATHS) | NEW_PATHS, junk), min_size=1, max_size=3))
def test_junk_anywhere_is_accepted_or_a_config_error(changes):
    data = copy.deepcopy(COMPLETE)
    for path, value in changes:
        put(data, path, value)
    accepted_or_refused(data)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(PATHS).map(".".join), st.text("ab01.5/-e[]{}:,&*!|>#'\"%@ \n\t<=~", max_size=20))
def test_junk_overrides_are_accepted_or_a_config_error(path, text):
    accepted_or_refused(COMPLETE, [f"{path}={text}"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text("ab01.5/-e[]{}:,&*!|>#'\"%@ \n\t<=~é\x00", max_size=40))
def test_junk_files_are_config_errors(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(path)


HUGE = [
    10**400, -(10**400), "1e400", "-1e400", "1e-400", "1e5000", "1e-5000", f"1{'0' * 5000}", f"1/1{'0' * 400}", 1e308,
]  # fmt: skip


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
def test_numbers_beyond_floats_are_accepted_or_a_config_error(value):
    escaped = []
    for path in PATHS:
        data = copy.deepcopy(COMPLETE)
        put(data, path, value)
        try:
            accepted_or_refused(data)
        except Exception as error:
            escaped.append(f"{'.'.join(path)}: {type(error).__name__}")
    assert escaped == []


def test_a_gigantic_exponent_does_not_hang():
    code = (
        "from genray.config import load_config\nfrom genray.errors import ConfigError\n"
        "try: load_config(overrides=['base_learners.linf.attack.epsilon=1e999999999'])\n"
        "except ConfigError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=8)
    assert done.stdout == "refused\n", done.stderr[-300:]


def test_schedules_round_trip_in_a_configuration():
    """Two with knots at different places: `rest` is exact, with far more digits than either; one of a late knot."""
    weights = {
        "natural": [[0, 0.1234567890123456], [0.7654321098765432, 0.3]],
        "linf": "rest",
        "l2": [[0, 0.2718281828459045], [0.3141592653589793, "1/7"], [1, 0.1]],
    }
    source = minimal(base_learners=THREE, global_learner={"mixing_weights": weights})
    for config in (load_config(source), load_config(minimal(), ["base_learners.natural.lr=[[0.5, 0.1]]"])):
        assert load_config(to_dict(config)) == config


# --- objectives and their attacks -----------------------------------------------------------------------------------

SEVERAL = {"linf": dict(ATTACK), "l2": {**ATTACK, "norm": "l2"}}


def with_learner(**learner):
    """The minimal configuration whose robust learner has these fields."""
    config = minimal()
    config["base_learners"]["robust"] = {"lr": 0.01, **learner}
    return config


@pytest.mark.parametrize("objective", ["adversarial", "trades", "mart", "iat", "max", "avg", "sat"])
def test_an_objective_needs_its_attack_or_attacks(objective):
    several = objective in ("max", "avg", "sat")
    good, other = {"attack": {**ATTACK, "start": "gaussian"}}, {"attacks": SEVERAL}
    good, other = (other, good) if several else (good, other)
    at = {key: f"base_learners.robust.{key}: " for key in ("attack", "attacks")}
    load_config(with_learner(objective=objective, **good))
    missing, useless = at[[*good][0]] + "missing", at[[*other][0]] + f"has no effect with objective {objective}"
    assert one_problem(with_learner(objective=objective)).startswith(missing)
    assert one_problem(with_learner(objective=objective, **good, **other)).startswith(useless)
    found = [line.split(",")[0].split(";")[0] for line in problems(with_learner(objective=objective, **other))]
    assert sorted(found) == sorted([missing, useless])
    if several:  # all steps of all attacks in one mode
        for field in ({"tau": 1}, {"mode": "train"}):
            attacks = {**SEVERAL, "l2": {**SEVERAL["l2"], **field}}
            assert one_problem(with_learner(objective=objective, attacks=attacks)).startswith(
                at["attacks"] + "expected"
            )


def test_combinations_of_attack_and_objective_that_work():
    """What is refused beside them: `test_wrong_input`."""
    load_config(with_learner(objective="adversarial", attack={**ATTACK, "step_noise": 0.001, "tau": 0}))
    load_config(with_learner(objective="mart", attack={**ATTACK, "start": "zero"}))
