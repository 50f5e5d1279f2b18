"""Shared by all tests: quiet, private Ray clusters and small runs on real data."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny tensors, few cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: actors would wait for other processes' tests
os.environ.setdefault("RAY_AUTH_MODE", "token")  # no file in the home directory, no open port without a token
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # of the S3 server on loopback; Ray's workers need them too
    os.environ.setdefault(name, "for-the-test")

# A run with everything in it that can go wrong: BatchNorm, dropout, short last batches, moving gamma, warm-up of d_s,
# redistribution inside and at the end of epochs.
SMALL_RUN = [
    "training.epochs=3",
    "training.batch_size=48",
    "data.train_examples=400",
    "data.test_examples=60",
    "data.validation_examples=70",
    "base_learners.linf.attack.num_steps=2",
    "global_learner.gamma=[[0, 1], [1/3, 0.8], [1, 0.3]]",
    "global_learner.warmup_epochs=1",
    "global_learner.sync_unit=step",
    "global_learner.sync_every=3",
    "evaluation.attack.num_steps=3",
]


# A shell starts what runs behind `&` with Ctrl-C ignored, tests and all: programs that have to react to it start anew.
CTRL_C = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}


def descendants(pid) -> set[int]:
    """A process and all that it and its children started (Linux)."""
    children = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    except OSError:  # ended meanwhile
        pass
    return {pid, *(d for child in children for d in descendants(child))}


def command_of(pid) -> bytes:
    """Command line of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for(condition, what, process=None, seconds=600):
    """Waits, long enough for a machine that does twenty other things, until `condition()` gives something true.

    Args:
        process: whose end means that it will never come.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, f"{what}: the run has ended: {process.communicate()}"
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)
    return found


def timeless(metrics):
    """Records of a metrics.jsonl without what a clock gave."""
    records = [json.loads(line) for line in metrics.splitlines()]
    for record in records:
        del record["wall_s"]
        for name, learner in record["learners"].items():
            record["learners"][name] = {key: value for key, value in learner.items() if not key.endswith("seconds")}
    return records


def run_outcome(folder):
    """All of a run that must not depend on what happened to it."""
    import torch  # not before the threads are set above

    records = timeless((folder / "metrics.jsonl").read_text())
    weights = [torch.load(folder / n, weights_only=True)["state_dict"] for n in ("model.pt", "model_last.pt")]
    tensors = [{name: tensor.numpy().tobytes() for name, tensor in state.items()} for state in weights]
    return records, tensors, json.loads((folder / "results.json").read_text())["models"]


def described(model, file):
    """Whether a file is such a record and holds nothing that the model does not describe."""
    from genray import records

    plain = [json.loads(line) for line in file.read_text().splitlines()] if file.suffix == ".jsonl" else None
    for record in plain or [json.loads(file.read_text())]:
        assert list(undescribed(model.model_validate(records.check(model, record)))) == []
    return True


def undescribed(value, place=""):
    from genray import records

    value = getattr(value, "root", value)
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from undescribed(item, f"{place}.{key}")
    elif isinstance(value, records.Record) and not isinstance(value, records.TrialConfig):  # `RunConfig` describes it
        open_ended = isinstance(value, records.LearnerEpoch)  # of accuracies
        yield from () if open_ended else (f"{place}.{name}" for name in value.model_extra)
        yield from undescribed({name: getattr(value, name) for name in type(value).model_fields}, place)


def tensorboard_events(file):
    """TensorBoard's records: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = file.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size


@contextmanager
def every_write_made():
    """Files are written at once: beside the training, a slow disk skips checkpoints that a newer one replaces."""
    from genray.recording.writer import Writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "put", lambda self, key, write: write())
        yield


# A killed raylet refuses connections, so it is noticed soon; a slow one is left alone.
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 60_000,
    "health_check_failure_threshold": 5,
}


