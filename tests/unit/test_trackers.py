"""MLflow and Weights & Biases from runs and grids: what they are sent, and what happens where they are not there."""

import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import every_write_made

import genray
from genray.cli import train
from genray.cli.parser import run_command
from genray.errors import ConfigError
from genray.recording import trackers
from genray.recording.trackers import Trackers, scalars

GRID = {"set": {"training.epochs": 2}, "name": "logged"}


def epochs(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Kept:
    """A tracker that keeps what it is sent."""

    made: list = []

    def __init__(self, name, config, group, id):
        self.id, self.name, self.config, self.group = id or f"id{len(Kept.made)}", name, config, group
        self.sent, self.succeeded = [], None
        Kept.made.append(self)

    def log(self, values, step):
        self.sent.append((step, values))

    def end(self, succeeded):
        self.succeeded = succeeded


class Away(Kept):
    def log(self, values, step):
        raise ConnectionError("no route to host")


class Refuses(Kept):
    def __init__(self, *arguments):
        raise ConnectionError("wrong token")


@pytest.fixture
def use(monkeypatch):
    """Puts classes in the places of the trackers' own, as if their packages were installed."""
    monkeypatch.setattr(Kept, "made", [])
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)

    def put(**classes):
        monkeypatch.setattr(trackers, "TRACKERS", classes)

    return put


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_one_line_before_training(small_run, monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    arguments = ["--runtime", "local", "--storage", str(tmp_path / "runs"), *small_run, f"loggers=[{name}]"]
    assert run_command(train.main, train.parse_args(arguments)) == 2
    line = f"error: loggers.{name}: {name} is not installed; pip install 'genray[{name}]'\n"
    assert capsys.readouterr().err == line
    assert run_command(train.main, train.parse_args([*arguments, "--dry-run"])) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "module", "line"),
    [
        ({"loggers": ["mlflow"]}, "trackers", "loggers.mlflow: mlflow is not installed; pip install 'genray[mlflow]'"),
        (
            {"set": {"loggers": ["wandb"]}},
            "trackers",
            "loggers.wandb: wandb is not installed; pip install 'genray[wandb]'",
        ),
        (
            {"search": "optuna", "choices": {"seed": [1]}},
            "search",
            "search: optuna is not installed; pip install 'genray[optuna]', or search: random",
        ),
    ],
)
def test_what_a_grid_lacks_is_one_line(monkeypatch, capsys, tmp_path, content, module, line):
    pytest.importorskip("ray", reason="grids run on Ray")
    from genray.cli.tune import main, parse_args
    from genray.tuning import search

    monkeypatch.setattr({"trackers": trackers, "search": search}[module], "find_spec", lambda name: None)
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(GRID | content))
    args = parse_args([str(tmp_path / "some.yaml"), "--storage", str(tmp_path / "runs")])
    assert run_command(main, args) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "runs").exists()


def test_a_run_sends_each_epoch_once_and_goes_on_after_a_stop(small_run, tmp_path, use):
    use(mlflow=Kept, wandb=Kept)
    options = {"runtime": "local", "storage": str(tmp_path)}
    overrides = [*small_run, "loggers=[mlflow, wandb]"]

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with every_write_made():
        with pytest.raises(KeyboardInterrupt):
            genray.train(None, overrides, on_epoch=stop, **options)
        assert [(run.id, run.succeeded) for run in Kept.made] == [("id0", False), ("id1", False)]
        results = genray.train(None, overrides, resume=True, **options)
    first, _, resumed, _ = Kept.made
    assert [run.id for run in Kept.made] == ["id0", "id1"] * 2
    assert resumed.succeeded and resumed.name == "digits" and resumed.config["training"]["epochs"] == 3
    found = epochs(tmp_path / "digits")
    assert first.sent[0] == (1, scalars(found[0]))
    final = {f"test_{name}": record["value"] for name, record in results["models"]["global"].items()}
    # Epoch 2 was stopped before its checkpoint, so it is trained again.
    assert [step for step, _ in first.sent] == [1, 2]
    assert resumed.sent == [(2, scalars(found[1])), (3, scalars(found[2])), (3, final)]
    assert not (tmp_path / "digits" / "tensorboard").exists(), "loggers does not name it"


def test_a_tracker_that_does_not_answer_ends_no_run(small_run, tmp_path, use, capsys):
    use(mlflow=Away)
    options = {"runtime": "local", "storage": str(tmp_path)}
    overrides = [*small_run, "training.epochs=1", "runtime.grace_period_s=0.1"]
    results = genray.train(None, [*overrides, "loggers=[mlflow]"], **options)
    said = capsys.readouterr().err
    assert "warning: no route to host; kept in memory and tried again" in said
    assert "warning: loggers: tried for 0.1 s; not written: mlflow (no route to host)" in said
    without = genray.train(None, [*overrides, "name=without", "loggers=[]"], **options)
    assert results["models"] == without["models"] and (tmp_path / "digits/results.json").is_file()


