"""What a run survives in one process: NaNs, broken checkpoints, full disks, being stopped, a second run of its name."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, run_outcome, tensorboard_events, wait_for

import genray
from genray.cli.parser import run_command
from genray.cli.train import main, parse_args
from genray.config import load_config
from genray.errors import LearnerError, LostError, NonFiniteError, RunFolderError, StorageError
from genray.learners.base_learner import BaseLearner
from genray.learners.global_learner import GlobalLearner
from genray.recording import Progress, RunFolder, RunRecorder
from genray.recording.writer import Writer
from genray.run.setup import prepare
from genray.runtime import recovery
from genray.runtime.recovery import run_with_recovery
from genray.storage import Storage

STEPS_PER_EPOCH = 7  # of the small run


def train(storage, overrides, **options):
    return genray.train(None, overrides, runtime="local", storage=str(storage), **options)


def outcome(storage):
    return run_outcome(storage / "digits")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    from conftest import SMALL_RUN

    storage = tmp_path_factory.mktemp("undisturbed")
    train(storage, SMALL_RUN)
    return outcome(storage)


def stop_at(monkeypatch, name, step, error=KeyboardInterrupt):
    """Lets a learner raise instead of taking a step."""
    real = BaseLearner._take_step

    def take_step(self, at):
        if (self.name, at) == (name, step):
            raise error
        return real(self, at)

    monkeypatch.setattr(BaseLearner, "_take_step", take_step)


# --- NaN -----------------------------------------------------------------------------------------------------------


def inject_nan(monkeypatch, name, step):
    """At one step a learner's gradient is NaN, and with it its weights; returns every theta_g that was made."""
    take_step, combine, made = BaseLearner._take_step, GlobalLearner.combine, []

    def broken(self, at):
        loss, correct, size = take_step(self, at)
        if (self.name, at) == (name, step):
            self.flat.weights[:10] = float("nan")
            loss = loss * float("nan")
        return loss, correct, size

    def watched(self, contributions):
        made.append(combine(self, contributions))
        return made[-1]

    monkeypatch.setattr(BaseLearner, "_take_step", broken)
    monkeypatch.setattr(GlobalLearner, "combine", watched)
    return made


@pytest.mark.parametrize("seed", [0, 1])
def test_a_nan_names_learner_and_batch_and_theta_g_stays_finite(tmp_path, small_run, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    name, step = str(rng.choice(["natural", "linf"])), int(rng.integers(3, 21))
    made = inject_nan(monkeypatch, name, step)
    epoch, batch = divmod(step, STEPS_PER_EPOCH)
    where = rf"base_learners\.{name}: loss nan at step {step} \(batch {batch} of epoch {epoch + 1}\)"
    with pytest.raises(NonFiniteError, match=where):
        train(tmp_path, small_run)
    assert made
    assert all(np.isfinite(theta_g.weights).all() for theta_g in made)
    assert len(list((tmp_path / "digits" / "checkpoints").glob("*"))) == min(epoch, 2)
    assert not (tmp_path / "digits" / "results.json").exists()


# --- stopping and going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("learner", "step"), [("natural", 0), ("linf", 12)])
def test_stopped_anywhere_and_resumed_in_the_middle_of_an_epoch(
    tmp_path, small_run, monkeypatch, undisturbed, learner, step
):
    """Additional checkpoints cut windows, which changes no bit."""
    overrides = [*small_run, "checkpoint.every_steps=2"]
    with monkeypatch.context() as patch:
        stop_at(patch, learner, step)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, overrides)
    states = sorted(p.name for p in (tmp_path / "digits").glob("checkpoints/*"))
    newest = max((s for s in [*range(0, 21, 2), 7, 14] if s <= step), default=0)
    assert states[-1:] == ([f"state-{newest:09d}.pt"] if newest else [])
    train(tmp_path, overrides, resume=True)
    assert outcome(tmp_path) == undisturbed
    assert [record["epoch"] for record in undisturbed[0]] == [1, 2, 3]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, small_run, capsys, undisturbed):
    train(tmp_path, small_run)
    newest = tmp_path / "digits" / "checkpoints" / "state-000000021.pt"
    (tmp_path / "digits" / "results.json").unlink()  # else the run is finished, and nothing is read
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    capsys.readouterr()
    train(tmp_path, small_run, resume=True)
    err = capsys.readouterr().err
    assert f"{newest}: not a readable checkpoint: its checksum does not fit" in err
    assert "going on from state-000000014.pt" in err
    assert outcome(tmp_path) == undisturbed


