"""Connects to Ray: starts a private one on this machine or joins a cluster, and disconnects."""

import logging
import os
import shutil
import signal
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

import genray
from genray.console import say
from genray.core.user_code import packages
from genray.errors import PlacementError, one_line
from genray.runtime.ray.private_cluster import private_ray

NAMESPACE = "genray"
CONNECT_TIMEOUT_S = 5
# Ray gives the same error for a wrong token as for a wrong port.
TOKEN_HINT = "one with tokens wants RAY_AUTH_MODE=token and its token, in ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
SHUTDOWN_TIMEOUT_S = 30
# Unreferenced objects are freed at once and not in batches: the next weights then reuse mapped pages, which halves the
# time of a transfer.
STORE = {"free_objects_batch_size": 1}


def check_cores(widest: dict[str, float], address: str | None):
    """Checks that a private Ray on this machine can start every actor: several may share a core, none has more CPUs
    than there are cores.

    Args:
        widest: run -> CPUs of the largest actor of a learner.
        address: as in `connected`.

    Raises:
        PlacementError: names the first run with such a learner.
    """
    cores = os.cpu_count() or 1
    for name, cpus in widest.items() if address is None and not ray.is_initialized() else ():
        if cpus > cores:
            raise PlacementError(
                f"{name}: a learner wants {cpus:g} CPU, this machine has {cores}; lower "
                "base_learners.<name>.resources, or join a cluster with --address"
            )


@contextmanager
def connected(address: str | None, *, num_cpus: float = 1):
    """A Ray connection for the duration of a run.

    Args:
        address: None starts a private Ray on this machine; "auto" or "host:port" joins one. An
            existing connection of this process is used and left open.
        num_cpus: logical CPUs that a private Ray has at least: several learners may share a core.

    Yields:
        Whether nodes may join later: a cluster may have an autoscaler, a private Ray has none.

    Raises:
        PlacementError: no cluster answers at the address, or it refuses the connection.
    """
    if ray.is_initialized():
        yield True
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # workers share this environment as it is
    folder, on_sigterm = None, signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    if address is None:
        cpus = max(os.cpu_count() or 1, int(-(-num_cpus // 1)))
        shipped = {"runtime_env": {"py_modules": packages()}} if packages() else {}
        folder = private_ray(num_cpus=cpus, include_dashboard=False, _system_config=STORE, **shipped, **quiet)
    else:
        _join(address, quiet)
    try:
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init installs a handler that ends the process at once
        yield address is not None
    finally:
        within(SHUTDOWN_TIMEOUT_S, "the end of Ray", ray.shutdown)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def node_resources() -> list[dict]:
    """Resources of each live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_labels() -> list[dict]:
    """Labels of each live node, in the order of `node_resources`."""
    return [node["Labels"] for node in ray.nodes() if node["Alive"]]


def within(timeout_s, what, call):
    """Calls `call()` and returns after `timeout_s` at the latest: clean-up must not hang."""
    problems = []

    def attempt():
        try:
            call()
        except Exception as error:  # a broken cluster can raise anything
            problems.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=attempt, name=f"genray: {what}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        problems.append(f"not done within {timeout_s:g} s, left behind")
    for problem in problems:
        say(f"warning: {what}: {one_line(problem)}")


def _join(address, quiet):
    _check_answers(address)
    # Sends genray and the user's packages to the nodes, which may have other versions.
    package = str(Path(genray.__file__).parent)
    try:
        ray.init(address=address, runtime_env={"py_modules": [package, *packages()]}, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, AuthenticationError) as error:
        raise PlacementError(
            f"--address {address}: no Ray cluster lets us in: {one_line(error)}; {TOKEN_HINT}"
        ) from None


def _check_answers(address):
    """Checks that a server listens at host:port, because Ray itself would try for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or "/" in host:
        raise PlacementError(f"--address: expected auto or HOST:PORT, got {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise PlacementError(f"--address {address}: no Ray cluster answers there: {error}") from None