def test_a_tracker_that_refuses_to_begin_is_one_line_and_no_run(small_run, tmp_path, use):
    use(mlflow=Kept, wandb=Refuses)
    with pytest.raises(ConfigError, match=r"^loggers\.wandb: no run can be begun: wrong token$"):
        genray.train(None, [*small_run, "loggers=[mlflow, wandb]"], runtime="local", storage=str(tmp_path / "runs"))
    assert Kept.made[0].succeeded is False and not (tmp_path / "runs").exists()


def test_credentials_of_a_configuration_are_not_sent(use):
    use(mlflow=Kept)
    config = {"data": {"path": "s3://KEY:SECRET@bucket/images"}, "names": ["s3://KEY:SECRET@bucket"]}
    Trackers(["mlflow"], "digits", config, say=lambda line: None)
    assert "SECRET" not in repr(Kept.made[0].config) and "bucket" in Kept.made[0].config["data"]["path"]


def test_trials_of_a_grid_are_sent_to_the_trackers_of_both_files(tmp_path, use):
    """As Tune calls it; a grid on a real Ray with MLflow is in tests/ray/test_trackers_on_ray.py."""
    pytest.importorskip("ray", reason="grids run on Ray")
    from genray.tuning.grid import load_grid
    from genray.tuning.run import begin_folder
    from genray.tuning.tracking import TrackerCallback

    use(mlflow=Kept, wandb=Kept)
    text = yaml.safe_dump(GRID | {"loggers": ["mlflow"], "set": GRID["set"] | {"loggers": ["tensorboard", "wandb"]}})
    (tmp_path / "some.yaml").write_text(text)
    grid = load_grid(tmp_path / "some.yaml")
    folder = begin_folder(grid, genray.storage.Storage(tmp_path) / "logged", overwrite=False)
    said = []
    callback = TrackerCallback(grid, folder, said.append)
    name = grid.trials[0].name
    trial = SimpleNamespace(config={"point": {"trial": name}}, last_result={"test_natural": 0.5, "epoch": 2})
    for _ in range(2):  # it has failed once and begins again
        callback.on_trial_start(0, [], trial)
        for epoch in (1, 2):
            result = {"scalars": {"global/natural": epoch / 4}, "score": epoch, "epoch": epoch}
            callback.on_trial_result(0, [], trial, result)
    callback.on_trial_complete(0, [], trial)
    assert {run.group for run in Kept.made} == {"logged"} and len(Kept.made) == 2 and len(said) == 2
    for run in Kept.made:
        assert run.name == name and run.succeeded and run.config["training"]["epochs"] == 2
        assert run.sent == [
            (1, {"global/natural": 0.25, "score": 1}),
            (2, {"global/natural": 0.5, "score": 2}),
            (2, {"test_natural": 0.5}),
        ]


# --- the packages themselves ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sqlite:///", "file:"])
def test_mlflow_has_what_metrics_jsonl_has(small_run, tmp_path, monkeypatch, scheme):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    uri = f"{scheme}{tmp_path / 'store'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    results = genray.train(None, [*small_run, "loggers=[mlflow]"], runtime="local", storage=str(tmp_path))
    client, id = MlflowClient(uri), json.loads((tmp_path / "digits/trackers.json").read_text())["mlflow"]
    run = client.get_run(id)
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "tests"
    assert run.data.params["base_learners.linf.attack.num_steps"] == "2" and run.data.params["seed"] == "0"
    found = epochs(tmp_path / "digits")
    for key in ("global/natural", "linf/loss", "natural/learning_rate", "mixing_weight/linf"):
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(id, key))
        assert history == [(record["epoch"], scalars(record)[key]) for record in found]
    assert run.data.metrics["test_natural"] == results["models"]["global"]["natural"]["value"]


def logged(data, block=32768):
    """The records of a `.wandb` file, which is in the log format of LevelDB: blocks of fragments with a checksum (4
    bytes), a length (2) and a kind (1: whole; 2, 3, 4: first, middle, last)."""
    at, parts = 7, []  # after the file's own header
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


@pytest.mark.slow
def test_wandb_offline_has_what_metrics_jsonl_has(small_run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    results = genray.train(None, [*small_run, "loggers=[wandb]"], runtime="local", storage=str(tmp_path))
    id = json.loads((tmp_path / "digits/trackers.json").read_text())["wandb"]
    (file,) = tmp_path.glob(f"wandb/offline-run-*-{id}/run-{id}.wandb")
    rows, name, code = {}, None, None
    for record in map(Record.FromString, logged(file.read_bytes())):
        name = record.run.display_name or name
        code = record.exit.exit_code if record.HasField("exit") else code
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if items:
            rows.setdefault(items["_step"], {}).update(items)
    assert (name, code) == ("digits", 0)
    found = epochs(tmp_path / "digits")
    for record in found:
        assert scalars(record).items() <= rows[record["epoch"]].items()
    assert rows[3]["test_natural"] == results["models"]["global"]["natural"]["value"]
