"""What a dead worker's stderr file tells, and the one line that stays of a long message."""

import pytest
from ray.exceptions import RuntimeEnvSetupError

from genray.errors import LearnerError, LostError, one_line
from genray.runtime.ray.fetch import _lost
from genray.runtime.ray.worker_logs import tail, understood

SEGV = """:job_id:01000000
:actor_name:A
warning: eight of nine
*** SIGSEGV received at time=1796053020 on cpu 1 ***
PC: @     0x7fed63185ad8  (unknown)  (unknown)
    @     0x7fed6305a050  (unknown)  (unknown)
[2026-11-30 15:37:00,551 E 13359 13359] logging.cc:474: *** SIGSEGV received at time=1796053020 on cpu 1 ***
[2026-11-30 15:37:00,551 E 13359 13359] logging.cc:474: PC: @     0x7fed63185ad8  (unknown)  (unknown)
Fatal Python error: Segmentation fault

Stack (most recent call first):
  File "/usr/lib/ctypes.py", line 519 in string_at
  File "/home/me/die.py", line 10 in die
  File "/usr/lib/site-packages/ray/_private/worker.py", line 1069 in main_loop

Extension modules: msgpack._cmsgpack, google._upb._message (total: 2)
"""
ABORT = """terminate called after throwing an instance of 'std::bad_alloc'
  what():  std::bad_alloc
*** SIGABRT received at time=1796053021 on cpu 1 ***
Fatal Python error: Aborted
"""


@pytest.mark.parametrize(
    "text, signal, words",
    [
        (
            SEGV,
            "SIGSEGV",
            "warning: eight of nine | Fatal Python error: Segmentation fault | "
            'File "/usr/lib/ctypes.py", line 519 in string_at | File "/home/me/die.py", line 10 in die',
        ),
        (
            ABORT,
            "SIGABRT",
            "terminate called after throwing an instance of 'std::bad_alloc' | what(): std::bad_alloc | "
            "Fatal Python error: Aborted",
        ),
        (":job_id:01000000\n:actor_name:A\nlast words\n", "", "last words"),
        ("", "", ""),
    ],
    ids=["segmentation fault", "abort", "killed", "nothing"],
)
def test_signal_and_last_lines(text, signal, words):
    assert understood(text) == (signal, words)


def test_the_file_is_found_by_the_process_and_only_its_end_is_read(tmp_path):
    (tmp_path / "worker-abc-01000000-12.err").write_text("x" * 50_000 + "the end")
    (tmp_path / "worker-abc-01000000-2.err").write_text("another process")
    assert tail(tmp_path, 12).endswith("the end") and len(tail(tmp_path, 12)) < 50_000
    assert tail(tmp_path, 3) == ""


def test_an_environment_that_cannot_be_made_is_not_tried_again():
    error = _lost(RuntimeEnvSetupError("no such package"), "evaluator", {})
    assert isinstance(error, LearnerError) and not isinstance(error, LostError)
    assert "no such package" in str(error)


def test_a_message_that_is_cut_keeps_its_end():
    text = "\n ".join(f"word{i}" for i in range(100))
    short = one_line(text, 80)
    assert len(short) <= 80 and short.startswith("word0 word1") and short.endswith("word98 word99")
    assert one_line("as it\n is", 80) == "as it is"
    assert one_line(ValueError()) == "ValueError"
