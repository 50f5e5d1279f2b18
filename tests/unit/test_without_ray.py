"""genray where ray is not installed: an environment made of everything that is installed except ray."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def without_ray(tmp_path_factory):
    """Runs a command line of this interpreter in which `import ray` finds nothing."""
    packages = tmp_path_factory.mktemp("site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("ray", "__pycache__", "__editable__", "genray")) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(packages)])

    def run(*args):
        line = [sys.executable, "-S", *map(str, args)]  # -S: no site-packages of its own
        return subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)

    return run


@pytest.mark.slow
def test_trains_locally(without_ray, tmp_path, small_run):
    done = without_ray("-m", "genray.train", "--runtime", "local", "--storage", tmp_path, *small_run)
    assert done.returncode == 0, done.stderr
    assert "theta_g, epoch" in done.stdout
    assert (tmp_path / "digits" / "results.json").exists()


@pytest.mark.slow
def test_says_what_is_missing(without_ray, tmp_path):
    done = without_ray("-m", "genray.train", "--storage", tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr == "error: --runtime ray: ray is not installed; pip install 'ray[train,tune]', or --runtime local\n"
    )
    assert not list(tmp_path.iterdir())
