"""Makes `old_run` with the package of an older commit (c67097a): PYTHONPATH=<a clone of it> python make_old_run.py.

`half` was stopped in the third of four epochs; `finished` is the same run to its end, with an evaluation and mixtures;
`grid` is the folder of a grid before its first trial. What is large and can be done without is removed.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import genray
from genray.storage import Storage
from genray.tuning.grid import load_grid
from genray.tuning.run import begin_folder

FOLDER = Path(__file__).parent / "old_run"
RUN = ["training.epochs=4", "training.batch_size=16", "data.train_examples=320", "data.test_examples=40",
       "data.validation_examples=40", "model={name: resnet18, width: 1}", "base_learners.linf.attack.num_steps=2",
       "base_learners.linf.attack.epsilon=0.05", "base_learners.natural.optimizer={name: sgd, momentum: 0}",
       "evaluation.attack.num_steps=2", "global_learner.sync_unit=step", "global_learner.sync_every=7",
       "global_learner.warmup_epochs=1", "checkpoint.keep=1"]  # fmt: skip
GRID = "name: grid\nset: {training.epochs: 1}\ngrid: {global_learner.sync_every: [1, 5]}\nseeds: [0, 1]\n"


class Stop(Exception):
    """Ends a run as an error in it does."""


def stop(record):
    if record["epoch"] == 3:
        raise Stop


def evaluate(*arguments):
    line = [sys.executable, "-m", "genray.evaluate", FOLDER / "finished/digits", "--attacks", "pgd20", *arguments]
    subprocess.run(line, check=True)


shutil.rmtree(FOLDER, ignore_errors=True)
try:
    genray.train(None, RUN, runtime="local", storage=str(FOLDER / "half"), on_epoch=stop)
except Stop:
    genray.train(None, RUN, runtime="local", storage=str(FOLDER / "finished"))
evaluate("--output", FOLDER / "finished/digits/evaluation")
evaluate("--examples", "20", "--mixtures", "0,1", "--output", FOLDER / "finished/digits/mixtures")
(FOLDER / "grid.yaml").write_text(GRID)
begin_folder(load_grid(FOLDER / "grid.yaml"), Storage(str(FOLDER / "grid")), overwrite=False)
(FOLDER / "grid.yaml").unlink()
for name in ("tensorboard", "checkpoints", "learners", "mixtures/test", "mixtures/validation"):
    shutil.rmtree(FOLDER / "finished/digits" / name)
shutil.rmtree(FOLDER / "half/digits/tensorboard")
for name in ("model_last.pt", "mixtures/curve.csv"):
    (FOLDER / "finished/digits" / name).unlink()
for picture in FOLDER.rglob("curve_*"):
    picture.unlink()
