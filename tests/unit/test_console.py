"""Reporting never ends the work: a log that is full or read no more, a closed stream, a closed terminal."""

import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, wait_for

from genray.console import Lasting, lasting_output, say
from genray.recording import Progress

QUICK = [
    "training.epochs=3",
    "data.train_examples=150",
    "data.test_examples=20",
    "base_learners.linf.attack.num_steps=1",
]
TRAIN = ["-m", "genray.train", "--runtime", "local", *QUICK, "--storage"]


def commands(run, folder):
    """Two that write files, with the file that is the last."""
    evaluate = ["-m", "genray.evaluate", str(run), "--attacks", "pgd20", "--examples", "4", "--output", str(folder)]
    return {
        "train": ([sys.executable, *TRAIN, str(folder)], folder / "digits" / "results.json"),
        "evaluate": ([sys.executable, *evaluate], folder / "results.json"),
    }


SHELL = {
    "full disk": '"$@" 2>/dev/full >/dev/full',
    "reader that went away": '{ "$@" 2>&1; echo $? >"$CODE"; } | true; exit "$(cat "$CODE")"',
}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "command"), list(zip(SHELL, ["train", "evaluate"])))
def test_the_work_is_done_without_its_log(how, command, trained_run, tmp_path):
    line, last = commands(trained_run, tmp_path)[command]
    environment = {**os.environ, "CODE": str(tmp_path / "code")}
    done = subprocess.run(["bash", "-c", SHELL[how], "bash", *line], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(last.read_text())


@pytest.mark.slow
def test_the_work_is_done_without_its_terminal(tmp_path):
    """The kernel sends SIGHUP to all in the foreground of a terminal that is closed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, *TRAIN, str(tmp_path), "training.epochs=12"])
    wait_for(lambda: list(tmp_path.glob("digits/checkpoints/*.pt")), "a checkpoint")
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len((tmp_path / "digits" / "metrics.jsonl").read_text().splitlines()) == 12


def test_progress_of_a_notebook_goes_on_too():
    stream = io.StringIO()
    stream.close()
    progress = Progress(stream)
    progress.phase("training", 10)
    progress.say("a line")
    progress.epoch("an epoch")
    progress.close()


def test_what_a_stream_cannot_encode_is_escaped():
    raw = io.BytesIO()
    stream = Lasting(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    print("5 µm", file=stream)
    assert raw.getvalue() == b"5 \\xb5m\n" and stream.error is None


def test_streams_are_put_back_unless_they_failed(monkeypatch):
    good, lost = io.StringIO(), open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", lost)
    monkeypatch.setattr(sys, "stderr", good)
    with lasting_output():
        say("to the error output")
    assert sys.stdout is lost and sys.stderr is good
    with lasting_output():
        print("the result")
        print("more of it")
    assert isinstance(sys.stdout, Lasting)  # or Python fails when it ends
    assert good.getvalue().startswith("to the error output\nwarning: standard output: [Errno 28]")


@pytest.mark.slow
def test_a_process_that_crashes_says_by_which_signal_and_where(tmp_path):
    line = [sys.executable, *TRAIN, str(tmp_path), "training.epochs=5000"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("digits/checkpoints/*.pt")), "a checkpoint")
    process.send_signal(signal.SIGSEGV)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in err and "genray/runtime/local.py" in err  # below it whatever ran
