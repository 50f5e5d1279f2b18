"""cluster/grafana_dashboard.json: Grafana would take it, and its panels ask for gauges and tags that runs set."""

import json
import re

import jsonschema
import pytest
from conftest import ROOT

pytest.importorskip("ray", reason="gauges are Ray's")

from genray.runtime.ray.gauges import GAUGES, PARTS

DASHBOARD = json.loads((ROOT / "cluster/grafana_dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [(target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
TEXT = {"type": "string", "minLength": 1}
PLACE = {
    "type": "object",
    "required": ["x", "y", "w", "h"],
    "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 1000},
}
TARGET = {"type": "object", "required": ["refId", "expr", "datasource"], "properties": {"refId": TEXT, "expr": TEXT}}
PANEL = {
    "type": "object",
    "required": ["id", "type", "title", "gridPos", "datasource", "targets", "fieldConfig"],
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "type": {"const": "timeseries"},
        "title": TEXT,
        "gridPos": PLACE,
        "targets": {"type": "array", "minItems": 1, "items": TARGET},
        "fieldConfig": {"type": "object", "required": ["defaults", "overrides"]},
    },
}
SCHEMA = {  # of what Grafana's import asks of a dashboard
    "type": "object",
    "required": ["title", "uid", "schemaVersion", "panels", "templating", "time"],
    "properties": {
        "title": TEXT,
        "uid": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"},
        "schemaVersion": {"type": "integer", "minimum": 30},
        "panels": {"type": "array", "minItems": 1, "items": PANEL},
    },
    "not": {"required": ["id"]},  # it is the server's: one in a file replaces another dashboard
}


def test_grafana_takes_it():
    jsonschema.validate(DASHBOARD, SCHEMA)
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken)), "panels overlap"
    assert max(x for x, _ in taken) < 24, "a panel is wider than Grafana's grid"
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) == known


def test_panels_ask_for_what_runs_set():
    shown = set()
    for expression, legend in EXPRESSIONS:
        assert expression.count("{") == expression.count("}") and expression.count("(") == expression.count(")")
        metrics = re.findall(r"\bray_(\w+)(?:\{([^}]*)\})?", expression)
        assert metrics, expression
        for name, matchers in metrics:
            tags = set(GAUGES[name][1])
            asked = dict(re.findall(r'(\w+)=~?"([^"]*)"', matchers))
            assert asked.keys() <= tags, expression
            assert set(asked.get("part", "all").split("|")) <= set(PARTS)
            shown.add(name)
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= set(GAUGES[metrics[0][0]][1]), legend
    assert shown == set(GAUGES), "every gauge has a panel"
    (run,) = (variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run")
    name, tag = re.fullmatch(r"label_values\(ray_(\w+), (\w+)\)", run["query"]["query"]).groups()
    assert tag in GAUGES[name][1]
