"""Why a worker process died: Ray reports the death, the signal and the reason are in the stderr file."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from genray.errors import one_line

TAIL_BYTES = 20_000
ASK_TIMEOUT_S = 10  # for a task on another node
SAID, FRAMES = 3, 2  # lines of its output, and of Python's stack


@dataclass(frozen=True)
class Death:
    """Attributes:
    why: one line: the signal, if known, and the last output of the process.
    signal: signal of the crash, such as "SIGSEGV"; empty if the process was killed from outside or exited.
    """

    why: str
    signal: str = ""


def death_of(error) -> Death:
    """Why an actor's process died.

    Args:
        error: Ray's `RayActorError` about it.
    """
    text = str(error)
    reason = one_line(text.rpartition("Worker exit detail:")[2] or text)
    found = re.search(r"^\s*pid: (\d+)", text, re.M), re.search(r"^\s*ip: (\S+)", text, re.M)
    said = _said(int(found[0][1]), found[1][1]) if all(found) else ""
    signal, words = understood(said)
    if signal:
        return Death(f"{signal}{words and f': {words}'}", signal)
    if "End of file" in reason:  # Ray's list of possible causes
        reason = "it was killed, by hand or because memory ran out (SIGKILL)"
    return Death(f"{reason}{words and f'; it said last: {words}'}")


def understood(text: str) -> tuple[str, str]:
    """(signal or "", the last meaningful lines joined to one) of a worker's stderr."""
    signal = re.search(r"^\*\*\* (SIG[A-Z]+) received", text, re.M)
    before, _, stack = text.partition("Stack (most recent call first)")
    said = [line.strip() for line in before.splitlines() if line.strip() and not NOISE.match(line)]
    frames = [line.strip() for line in stack.splitlines() if line.strip().startswith("File ")]
    return signal[1] if signal else "", one_line(" | ".join([*said[-SAID:], *frames[:FRAMES]]), 500)


# Ray's headers, its signal handler's report (twice) and its warnings.
NOISE = re.compile(r":(job_id|actor_name|task_name):|\*\*\* SIG|PC: @|\s*@ |\[20\d\d-\d\d-\d\d |Extension modules:")


def _said(pid, address) -> str:
    """The end of the stderr file of a process; empty if its node is gone or does not answer."""
    if address == ray.util.get_node_ip_address():
        return tail(_logs(), pid)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == address]
    if not nodes:
        return ""
    there = NodeAffinitySchedulingStrategy(nodes[0], soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    asked = ray.remote(**options)(_tail_here).remote(pid)
    try:
        return ray.get(asked, timeout=ASK_TIMEOUT_S)
    except ray.exceptions.RayError:
        return ""


def _tail_here(pid):
    return tail(_logs(), pid)


def _logs():
    """Ray's folder of log files on this node; Ray has no public name for it."""
    return Path(ray._private.worker.global_worker.node.get_logs_dir_path())


def tail(folder: Path, pid: int) -> str:
    """The end of the stderr file of a worker process; empty if there is none."""
    files = sorted(folder.glob(f"worker-*-{pid}.err"), key=lambda path: path.stat().st_mtime)
    return files[-1].read_bytes()[-TAIL_BYTES:].decode(errors="replace") if files else ""