@pytest.fixture(scope="session")
def cluster():
    """One Ray for all tests of this process that can share it: a head with 4 CPUs. Tests may add nodes."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 4, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    disconnect()
    made.shutdown()


@pytest.fixture
def on_ray(cluster):
    """Connects this process to `cluster`, where it is not already: runs then use it. A test leaves nothing in it."""
    import ray

    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False, namespace="genray")
    wait_for(lambda: left() == [], "the end of the test before", seconds=60)
    yield cluster
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: left() == [], "one node, free CPUs and the end of all actors", seconds=120)


@pytest.fixture
def no_ray():
    """For tests that start a Ray of their own."""
    disconnect()
    yield
    disconnect()


@pytest.fixture(autouse=True)
def ray_is_for_its_own_tests(request):
    """A test that is not marked `ray` finds no connection, though tests of its process may have left one."""
    # Where ray is not installed, the folder of its tests can be imported under that name.
    if hasattr(sys.modules.get("ray"), "is_initialized") and request.node.get_closest_marker("ray") is None:
        disconnect()


def disconnect():
    import ray

    if ray.is_initialized():
        ray.shutdown()


def left() -> list:
    """What a test has left in the Ray that it is connected to: nodes, placement groups, taken CPUs, actors."""
    import ray
    from ray.util import placement_group_table

    added = [node["NodeID"] for node in ray.nodes() if node["Alive"]][1:]
    groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    taken = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
    titles = (b"ray::BaseLearner", b"ray::Evaluat", b"ray::Global", b"ray::Labelling")
    return added + groups + [taken] * (taken > 0) + actors(*titles)


def actors(*titles, below=None) -> list[int]:
    """Actor processes below this one, or below another, by the beginnings of their command lines."""
    return sorted(pid for pid in descendants(below or os.getpid()) if command_of(pid).startswith(titles))


@pytest.fixture
def small_run():
    """Overrides of the digits run that make it a matter of seconds."""
    return list(SMALL_RUN)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """Folder of a small adversarially trained run on the digits; not to be written to."""
    import genray

    overrides = ["training.epochs=8", "data.test_examples=120", "data.validation_examples=70", "model.width=8"]
    overrides += ["base_learners.linf.attack={norm: linf, epsilon: 0.1, step_size: 0.05, num_steps: 3}"]
    overrides += ["evaluation.attack.epsilon=0.1"]
    storage = tmp_path_factory.mktemp("trained")
    genray.train(None, overrides, runtime="local", storage=str(storage))
    files = sorted(storage.rglob("*"))
    yield storage / "digits"
    assert sorted(storage.rglob("*")) == files, "a test has written into the run that all tests share"


@pytest.fixture(scope="session")
def digits():
    """(images (120, 1, 8, 8) uint8, labels (120,)) of the trained run's test split."""
    from genray.data.datasets import load_image_data

    test = load_image_data("digits", test_examples=120).test
    return test.images, test.labels


@pytest.fixture(scope="module")
def model(trained_run):
    """The trained run's model, one a test module."""
    import genray

    return genray.load_model(trained_run)


@pytest.fixture
def genray_command():
    """Runs `python -m genray.<command>` as a user would; returns the completed process."""

    def run(command, *args, timeout=600, folder=ROOT, **kwargs):
        line = [sys.executable, "-m", f"genray.{command}", *map(str, args)]
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, cwd=folder, **kwargs)

    return run


def pytest_collection_modifyitems(items):
    """Each of pytest-xdist's processes, which get equal stretches of the list, begins with a part of the Ray tests."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    modules: dict = {}
    for item in items:
        if item.get_closest_marker("ray"):
            modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    others = [item for item in items if not item.get_closest_marker("ray")]
    others.sort(key=lambda item: item.get_closest_marker("slow") is None)
    size, ordered = -(-len(items) // processes), []
    for i in range(processes):
        mine = [item for module in list(modules.values())[i::processes] for item in module]
        rest = max(0, size - len(mine))
        ordered += mine + others[:rest]
        others = others[rest:]
    items[:] = ordered + others
