"""A private Ray listens on loopback and nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, descendants, wait_for

pytestmark = pytest.mark.ray
LISTEN = "0A"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def sockets_of(pids):
    """Inodes of the sockets that processes hold."""
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def listening(pids):
    """Hexadecimal local addresses on which processes listen."""
    inodes, found = sockets_of(pids), set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == LISTEN and columns[9] in inodes:
                found.add(columns[1].split(":")[0])
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
def test_private_ray_listens_on_loopback_only(tmp_path, small_run):
    line = [sys.executable, "-m", "genray.train", "--storage", str(tmp_path), *small_run, "training.epochs=5000"]
    line += ["base_learners.linf.workers=2", "runtime.share_attack=true"]  # so that actors listen to each other
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "digits" / "metrics.jsonl").exists(), "the first epoch", process)
        addresses = listening(descendants(process.pid))
    finally:
        process.terminate()
        process.communicate(timeout=600)
    assert process.returncode == 143
    assert addresses
    assert addresses <= LOOPBACK
