"""Labels given by workers: the bits of one process, whatever dies meanwhile."""

import os
import re
import signal

import numpy as np
import pytest

import genray
from genray.runtime.ray import labelling

pytestmark = pytest.mark.ray


def test_workers_give_the_bits_of_one_process(on_ray, tmp_path, small_run, monkeypatch, capfd):
    class Dying(labelling.LabellingWorker):
        def run(self, start, stop):
            if start and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(start, stop)

    genray.train(None, small_run, runtime="local", storage=str(tmp_path), name="teacher")
    here = genray.label(tmp_path / "teacher", tmp_path / "here.npz", batch_size=25)
    assert len(np.unique(np.load(here)["label"])) > 1
    monkeypatch.setattr(labelling, "LabellingWorker", Dying)
    there = genray.label(tmp_path / "teacher", tmp_path / "there.npz", batch_size=25, workers=2)  # three blocks
    assert open(here, "rb").read() == open(there, "rb").read()
    lost = r"labelling worker \d of \d, images \d+ to \d+: its process died: .*; another one is started"
    assert re.search(lost, capfd.readouterr().err)
