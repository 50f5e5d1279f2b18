"""genray on a device: what it computes there, how it waits and what it takes.

The device is a GPU; with GENRAY_TEST_DEVICE=cpu a CPU, where a test has a meaning there. The tests need neither ray
(those of both runtimes are skipped without it) nor a network.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "unit"), str(TESTS / "golden")]  # no conftest.py: `tests/conftest.py` is imported by that name

from all_objectives import LEARNERS, make_learner, partly_labelled  # noqa: E402
from process_groups import together  # noqa: E402
from small_learners import through_a_file, unit_config  # noqa: E402
from trace_digits import FILE, trace  # noqa: E402

from genray.core.determinism import deterministic  # noqa: E402
from genray.core.flat import ALIGNMENT, alignment_on  # noqa: E402
from genray.errors import LearnerError  # noqa: E402
from genray.evaluation.engines import ENGINES  # noqa: E402
from genray.learners.base_learner import BaseLearner  # noqa: E402
from genray.learners.execution import Execution  # noqa: E402
from genray.learners.global_learner import GlobalLearner  # noqa: E402
from genray.models import build_model  # noqa: E402
from genray.run.device_memory import learner_memory, naming_memory  # noqa: E402
from genray.run.setup import prepare  # noqa: E402
from genray.types import ThreatModel  # noqa: E402

ROOT = TESTS.parent
WANTED = os.environ.get("GENRAY_TEST_DEVICE", "cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when the first test uses cuBLAS
ATTACK = {"norm": "linf", "epsilon": 0.1, "step_size": 0.05, "num_steps": 3}
PAIR = {
    "natural": {"objective": "natural", "lr": 0.05, "averaging": {"decay": 0.5}},
    "linf": {"objective": "adversarial", "attack": ATTACK, "lr": 0.05, "averaging": {"decay": 0.5}},
}


def setup_of(**sections):
    return prepare(unit_config(PAIR, global_learner={"gamma": 0.6}, **sections))


def learners_of(setup, device):
    return {
        name: BaseLearner(name, setup.plan, setup.build_network(), setup.splits["train"], device)
        for name in setup.config.base_learners
    }


@pytest.fixture(scope="session")
def device():
    if WANTED == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device; GENRAY_TEST_DEVICE=cpu runs what has a meaning on a CPU")
    return WANTED


@pytest.fixture
def gpu(device):
    """A device that must be a GPU."""
    if device != "cuda":
        pytest.skip("has a meaning on a GPU only")
    return device


@pytest.fixture
def report(request):
    """Records a number of a test, for `benchmarks/gpu_check.py`."""

    def keep(name, value):
        request.node.user_properties.append((name, value))

    return keep


@pytest.fixture(scope="module")
def train():
    return partly_labelled()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_golden_trace(device, report):
    """Random numbers differ between kinds of devices: each kind has its own trace."""
    file = FILE.with_name(f"digits_{device}.json")
    with deterministic(True):
        now, again = trace(device=device), trace(device=device)
    report("trace", now)
    assert now == again
    expected = json.loads((file if file.exists() else FILE).read_text())
    for name, losses in expected["losses"].items():
        if file.exists():
            assert now["losses"][name] == pytest.approx(losses, rel=2e-4)
        else:  # other images and other starts, of the same distributions
            assert np.mean(now["losses"][name][-5:]) == pytest.approx(np.mean(losses[-5:]), rel=0.25)
    assert now["norm_of_theta_g"] == pytest.approx(expected["norm_of_theta_g"], rel=1e-5 if file.exists() else 0.02)


def test_shares_add_up_to_the_serial_recursion(device):
    setup = setup_of()
    learners, plan = learners_of(setup, device), setup.plan
    theta = learners["linf"].flat.snapshot(0).weights.astype(np.float64)
    averages = {name: theta.copy() for name in learners}
    for step in range(6):
        for name, learner in learners.items():
            learner.run_window(step, step + 1)
            decay = min(0.5, (1 + step) / (10 + step))
            raw = learner.flat.snapshot(0).weights.astype(np.float64)
            averages[name] = decay * averages[name] + (1 - decay) * raw
        decay = min(setup.config.global_learner.decay, (1 + step) / (10 + step))
        theta = decay * theta + (1 - decay) * sum(plan.mixing_weight(n, step) * averages[n] for n in learners)
    theta_g = GlobalLearner(setup.config).combine([learner.contribution() for learner in learners.values()])
    np.testing.assert_allclose(theta_g.weights, theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_going_on_from_a_checkpoint_gives_the_same_bits(device, optimizer):
    options = {name: {**learner, "optimizer": {"name": optimizer}} for name, learner in PAIR.items()}
    setup = prepare(unit_config(options, global_learner={"gamma": 0.6}))
    with deterministic(True):
        whole, first, second = (learners_of(setup, device)["linf"] for _ in range(3))
        whole.run_window(0, 5)
        first.run_window(0, 2)
        second.load_state_dict(through_a_file(first.state_dict()))
        second.run_window(2, 5)
    for key in ("weights", "average", "share", "counters"):
        assert np.array_equal(whole.state_dict()[key], second.state_dict()[key]), key


def test_views_are_aligned(device):
    learner = learners_of(setup_of(), device)["linf"]
    unit = alignment_on(learner.device)
    assert unit == (ALIGNMENT if device == "cuda" else 1)
    tensors = [*learner.network.parameters(), *(p.grad for p in learner.network.parameters())]
    tensors += [b for b in learner.network.buffers() if b.dtype in (torch.int64, torch.float32) and b.dim() < 2]
    assert all(tensor.data_ptr() % unit == 0 for tensor in tensors)


def test_what_is_handed_over_is_what_is_there(device):
    """The share that the object store copies lies in a buffer that is used again; a private one stays."""
    learner = learners_of(setup_of(), device)["linf"]
    learner.run_window(0, 2)
    kept, lent = learner.contribution(), learner.contribution(private=False)
    expected = learner.flat.layout.pack(learner.share).cpu().numpy()
    assert (kept.weights == expected).all() and (lent.weights == expected).all()
    learner.run_window(2, 3)
    later = learner.contribution(private=False)
    assert (kept.weights == expected).all() and not (later.weights == expected).all()


def test_bf16_attacks_are_as_strong(device, report):
    setup = setup_of()
    learner = learners_of(setup, device)["natural"]
    learner.run_window(0, 100)
    x, y = setup.splits["test"].take(slice(0, 256))
    x, y = (x.float() / 255).to(device), y.to(device)
    found = {}
    for precision in ("fp32", "bf16"):
        attack = learners_of(setup, device)["linf"].attacks["attack"]
        execution = Execution(learner.network, setup.config.compute.replace(precision=precision), learner.device)
        execution.refresh()
        adversarial = attack(execution.attacked("eval"), x, y, _Fixed())
        with torch.no_grad():
            found[precision] = float(torch.nn.functional.cross_entropy(learner.network.eval()(adversarial), y))
            clean = float(torch.nn.functional.cross_entropy(learner.network(x), y))
    report("loss under attack", found)
    assert found["fp32"] > 2 * clean and found["bf16"] == pytest.approx(found["fp32"], rel=0.05)


class _Fixed:
    def uniform(self, like):
        return torch.full_like(like, 0.5)


def test_autoattack_says_what_it_says_on_a_cpu(device, report):
    setup = setup_of()
    learner = learners_of(setup, "cpu")["linf"]
    learner.run_window(0, learner.plan.total_steps)
    network = learner.network.eval()
    x, y = setup.splits["test"].take(slice(0, 96))
    x = x.float() / 255
    with torch.no_grad():
        right = network(x).argmax(1) == y
    x, y, standing = x[right], y[right], {}
    for place in ("cpu", device):
        there = network.to(place)
        stands = torch.ones(len(y), dtype=torch.bool)
        for member in ("apgd_ce", "apgd_t"):
            how = {"threat": ThreatModel("linf", 0.06), "seed": 0, "num_classes": 10, "member": member}
            found = ENGINES["genray"](there, x.to(place), y.to(place), **how)
            with torch.no_grad():
                stands &= (there(found).argmax(1) == y.to(place)).cpu()
        standing[place] = stands
    differ = int((standing["cpu"] != standing[device]).sum())
    report("verdicts that differ", f"{differ} of {len(y)}")
    assert 5 < int(standing["cpu"].sum()) < len(y) and differ <= 0.02 * len(y)


# --- waits and launches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_no_step_waits(gpu, train, name):
    """torch's own watch over synchronising calls, which sees what the guard of the unit tests cannot."""
    learner = make_learner(LEARNERS[name], train, device=gpu)
    take = learner._take_step

    def watched(step):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            return take(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    learner._take_step = watched
    learner.run_window(0, 4)
    assert learner.step == 4


def test_cuda_graphs_are_used(gpu, report):
    from torch._dynamo.utils import counters
    from torch.profiler import ProfilerActivity, profile

    setup = setup_of(compute={"compile": True}, model={"name": "resnet18", "width": 8})
    learner = learners_of(setup, gpu)["linf"]
    learner.run_window(0, 4)  # compiles, and records the graphs
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        learner.run_window(4, 6)
        torch.cuda.synchronize()
    launches = sum(event.count for event in watched.key_averages() if event.key == "cudaGraphLaunch")
    report("graph launches a step", launches / 2)
    report("graphs skipped", counters["inductor"]["cudagraph_skips"])
    assert counters["inductor"]["cudagraph_skips"] == 0
    # Each attack step forward and backward, and the update's.
    assert launches >= 2 * 2 * (ATTACK["num_steps"] + 1)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_estimate_is_about_what_a_learner_takes(gpu, report):
    setup = setup_of(model={"name": "resnet18", "width": 32}, training={"epochs": 1, "batch_size": 256})
    estimate = learner_memory(setup, {"linf": 1})["linf"].total
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learners_of(setup, gpu)["linf"].run_window(0, 2)
    taken = torch.cuda.max_memory_allocated() - before
    report("memory, estimated and taken", [estimate, taken])
    assert 0.5 * taken < estimate < 1.3 * taken


def test_a_full_device_is_one_line(gpu):
    setup = setup_of(model={"name": "resnet18", "width": 32}, training={"epochs": 1, "batch_size": 256})
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(LearnerError, match=r"base_learners\.linf: .*lower training.batch_size"):
            with naming_memory(setup, "linf"):
                learners_of(setup, gpu)["linf"].run_window(0, 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- processes -------------------------------------------------------------------------------------------------------


def test_two_workers_on_one_device(device):
    """They talk over gloo, as on Ray where both are on one GPU; the sums are of other order than one process's."""
    if device == "cuda":
        pytest.skip("a forked process cannot use the GPU; the test of both runtimes does")
    setup = setup_of()

    def work(worker, own, everyone):
        network = setup.build_network()
        learner = BaseLearner("linf", setup.plan, network, setup.splits["train"], device, process_group=own)
        learner.run_window(0, 3)
        return learner.flat.snapshot(3).weights

    one = learners_of(setup, device)["linf"]
    one.run_window(0, 3)
    first, second = together({"linf": 2}, work)
    assert np.array_equal(first, second)
    assert np.abs(first - one.flat.snapshot(3).weights).max() < 5e-3


def small_run(device, *more):
    return [f"device={device}", "training.epochs=6", "data.train_examples=800", "data.validation_examples=100", *more]


def test_killed_and_resumed(device, tmp_path):
    line = [sys.executable, "-m", "genray.train", "--runtime", "local", "--storage", str(tmp_path), *small_run(device)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline, folder = time.monotonic() + 240, tmp_path / "digits"
    while not list(folder.glob("checkpoints/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "results.json").exists()
    done = subprocess.run([*line, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    epochs = [json.loads(row)["epoch"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs[-1] == 6 and (folder / "results.json").exists()


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_both_runtimes(device, tmp_path, workers):
    """On Ray the same run; where one GPU has several processes, its two workers among them."""
    pytest.importorskip("ray.train")  # not "ray": without it, the folder of tests/ray is a package of that name
    import genray

    losses = {}
    for runtime in ("local", "ray"):
        overrides = small_run(device, f"base_learners.linf.workers={workers}", "training.epochs=2")
        genray.train(None, overrides, runtime=runtime, storage=tmp_path / runtime)
        rows = (tmp_path / runtime / "digits" / "metrics.jsonl").read_text().splitlines()
        losses[runtime] = [learner["loss"] for row in rows for learner in json.loads(row)["learners"].values()]
    assert len(losses["local"]) == 4
    exact = device == "cpu" and workers == 1
    assert losses["ray"] == pytest.approx(losses["local"], rel=0 if exact else 0.02, abs=0)


def test_networks_run_on_the_device(device):
    for name, width in (("resnet18", 4), ("preact_resnet18", 4), ("wrn_28_10", 1)):
        network = build_model(name, num_classes=7, in_channels=3, image_size=(32, 32), width=width, seed=0).to(device)
        x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        there = network.eval()(x.to(device)).detach().cpu()
        assert torch.allclose(there, network.to("cpu")(x), rtol=1e-3, atol=1e-3), name