def test_an_object_store_keeps_the_same_promise(small_run, monkeypatch, undisturbed, tmp_path):
    """pyarrow's file system in memory stands for one; it has no rename."""
    from pyarrow import fs

    storage = {}
    real = Storage.__init__

    def shared(self, uri):
        real(self, uri)
        if not self.is_local:
            self.filesystem = storage.setdefault("mock", self.filesystem)

    monkeypatch.setattr(Storage, "__init__", shared)
    with monkeypatch.context() as patch:
        stop_at(patch, "natural", 15)
        with pytest.raises(KeyboardInterrupt):
            genray.train(None, small_run, runtime="local", storage="mock:///runs")
    mock = storage["mock"]
    names = [f.base_name for f in mock.get_file_info(fs.FileSelector("runs/digits/checkpoints"))]
    assert sorted(names) == ["state-000000007.pt", "state-000000014.pt"]
    with mock.open_input_stream("runs/digits/checkpoints/state-000000014.pt") as stream:
        whole = stream.read()
    with mock.open_output_stream("runs/digits/checkpoints/state-000000014.pt") as stream:
        stream.write(whole[: len(whole) // 3])
    genray.train(None, small_run, runtime="local", storage="mock:///runs", resume=True)
    for name in ("metrics.jsonl", "model.pt", "model_last.pt", "results.json"):
        (tmp_path / "digits").mkdir(exist_ok=True)
        with mock.open_input_stream(f"runs/digits/{name}") as stream:
            (tmp_path / "digits" / name).write_bytes(stream.read())
    assert outcome(tmp_path) == undisturbed


# --- storage that fails --------------------------------------------------------------------------------------------


def fail_writes(monkeypatch, while_true, only=""):
    """Every write of files with `only` in their name fails as on a full disk while `while_true()`."""
    real = Storage.write

    def write(self, name, data):
        if only in name and name not in ("data.json", "config.yaml") and while_true():  # what a run begins with
            raise StorageError(f"{self.path(name)}: cannot be written: No space left on device")
        real(self, name, data)

    monkeypatch.setattr(Storage, "write", write)


@pytest.mark.slow
def test_a_full_disk_delays_files_not_the_run(tmp_path, small_run, monkeypatch, capsys, undisturbed):
    full = itertools.repeat(True, 12)  # attempts
    fail_writes(monkeypatch, lambda: next(full, False))
    train(tmp_path, small_run)
    err = capsys.readouterr().err
    assert err.count("No space left on device; kept in memory and tried again") == 1
    assert "storage: writes again" in err
    assert outcome(tmp_path) == undisturbed
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.slow
def test_results_that_cannot_be_written_end_the_run(tmp_path, small_run, monkeypatch, capsys):
    fail_writes(monkeypatch, lambda: True)
    argv = ["--runtime", "local", "--storage", str(tmp_path), *small_run]
    short = ["runtime.storage_timeout_s=1", "runtime.grace_period_s=1"]
    began = time.monotonic()
    assert run_command(main, parse_args([*argv, *short])) == 1
    assert time.monotonic() - began < 60
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: tried for 1 s; not written: ")
    assert last.endswith(": cannot be written: No space left on device)") and last.count(f"{tmp_path}/digits/") == 1
    assert all(name in last for name in ("model.pt", "learners/linf.pt", "checkpoint", "tensorboard/", "results.json"))
    assert "theta_g, last epoch" in err  # the figures are not lost with the files
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learners/linf.pt", "metrics.jsonl"])
def test_resuming_writes_what_could_not_be_written(tmp_path, small_run, monkeypatch, name, undisturbed):
    """The record alone does not make a run a finished one."""
    with monkeypatch.context() as patch:
        fail_writes(patch, lambda: True, only=name)
        with pytest.raises(StorageError, match=f"not written: {name} "):
            train(tmp_path, [*small_run, "runtime.storage_timeout_s=1"])
    assert (tmp_path / "digits" / "results.json").is_file() and not (tmp_path / "digits" / name).exists()
    train(tmp_path, small_run, resume=True)
    assert (tmp_path / "digits" / name).is_file() and outcome(tmp_path) == undisturbed


def spoiled_at(epoch, place, spoil):
    """An `on_epoch` that does something to `tensorboard/` while the run is on."""

    def on_epoch(record):
        if record["epoch"] == epoch:
            wait_for(lambda: [f for f in place.glob("events*") if ".tmp-" not in f.name], "the event file")
            spoil(place)

    return on_epoch


@pytest.mark.slow
def test_one_file_that_cannot_be_written_stops_no_other(tmp_path, small_run, capsys, undisturbed):
    place = tmp_path / "digits" / "tensorboard"

    def replace(place):
        shutil.rmtree(place)
        place.write_text("mine")

    with pytest.raises(StorageError) as caught:
        train(tmp_path, [*small_run, "runtime.storage_timeout_s=1"], on_epoch=spoiled_at(1, place, replace))
    expected = r"tried for 1 s; not written: tensorboard/\S+ \(\S+: cannot be written: \S.*\)"
    assert re.fullmatch(expected, str(caught.value))
    assert capsys.readouterr().err.count("kept in memory and tried again") == 1
    assert outcome(tmp_path) == undisturbed
    assert place.read_text() == "mine"


def cut(place):
    for file in place.iterdir():
        file.write_bytes(file.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [shutil.rmtree, cut])
def test_a_tensorboard_folder_that_went_away_is_begun_anew(tmp_path, small_run, spoil):
    place = tmp_path / "digits" / "tensorboard"
    train(tmp_path, [*small_run, "runtime.storage_timeout_s=1"], on_epoch=spoiled_at(2, place, spoil))
    newest = max(place.iterdir(), key=lambda file: file.stat().st_size)
    found = [(event.step, value.tag) for event in tensorboard_events(newest) for value in event.summary.value]
    assert [step for step, tag in found if tag == "linf/loss"] == [1, 2, 3]


def test_a_failing_file_is_tried_less_and_less_and_the_others_at_once():
    written, tried, said = [], [], []
    writer = Writer(said.append)

    def fail():
        tried.append(len(written))
        raise StorageError("bad: cannot be written: no")

    writer.put("bad", fail)
    for i in range(200):
        done = threading.Event()
        writer.put(f"good{i % 3}", lambda i=i, done=done: (written.append(i), done.set()))
        assert done.wait(60)
    assert written == list(range(200))
    assert len(tried) < 100  # not between any two others
    with pytest.raises(StorageError, match=r"not written: bad \(bad: cannot be written: no\)"):
        writer.flush(0.1)
    assert said == ["warning: bad: cannot be written: no; kept in memory and tried again"]


@pytest.mark.slow
@pytest.mark.parametrize("grace", [30, 0.2])
def test_a_stopped_run_waits_for_its_last_checkpoint(tmp_path, small_run, monkeypatch, capsys, grace):
    """As long as runtime.grace_period_s, not longer."""
    stopped = threading.Event()
    fail_writes(monkeypatch, lambda: not stopped.wait(0.01), only="state-")
    stop_at(monkeypatch, "linf", 12)
    real = RunRecorder.save

    def save(self):
        threading.Timer(2, stopped.set).start()
        real(self)

    monkeypatch.setattr(RunRecorder, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [*small_run, f"runtime.grace_period_s={grace}"])
    written = [p.name for p in (tmp_path / "digits").glob("checkpoints/*")]
    assert written == (["state-000000007.pt"] if grace == 30 else [])
    assert ("not written: checkpoint" in capsys.readouterr().err) == (grace != 30)
    stopped.set()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path, small_run, monkeypatch):
    fail_writes(monkeypatch, lambda: True, only="state-")
    stop_at(monkeypatch, "linf", 12)
    real, began = RunRecorder.save, []

    def save(self):
        began.append(time.monotonic())
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        real(self)

    monkeypatch.setattr(RunRecorder, "save", save)
    argv = ["--runtime", "local", "--storage", str(tmp_path), *small_run, "runtime.grace_period_s=600"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
    try:
        assert run_command(main, parse_args(argv)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert 1 <= time.monotonic() - began[0] < 60


def test_a_folder_that_cannot_be_written_is_said_before_the_start(tmp_path, small_run, monkeypatch, capsys):
    monkeypatch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(StorageError("digits: No space left")))
    assert run_command(main, parse_args(["--runtime", "local", "--storage", str(tmp_path / "runs"), *small_run])) == 2
    assert capsys.readouterr().err == "error: digits: No space left\n"
    assert not list(tmp_path.iterdir())


def test_slow_storage_starves_no_file():
    """One kind of file that is renewed faster than it is written must not keep the others waiting."""
    written, writer = [], Writer(print)
    started = threading.Event()

    def slow(key):
        def write():
            started.set()
            time.sleep(0.02)
            written.append(key)

        return write

    for _ in range(100):
        for key in "abc":
            writer.put(key, slow(key))
        started.wait(10)
        time.sleep(0.005)
    assert set(written) == set("abc")
    writer.flush(30)
    assert set(written[-3:]) == set("abc")


# --- two runs of one name ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_of_the_same_name_is_refused_until_the_first_is_dead(tmp_path, small_run):
    code = (
        "import sys, time\nfrom genray.recording import RunFolder\n"
        f"with RunFolder({str(tmp_path)!r}, 'digits').lock():\n    print('locked', flush=True)\n    time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert first.stdout.readline() == b"locked\n"
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="digits: another process works on this run"):
            train(tmp_path, small_run, resume=resume)
    assert os.listdir(tmp_path / "digits") == [".lock"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    train(tmp_path, [*small_run, "training.epochs=1", "global_learner.warmup_epochs=0"])
    assert ".lock" not in os.listdir(tmp_path / "digits")


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    folder = RunFolder(str(tmp_path), "digits")
    folder.storage.write("checkpoints/state-000000009.pt.tmp-ab12cd34", b"half")
    folder.storage.write("checkpoints/notes.tmp-mine", b"whole")
    with folder.lock():
        assert folder.storage.names("checkpoints") == ["notes.tmp-mine"]


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder(str(tmp_path / "a" / "b"), "digits").lock():
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


# --- limits --------------------------------------------------------------------------------------------------------


def test_losses_in_a_row_end_the_run(tmp_path, small_run, monkeypatch, capsys):
    """Counted from the newest checkpoint on: a run that gets on may lose as many as it likes."""
    monkeypatch.setattr(recovery, "LONGEST_PAUSE_S", 0.01)
    setup = prepare(load_config(None, [*small_run, "runtime.max_failures=2"]))
    recorder = RunRecorder(setup, RunFolder(str(tmp_path), "digits"), Progress())
    calls = []

    def attempt(state):
        calls.append(state["step"] if state else 0)
        if len(calls) in (2, 4):  # it got on
            recorder.newest_step += 1
        raise LostError("base_learners.linf" if len(calls) % 2 else "evaluator", f"its process died ({len(calls)})")

    with pytest.raises(LearnerError) as caught:
        run_with_recovery(attempt, recorder, Progress())
    assert len(calls) == 6  # two losses after the 4th, which is the first since the newest checkpoint
    assert str(caught.value) == (
        "lost since the start, before any checkpoint: evaluator 2 times, base_learners.linf "
        "(runtime.max_failures: 2); the last was evaluator: its process died (6)"
    )
    assert capsys.readouterr().err.count("going on from step") == 5
