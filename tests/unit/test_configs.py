"""`genray configs`: the presets wherever genray is installed, and a first configuration for one's own images."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

from genray.cli.configs import main, parse_args
from genray.cli.parser import run_command
from genray.config import load_config
from genray.config.load import parse_yaml
from genray.config.presets import first_comment, preset_text, presets
from genray.run.setup import prepare
from genray.tuning.grid import load_grid


def genray_configs(*words):
    return run_command(main, parse_args([str(word) for word in words]))


def images(folder, size, mode="RGB", train=12, classes=("cat", "dog")):
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("test", 3)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / part / name / f"{i}.png")
    return folder


def test_all_presets_are_listed_with_what_they_are(capsys):
    assert genray_configs("list") == 0
    lines = capsys.readouterr().out.splitlines()
    files = {str(p.relative_to(ROOT / "configs")).removesuffix(".yaml") for p in (ROOT / "configs").rglob("*.yaml")}
    assert {line.split()[0] for line in lines} == files == set(presets()) and len(files) > 60
    assert "Generalist on scikit-learn's 8x8 digits" in next(line for line in lines if line.startswith("digits "))
    assert all(len(first_comment(path)) > 20 for path in presets().values())


def test_all_presets_are_packaged(monkeypatch):
    """As setuptools reads pyproject.toml; nothing is built."""
    monkeypatch.chdir(ROOT)
    project = apply_configuration(Distribution({"script_name": "pyproject.toml"}), "pyproject.toml")
    project.include_package_data = False  # it would write a manifest here
    command = project.get_command_obj("build_py")
    command.ensure_finalized()
    (packaged,) = (names for package, _, _, names in command.data_files if package == "genray")
    assert {f"presets/{name}.yaml" for name in presets()} <= set(packaged)


@pytest.mark.parametrize("target, name", [("mine", "mine/cifar10_resnet18_generalist.yaml"), ("my.yaml", "my.yaml")])
def test_a_copy_reads_as_the_preset_does(target, name, tmp_path, capsys):
    """And its editor finds the schema."""
    assert genray_configs("copy", "paper/cifar10_resnet18_generalist", tmp_path / target) == 0
    file = tmp_path / name
    assert str(file) in capsys.readouterr().out
    assert load_config(file) == load_config(ROOT / "configs/paper/cifar10_resnet18_generalist.yaml")
    schema = file.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert schema.startswith("/") and (ROOT / "genray/config/run.schema.json").samefile(schema)


@pytest.mark.parametrize("name", ["ablations/methods_mnist", "paper/tables/cifar10_resnet18"])
def test_a_copied_grid_finds_the_runs_that_it_names(name, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(preset_text(name))
    override = ["data.path=/data"] if name.startswith("ablations") else []
    first, second = (load_grid(str(path), override) for path in (file, ROOT / "configs" / f"{name}.yaml"))
    assert [trial.config for trial in first.trials] == [trial.config for trial in second.trials]


@pytest.mark.parametrize(
    ("size", "mode", "network", "epsilon", "shape"),
    [
        ((20, 16), "L", "small_cnn", "0.2", (1, 20, 16)),
        ((32, 32), "RGB", "resnet18", "8/255", (3, 32, 32)),
        ((5, 6), "L", "small_cnn", "0.2", (1, 8, 8)),
        ((90, 180), "RGB", "resnet18", "8/255", (3, 32, 64)),
    ],
)
def test_a_first_configuration_fits_the_images(size, mode, network, epsilon, shape, tmp_path):
    folder = images(tmp_path / "my images", size, mode)
    assert genray_configs("init", folder, tmp_path / "mine.yaml") == 0
    text = (tmp_path / "mine.yaml").read_text()
    config = load_config(tmp_path / "mine.yaml")
    assert (config.name, config.model.name, config.training.batch_size) == ("my_images", network, 8)
    assert parse_yaml(text, "")["base_learners"]["linf"]["attack"]["epsilon"] == epsilon or float(epsilon) == 0.2
    setup = prepare(config)
    assert tuple(setup.splits["train"].images.shape) == (22, *shape) and len(setup.splits["validation"]) == 2
    assert "24 training and 6 test images of 2 classes" in text and "cat, dog" in text


def test_one_image_a_class_is_too_few(tmp_path, capsys):
    folder = images(tmp_path / "few", (20, 16), "L")
    for file in sorted((folder / "train/cat").iterdir())[1:]:
        file.unlink()
    assert genray_configs("init", folder, tmp_path / "mine.yaml") == 2
    assert "few: expected at least 2 training images of each class" in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()


def test_nothing_is_overwritten_and_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "digits.yaml").write_text("mine")
    for words, says in [
        (("copy", "digits", tmp_path), "exists; it is not overwritten"),
        (("copy", "digts", tmp_path), "(did you mean digits?)"),
        (("init", tmp_path / "absent", tmp_path / "new.yaml"), "absent"),
        (("init", tmp_path, tmp_path / "digits.yaml"), "exists"),
        (("copy", "digits", tmp_path / "digits.yaml" / "below"), "cannot be written"),
    ]:
        assert genray_configs(*words) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error, error
    assert (tmp_path / "digits.yaml").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
