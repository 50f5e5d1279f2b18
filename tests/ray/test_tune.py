"""Grids on a real Ray: trials are runs, they end clean, and --resume repeats nothing."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, actors, run_outcome, wait_for

import genray
from genray.config import to_dict
from genray.errors import GenrayError, PlacementError
from genray.reporting.trials import read_trials
from genray.tuning.checks import check_visible
from genray.tuning.grid import load_grid
from genray.tuning.run import GridOutcome, check_ended

pytestmark = pytest.mark.ray
TINY = {
    "training.epochs": 2,
    "training.batch_size": 48,
    "data.train_examples": 200,
    "data.test_examples": 30,
    "data.validation_examples": 40,
    "model.width": 4,
    "base_learners.linf.attack.num_steps": 1,
    "evaluation.attack.num_steps": 2,
    "runtime.startup_timeout_s": 900,
}


def write(tmp_path, name="small", **content):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"set": TINY, **content}))
    return path


def weights(folder):
    return genray.load_model(folder).state_dict()


def test_trials_are_runs_and_resume_repeats_nothing(on_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path,
        runtime="local",  # a trial in one process; in actors: below
        grid={"base_learners.linf.lr": [0.1, 0.05], "global_learner.warmup_epochs": [1]},
        seeds=[3],
        evaluate={"attacks": ["pgd20"], "examples": 20, "engine": "genray"},
    )
    trials = genray.tune(path, storage="runs")  # as by default: trials run in working directories of their own
    assert [row["status"] for row in trials.rows] == ["finished"] * 2
    assert trials.measures == ("natural", "pgd20")
    folder, grid = tmp_path / "runs" / "small", load_grid(path)
    for trial, row in zip(grid.trials, trials.rows):
        alone = tmp_path / "alone"
        genray.train(trial.config, runtime="local", storage=str(alone))
        mine, theirs = weights(folder / trial.name), weights(alone / trial.name)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        judged = json.loads((folder / trial.name / "evaluation" / "results.json").read_text())
        assert judged["norms"]["linf"]["columns"]["pgd20"]["value"] == row["pgd20"]
    assert len({tuple(value.sum().item() for value in weights(folder / t.name).values()) for t in grid.trials}) == 2

    for name in ("table.md", "trials.csv"):
        assert (folder / name).stat().st_size > 0
    lost, kept = grid.trials[1].name, grid.trials[0].name
    before = weights(folder / lost)
    (folder / lost / "results.json").unlink()  # as if the tuner had died in this trial
    stamp = (folder / kept / "model.pt").stat().st_mtime_ns
    with pytest.raises(GenrayError, match="a grid of this name exists; give it another name, --resume or --overwrite"):
        genray.tune(path, storage=str(tmp_path / "runs"))
    again = genray.tune(path, storage=str(tmp_path / "runs"), resume=True)
    assert [row["status"] for row in again.rows] == ["finished"] * 2
    assert (folder / kept / "model.pt").stat().st_mtime_ns == stamp
    after = weights(folder / lost)
    assert all(torch.equal(before[key], after[key]) for key in after)

    (folder / "mine.txt").write_text("kept")
    other = write(tmp_path, runtime="local", grid={"base_learners.linf.lr": [0.2]}, seeds=[4])
    anew = genray.tune(other, storage=str(tmp_path / "runs"), overwrite=True)
    assert [row["status"] for row in anew.rows] == ["finished"]
    assert not (folder / kept).exists() and (folder / "mine.txt").exists()


def test_asha_stops_the_worse_trial(on_ray, tmp_path):
    path = write(
        tmp_path,
        "asha",
        runtime="local",
        methods={
            "a": None,
            "b": {"set": {"base_learners.linf.lr": 0, "base_learners.natural.lr": 0}},
        },  # b stands still
        set=TINY
        | {"training.epochs": 5, "training.batch_size": 8, "global_learner.decay": 0.5, "global_learner.mix": "raw"},
        scheduler={"name": "asha", "grace_period": 4, "reduction_factor": 2, "max_epochs": 5},
        max_failures=0,
    )
    trials = genray.tune(path, storage=str(tmp_path / "runs"), max_concurrent=1)
    assert [row["status"] for row in trials.rows] == ["finished", "unfinished"]


def test_what_cannot_be_placed_is_said_before_any_trial(on_ray, tmp_path):
    path = write(tmp_path, "wide", grid={"base_learners.linf.resources.num_cpus": [1, 64]})
    with pytest.raises(PlacementError, match=r"trial 1_num_cpus-64_seed-0: wants 65 CPU, 0 GPU"):
        genray.tune(path, storage=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_failing_trial_is_named_and_the_others_are_in_the_table(on_ray, tmp_path, capfd):
    methods = {"a": None, "b": {"set": {"base_learners.linf.lr": 1e30}}}
    path = write(tmp_path, "half", runtime="local", methods=methods, max_failures=0)
    with pytest.raises(GenrayError, match=r"1 of 2 trials failed, first 1_b_seed-0: base_learners\.linf: .*--resume"):
        genray.tune(path, storage=str(tmp_path / "runs"))
    shown = capfd.readouterr().err.splitlines()  # what Tune has to say about it is in its files
    (line,) = [line for line in shown if "1_b_seed-0" in line]
    assert "] 1_b_seed-0 failed: base_learners.linf: " in line and "Traceback" not in shown
    rows = read_trials(str(tmp_path / "runs" / "half")).rows
    assert [row["status"] for row in rows] == ["finished", "unfinished"]
    assert to_dict(load_grid(path).trials[0].config)["name"] == rows[0]["trial"]


def test_a_grid_without_a_result_is_no_success():
    with pytest.raises(GenrayError, match="none of 2 trials was finished.*: a was stopped at epoch 3"):
        check_ended(GridOutcome(stopped={"a": 3, "b": 3}), 2)


# --- kill -9 ---------------------------------------------------------------------------------------------------------

NODE = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 << 20}
SETTINGS = {
    "training.epochs": 40,
    "training.batch_size": 48,
    "data.train_examples": 300,
    "data.test_examples": 30,
    "data.validation_examples": 40,
    "model.width": 4,
    "base_learners.linf.attack.num_steps": 2,
    "base_learners.natural.resources.num_gpus": 0.5,
    "base_learners.linf.resources.num_gpus": 0.5,
    "evaluation.attack.num_steps": 2,
    "global_learner.warmup_epochs": 1,
    "runtime.startup_timeout_s": 900,
}


@pytest.mark.slow
def test_kills_change_nothing(on_ray, tmp_path):
    """A grid loses the node with its learners, then its tuner; after `--resume` its run is as undisturbed."""
    nodes = [on_ray.add_node(**NODE) for _ in range(2)]
    on_ray.wait_for_nodes()
    path, folder = tmp_path / "killed.yaml", tmp_path / "runs" / "killed"
    path.write_text(yaml.safe_dump({"set": SETTINGS, "seeds": [0], "max_failures": 9}))
    with pytest.raises(PlacementError, match="expected a folder that every node sees"):
        check_visible(str(tmp_path))  # it has no grid in it: as a folder of another machine looks from here
    line = [sys.executable, "-m", "genray.tune", str(path), "--storage", str(tmp_path / "runs")]
    line += ["--address", on_ray.address]

    def start(*more):
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*line, *more], cwd=ROOT, **pipes)

    def epochs():
        return sum(len(p.read_text().splitlines()) for p in folder.glob("*/metrics.jsonl"))

    def used():
        raylets = [node.all_processes["raylet"][0].process for node in nodes]
        return [raylet for raylet in raylets if actors(b"ray::BaseLearner", below=raylet.pid)]

    tuner = start()
    try:
        raylet = wait_for(lambda: epochs() >= 2 and used(), "some epochs", tuner, seconds=900)[0]
        raylet.kill()
        raylet.wait()  # as long as it is a zombie, its workers take it for alive
        before = epochs()
        wait_for(lambda: epochs() > before, "more epochs, on the other node", tuner, seconds=900)
    finally:
        tuner.kill()
    tuner.communicate()
    assert not list(folder.glob("*/results.json"))
    tuner = start("--resume")
    _, err = tuner.communicate(timeout=1800)
    assert tuner.returncode == 0, err
    assert [row["status"] for row in read_trials(str(folder)).rows] == ["finished"]
    (trial,) = load_grid(path).trials
    genray.train(trial.config, runtime="local", storage=str(tmp_path / "alone"))
    assert run_outcome(folder / trial.name) == run_outcome(tmp_path / "alone" / trial.name)
