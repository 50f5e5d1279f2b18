"""What a cluster shows of a run: gauges as Prometheus reads them, names in Ray's dashboard, lines in the log files."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from conftest import actors, command_of, wait_for

import genray
from genray.runtime.ray.gauges import GAUGES, RunGauges

pytestmark = pytest.mark.ray
SAMPLE = re.compile(r"^ray_(genray_\w+)\{(.*)\} (\S+)$", re.M)


def scraped():
    """{(gauge, learner, attack or part): value} of the run `digits`, of all nodes."""
    found = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        for name, labels, value in SAMPLE.findall(text):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if tags["run"] == "digits":
                rest = tags.get("attack") or tags.get("part")
                found[name, tags.get("learner"), rest] = float(value)
    return found


def test_prometheus_reads_the_numbers_of_metrics_jsonl(on_ray, small_run, tmp_path):
    pytest.importorskip("aiohttp_cors", reason="the metrics agent needs ray[default]")
    seen = {}

    def look(record):
        if record["epoch"] == 3:  # Ray exports every ten seconds
            wanted, rate = ("genray_accuracy", None, "pgd3"), record["global"]["pgd3"]
            found = wait_for(
                lambda: (now := scraped()).get(wanted, -1) == pytest.approx(rate) and now, "the gauges", seconds=60
            )
            seen.update(found, record=record)

    options = ["global_learner.sync_unit=never", "checkpoint.every_epochs=1"]  # a window is an epoch
    genray.train(None, [*small_run, *options], runtime="ray", storage=str(tmp_path), on_epoch=look)
    record = seen.pop("record")
    assert {name for name, *_ in seen} == set(GAUGES)
    assert seen["genray_total_steps", None, None] == 21
    assert seen["genray_accuracy", None, "natural"] == pytest.approx(record["global"]["natural"])
    for learner, values in record["learners"].items():
        assert seen["genray_loss", learner, None] == pytest.approx(values["loss"])
        assert 14 <= seen["genray_step", learner, None] <= 21
        for part in ("attack", "averaging", "waiting"):
            seconds = 7 * seen["genray_seconds_per_step", learner, part]
            assert seconds == pytest.approx(values[f"{part}_seconds"], abs=1e-3), (learner, part)
    assert seen["genray_seconds_per_step", "linf", "attack"] > 0
    assert seen["genray_seconds_per_step", "natural", "attack"] == 0


def test_gauges_stay_while_a_window_lasts(on_ray):
    """Ray forgets in 20 s what is not set again."""
    pytest.importorskip("aiohttp_cors", reason="the metrics agent needs ray[default]")
    gauges = RunGauges("digits", 21)
    gauges.window_done({}, {"natural": (9, 10)})
    began = time.monotonic()
    while time.monotonic() < began + 45:
        gauges.steps({"linf": 7})
        time.sleep(1)
    found = scraped()
    assert found["genray_accuracy", None, "natural"] == 0.9
    assert found["genray_total_steps", None, None] == 21
    assert found["genray_step", "linf", None] == 7


def titles():
    """Of the actors' processes: while one works, its task's name."""
    return [command_of(pid).rstrip(b"\0 ").decode() for pid in actors(b"ray::")]


def test_the_dashboard_tells_runs_learners_and_steps_apart(on_ray, small_run, tmp_path):
    from ray.util import list_named_actors, placement_group_table

    seen = {}

    def look(record):
        seen["actors"] = {actor["name"] for actor in list_named_actors(all_namespaces=True)}
        seen["groups"] = {group["name"] for group in placement_group_table().values() if group["state"] == "CREATED"}
        logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
        seen["lines"] = "\n".join(file.read_text() for file in logs.glob("worker-*.out"))
        if record["epoch"] == 1:  # the learners run ahead of the driver
            for learner in ("natural", "linf"):
                task = re.compile(rf"ray::BaseLearnerActor.run_window named: {learner}, steps \d+ to \d+")
                wait_for(lambda task=task: list(filter(task.fullmatch, titles())), "a step", seconds=60)

    options = ["name=named", "training.epochs=30", "global_learner.warmup_epochs=1"]
    genray.train(None, [*small_run, *options], runtime="ray", storage=str(tmp_path), on_epoch=look)
    assert {f"named: {who}" for who in ("natural", "linf", "evaluator", "global learner")} <= seen["actors"]
    assert [name for name in seen["groups"] if re.fullmatch(r"named genray-[0-9a-f]{8}", name)]
    epochs = [json.loads(line) for line in (tmp_path / "named/metrics.jsonl").read_text().splitlines()]
    for learner in ("natural", "linf"):
        assert f":actor_name:BaseLearnerActor(named: {learner})" in seen["lines"]
        last = re.findall(
            rf"^named: {learner}: step 210 of 210, loss ([\d.]+), [\d.e-]+ s a step$", seen["lines"], re.M
        )
        assert len(last) == 1 and float(last[0]) == pytest.approx(epochs[-1]["learners"][learner]["loss"], abs=0.2)
