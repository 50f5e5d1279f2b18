"""A private Ray starts whatever surrounds the process that starts it, or says what to change."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.ray
ASKS = """
import ray
from genray.runtime.ray.cluster import connected
with connected(None):
    print(ray.get(ray.remote(lambda: 6 * 7).remote()))
"""
JOB = '{"runtime_env": {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}, "metadata": {"job_submission_id": "a"}}'
SURROUNDINGS = {
    "TMPDIR": "{tmp}/cluster_scratch/of/user.name/job-1234567-array-12/tmp_of_the_job",  # too long for a socket
    "HOME": "/proc/self",  # nobody can write there, root neither
    "RAY_JOB_CONFIG_JSON_ENV_VAR": JOB,
}


def ask(tmp_path, surroundings):
    ours = {name: value.replace("{tmp}", str(tmp_path)) for name, value in surroundings.items()}
    if "TMPDIR" in ours:
        os.makedirs(ours["TMPDIR"])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **ours}
    environment |= {"RAY_memory_monitor_refresh_ms": "0"}  # on a full machine it kills workers before they are known
    line = [sys.executable, "-c", ASKS]
    return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)


def test_it_starts_within_a_job_with_a_long_temporary_folder_and_a_read_only_home(tmp_path):
    done = ask(tmp_path, SURROUNDINGS)
    assert done.stdout == "42\n", done.stderr[-2000:]


def test_where_it_cannot_the_cure_is_named(tmp_path):
    done = ask(tmp_path, {"RAY_TMPDIR": "/dev/null"})
    assert "PlacementError: Ray does not start on this machine" in done.stderr.splitlines()[-1]
    assert "RAY_TMPDIR" in done.stderr.splitlines()[-1]
