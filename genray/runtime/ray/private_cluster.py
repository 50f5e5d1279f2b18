"""A Ray of our own, whatever surrounds this process: long paths, a read-only home, a job of another Ray."""

import os
import secrets
import tempfile
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from genray.errors import PlacementError, one_line

# What Ray puts below its folder, and how long a socket's path may be (on macOS; Linux allows four more).
BELOW = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
LONGEST_SOCKET = 103
SHORT = "/tmp"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # of a job of a cluster: the package that its workers fetch from there


def private_ray(**options) -> str | None:
    """Starts it.

    Args:
        options: of `ray.init`.

    Returns:
        A folder that is to be removed when it has ended, or None.

    Raises:
        PlacementError: it does not start.
    """
    try:
        _bring_a_token()
        folder = _short_folder()
        with _without_job():
            ray.init("local", _temp_dir=folder, **options)
        return folder
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise PlacementError(
            f"Ray does not start on this machine: {one_line(error)}; its files go to RAY_TMPDIR, a short writable path"
        ) from None


def _bring_a_token():
    """Ray keeps its token in the home directory; where that cannot be, this process and its children have their own."""
    given = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or any(os.environ.get(name) for name in given):
        return
    try:
        kept = Path.home() / ".ray"
        if not os.access(kept / "auth_token", os.R_OK):
            kept.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=kept).close()
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _short_folder() -> str | None:
    """A folder for Ray's sockets where below its usual one their paths were too long; None for the usual one."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT
    if len(os.fsencode(usual + BELOW)) <= LONGEST_SOCKET:
        return None
    return tempfile.mkdtemp(prefix="genray-", dir=SHORT)


@contextmanager
def _without_job():
    """Inside, this process is no job of another Ray."""
    job = os.environ.pop(JOB, None)
    try:
        yield
    finally:
        if job is not None:
            os.environ[JOB] = job
