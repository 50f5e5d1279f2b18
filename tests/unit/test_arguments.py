"""Names, choices and numbers: the functions refuse what the commands refuse, in one line each, before anything else."""

import numpy as np
import pytest

import genray
from genray.cli.export import parse_args as export_args
from genray.cli.train import parse_args as train_args
from genray.config import load_config
from genray.config.arguments import Count, checked
from genray.data.datasets import load_image_data
from genray.errors import ConfigError, DataError, InputError

CALLS = {
    "train runtime": (genray.train, (), {"runtime": "lcoal"}, "runtime: expected one of ray, local", "local"),
    "train resume": (genray.train, (), {"resume": "no"}, "resume: expected true or false, got 'no'", ""),
    "train storage": (genray.train, (), {"storage": 3}, "storage: expected a path or URI, got 3", ""),
    "train name": (genray.train, (), {"name": 1.5}, "name: expected text or null, got 1.5", ""),
    "train config": (genray.train, (3,), {}, "config: expected the path of a YAML file or a mapping, got int", ""),
    "train overrides": (genray.train, (None, [3]), {}, "overrides: expected key=value strings or mappings, got 3", ""),
    "evaluate device": (genray.evaluate, (0, 0, 0), {"device": "cuad"}, "device: expected one of auto", "cuda"),
    "evaluate engine": (genray.evaluate, (0, 0, 0), {"engine": "genry"}, "engine: expected one of", "genray"),
    "evaluate norms": (genray.evaluate, (0, 0, 0), {"norms": "linff"}, "norms[0]: expected one of linf", "linf"),
    "evaluate attacks": (genray.evaluate, (0, 0, 0), {"attacks": "pgd2"}, "evaluation attack: expected", "pgd20"),
    "evaluate workers": (
        genray.evaluate,
        (0, 0, 0),
        {"workers": -1},
        "workers: expected a whole number at least 0",
        "",
    ),
    "evaluate timeout": (genray.evaluate, (0, 0, 0), {"startup_timeout_s": 0}, "startup_timeout_s: expected", ""),
    "tune grid": (genray.tune, (7,), {}, "grid: expected a path or URI, got 7", ""),
    "tune concurrent": (genray.tune, ("x",), {"max_concurrent": 0}, "max_concurrent: expected a whole number", ""),
    "report images": (genray.report, ("x",), {"images": 0}, "images: expected a whole number at least 1, got 0", ""),
    "report formats": (genray.report, ("x",), {"formats": "htlm"}, "--format: expected some of", "html"),
    "export layout": (genray.export, ("x", "onx"), {}, "layout: expected one of trades, robustbench, onnx", "onnx"),
    "load_model device": (genray.load_model, ("x",), {"device": "cudda"}, "device: expected cpu, cuda or another", ""),
}


@pytest.mark.parametrize("call", CALLS)
def test_functions_check_their_arguments(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, arguments, options, says, meant = CALLS[call]
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    assert not meant or str(caught.value).endswith(f"(did you mean {meant}?)")
    assert not list(tmp_path.iterdir())


def test_all_wrong_arguments_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        genray.train(runtime="lcoal", resume=1, storage=None)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["runtime", "storage", "resume"]


def test_images_are_asked_for_in_one_line():
    with pytest.raises(DataError, match=r"data\.source: expected one of .*got 'cifar_10' \(did you mean cifar100?\?\)"):
        load_image_data("cifar_10")
    with pytest.raises(DataError, match=r"data\.download: expected true or false, got 'no'"):
        load_image_data("mnist", download="no")


def test_numbers_of_numpy_are_numbers():
    @checked
    def images(count: Count):
        return count

    assert type(images(np.int64(3))) is int
    with pytest.raises(ConfigError, match="count: expected a whole number at least 1, got True"):
        images(True)


@pytest.mark.parametrize(
    ("parse", "line", "says"),
    [
        (train_args, ["--runtime", "lcoal"], "(did you mean local?)"),
        (train_args, ["--runtme", "local"], "(did you mean --runtime?)"),
        (train_args, ["--training.epochs=3"], "(a field is overridden without dashes: training.epochs=3)"),
        (export_args, ["x", "--layout", "onx"], "(did you mean onnx?)"),
    ],
)
def test_commands_say_what_was_probably_meant(parse, line, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"{says}\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["20240501", "no"])
def test_a_name_is_text(name, capsys):
    from genray.cli.train import main

    main(train_args(["--dry-run", "--runtime", "local", "--name", name, "training.epochs=1"]))
    assert load_config(yaml_of(capsys.readouterr().out)).name == name


def yaml_of(plan):
    """The configuration before the plan, as PyYAML reads it."""
    import yaml

    return yaml.safe_load(plan.partition("\ndata ")[0])
