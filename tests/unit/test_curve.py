"""Several radii in one evaluation: what falls at a radius has fallen at every larger one, and is not attacked again."""

import json
import re
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest

import genray
from genray.evaluation.estimate import TimeLeft, resisting_cost
from genray.evaluation.inputs import EvaluationArguments, given_by_norm
from genray.evaluation.job import BlockResult, Request
from genray.evaluation.record import curves, join, record_table
from genray.evaluation.results import wilson_interval
from genray.evaluation.task_queue import TaskQueue
from genray.types import ThreatModel

RADII = {"linf": ["0.03", "0.1", "0.2"], "l2": [0.3, 1]}
HOW = {"attacks": "pgd20,apgd_ce", "norms": ("linf", "l2"), "block_size": 25, "engine": "genray"}


@pytest.fixture(scope="module")
def curve(model, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve") / "out"
    x, y = digits
    return folder, genray.evaluate(model, x[:60], y[:60], epsilon=RADII, output=folder, **HOW)


def flags_of(folder):
    return {name: np.array(values) for name, values in pq.read_table(folder / "results.parquet").to_pydict().items()}


def test_the_curve_is_that_of_separate_evaluations(curve, model, digits, tmp_path):
    """PGD draws for each image, so an image stands exactly if it stands in separate evaluations at all radii up to
    there. APGD draws for a batch, and which images are in one depends on what fell before: few images differ."""
    flags, (x, y) = flags_of(curve[0]), digits
    for norm, radii in RADII.items():
        standing = {}
        for radius in radii:
            where = tmp_path / f"{norm}{float(Fraction(radius))}"
            genray.evaluate(model, x[:60], y[:60], epsilon=radius, output=where, **HOW | {"norms": norm})
            alone = flags_of(where)
            for attack in ("pgd20", "apgd_ce"):
                now = alone[f"{norm}_{attack}"]
                standing[attack] = standing.get(attack, now) & now
                ours = flags[f"{norm}_{radius}_{attack}"]
                assert (ours != standing[attack]).sum() <= (3 if attack == "apgd_ce" else 0)
    fallen = [int((flags["natural"] & ~flags[f"linf_{radius}_pgd20"]).sum()) for radius in RADII["linf"]]
    assert 0 < fallen[0] < fallen[1] < fallen[2]  # a curve that shows something


def test_only_what_stands_is_attacked_again(curve, digits):
    folder, record = curve
    attacked, natural = {}, flags_of(folder)["natural"].sum()
    for path in (folder / "blocks").iterdir():
        kind = re.sub(r"-\d+\.json", "", path.name)
        flags = json.loads(path.read_text())["flags"].values()
        attacked[kind] = attacked.get(kind, 0) + sum(map(len, flags))
    for attack in ("pgd20", "apgd_ce"):
        stand = [attacked[f"linf_{radius}-{attack}"] for radius in ("0.03", "0.1", "0.2")]
        columns = [record["norms"][f"linf_{radius}"]["columns"][attack]["value"] for radius in ("0.03", "0.1")]
        assert stand == [60, *(round(60 * value) for value in columns)]
    assert natural < 60


def test_the_record_holds_the_curve_with_intervals_and_the_table_shows_it(curve):
    folder, record = curve
    flags = flags_of(folder)
    found = curves(record)
    assert list(found) == ["linf", "l2"] and list(found["linf"]["pgd20"]) == ["0", "0.03", "0.1", "0.2"]
    for norm, columns in found.items():
        for attack, points in columns.items():
            for radius, point in points.items():
                stand = flags["natural" if radius == "0" else f"{norm}_{radius}_{attack}"]
                low, high = wilson_interval(int(stand.sum()), 60)
                assert (point["value"], point["low"], point["high"]) == (stand.mean(), low, high)
    alive = flags["natural"].copy()
    for name, values in flags.items():
        alive &= values if name.startswith(("linf", "l2")) else True
    assert record["union"]["value"] == alive.mean()
    text = record_table(record)
    assert "union of all norms at their largest radii and attacks" in text
    assert re.search(r"\n  +0\.1 +\d+\.\d\d \[", text) and "\nlinf: accuracy over the radius\n" in text
    steps = {t["epsilon_decimal"]: t["attacks"][0]["step_size"] for t in record["protocol"]["threats"]}
    assert all(size == radius / 4 for radius, size in steps.items())  # step sizes follow the radius


def test_an_interrupted_curve_goes_on_with_its_blocks(curve, model, digits, tmp_path, monkeypatch):
    x, y = digits
    folder, record = curve
    for name in ("request.json", *(f"blocks/{path.name}" for path in (folder / "blocks").iterdir())):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for path in (tmp_path / "blocks").glob("l2_1-apgd*"):
        path.unlink()
    again = genray.evaluate(model, x[:60], y[:60], epsilon=RADII, output=tmp_path, resume=True, **HOW)
    assert again == record
    assert (tmp_path / "results.parquet").read_bytes() == (folder / "results.parquet").read_bytes()


def test_the_cascade_begins_a_radius_with_what_stands_after_the_one_before():
    threats = [ThreatModel("linf", Fraction(1, 10)), ThreatModel("linf", Fraction(1, 5))]
    request = Request(tuple(threats), ("aa",), {}, block_size=4)
    queue, left = TaskQueue(request, 10), TimeLeft(request, 10, 10)
    stand = {("none", "natural"): range(10)}
    stand |= {
        (ball, f"aa_{m}"): range(3, 9) for ball in request.balls() for m in ("apgd_ce", "apgd_t", "fab_t", "square")
    }
    stand["linf_0.1", "aa_square"], stand["linf_0.2", "aa_apgd_t"] = (4, 5, 8), (5,)
    while tasks := queue.take():
        for task in tasks:
            flags = np.array([example in stand[task.ball, task.attack] for example in queue.examples(task)])
            queue.finish(task, BlockResult({task.attack: flags}, seconds=1.0))
            left.finished(task, queue.results[task])
    attacked = {(t.ball, t.attack): t.examples for t in queue.known() if t.ball == "linf_0.2"}
    assert attacked["linf_0.2", "aa_apgd_ce"] == (4, 5, 8) and attacked["linf_0.2", "aa_fab_t"] == (5,)
    flags = join(queue)
    assert flags["linf_0.1", "aa"].nonzero()[0].tolist() == [4, 5, 8]
    assert flags["linf_0.2", "aa"].nonzero()[0].tolist() == [5]
    assert left.left() == 0.0 and left.share() == 1.0
    alone = resisting_cost(Request(tuple(threats[:1]), ("aa",), {}), 10, 10)
    assert resisting_cost(request, 10, 10) == 2 * alone - 10


def test_a_radius_at_which_nothing_stands_ends_the_column(model, digits):
    x, y = digits
    record = genray.evaluate(model, x[:30], y[:30], attacks="pgd20", epsilon=["9/10", "1"])
    values = [part["columns"]["pgd20"]["value"] for part in record["norms"].values()]
    assert values == [0.0, 0.0]


def test_the_findings_of_a_curve_through_the_radius_of_training(curve):
    """The run was trained for linf 0.1: the other radii of linf make its curve, l2 is another threat model."""
    (finding,) = (text for text in curve[1]["findings"] if text.startswith("measured at"))
    assert "linf" not in finding.partition(", the model")[0] and "l2 0.3 (0.3), l2 1 (1)" in finding


@pytest.mark.parametrize(
    ("text", "norms", "found"),
    [
        ("8/255,2/255", ("linf",), {"linf": ["2/255", "8/255"]}),
        ("linf=2/255:8/255,l2=0.5", ("linf", "l2"), {"linf": ["2/255", "8/255"], "l2": ["1/2"]}),
        ("0.1", ("l1",), {"l1": ["1/10"]}),
    ],
)
def test_the_words_of_the_command(text, norms, found):
    asked = EvaluationArguments(norms=norms, epsilon=given_by_norm("--epsilon", text, norms)).request()
    got = {}
    for threat in asked.threats:
        got.setdefault(threat.norm, []).append(threat.epsilon)
    assert got == {norm: list(map(Fraction, radii)) for norm, radii in found.items()}


def test_radii_in_python(model, digits):
    x, y = digits
    with pytest.raises(genray.errors.InputError, match="epsilon.linf: expected at least one radius, got none"):
        genray.evaluate(model, x[:4], y[:4], attacks="pgd20", epsilon=[])
    with pytest.raises(genray.errors.InputError, match="epsilon.linf: expected"):
        genray.evaluate(model, x[:4], y[:4], attacks="pgd20", epsilon=[0.1, [0.2]])


def test_the_report_draws_the_curve_of_one_evaluation(curve, tmp_path):
    pytest.importorskip("matplotlib")
    genray.report([curve[0]], output=tmp_path / "report", formats=["html", "svg"], gallery=())
    page = (tmp_path / "report/index.html").read_text()
    labels = re.findall(r"accuracy over the radius of the (\w+) ball on 60", page)
    assert set(labels) == {"linf", "l2"}
    drawn = (tmp_path / "report/plots/epsilon_1.svg").read_text()
    paths = re.findall(r'id="line2d_\d+">\s*<path d="([^"]*)" clip-path[^>]*stroke-width: 1.5', drawn)
    points = [len(re.findall(r"[ML] [\d.]+ [\d.]+", path)) for path in paths]
    assert points.count(4) == 2  # 0 and three radii, for each of two attacks
