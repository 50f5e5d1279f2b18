"""Starts a private Ray, also with long paths, a read-only home, or inside a job of another Ray."""

import os
import secrets
import tempfile
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from genray.errors import PlacementError, one_line

# Longest path of Ray below its folder, and the limit of a socket's path (of macOS; Linux allows four more).
BELOW = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
LONGEST_SOCKET = 103
SHORT = "/tmp"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in a job of a cluster: names the package that its workers fetch


def private_ray(**options) -> str | None:
    """Starts a private Ray.

    Args:
        options: of `ray.init`.

    Returns:
        A folder to remove after Ray has ended, or None.

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
    """Sets a token for this process and its children if Ray cannot keep one in the home directory."""
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
    """A folder for Ray's sockets if their paths in the default folder are too long; None for the default."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT
    if len(os.fsencode(usual + BELOW)) <= LONGEST_SOCKET:
        return None
    return tempfile.mkdtemp(prefix="genray-", dir=SHORT)


@contextmanager
def _without_job():
    """Hides the job of another Ray that this process is part of."""
    job = os.environ.pop(JOB, None)
    try:
        yield
    finally:
        if job is not None:
            os.environ[JOB] = job
