"""Which nodes a label selector means: Ray's rules, and where bundles then fit."""

import pytest

from genray.config import load_config
from genray.errors import ConfigError
from genray.run.allocation import fit, labelled, matches

NODE = {"zone": "a", "market-type": "spot"}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"zone": "a"}, True),
        ({"zone": "b"}, False),
        ({"zone": "!b"}, True),
        ({"zone": "!a"}, False),
        ({"zone": "in(b, a)"}, True),
        ({"zone": "in(b,c)"}, False),
        ({"zone": "!in(b,c)"}, True),
        ({"zone": "!in(a,c)"}, False),
        ({"other": "a"}, False),
        ({"other": "!a"}, True),
        ({"zone": "a", "market-type": "on-demand"}, False),
    ],
)
def test_a_selector_means_these_nodes(selector, expected):
    assert matches(selector, NODE) is expected


def test_bundles_fit_where_their_labels_are():
    nodes, labels = [{"CPU": 2}, {"CPU": 2}], [{"zone": "a"}, {"zone": "b"}]

    def fits(*zones):
        return fit(*labelled([{"CPU": 1}] * len(zones), [{"zone": zone} for zone in zones], nodes, labels))

    assert fits("a", "a", "b") and fits("a", "b", "in(a,b)", "!a")
    assert not fits("a", "a", "a") and not fits("c")


@pytest.mark.parametrize("value", ["a b", "in()", "in(a", "!!a", "-a", "not in(a)", ""])
def test_other_conditions_are_refused(value):
    change = {"base_learners.linf.resources.label_selector": {"zone": value}}
    with pytest.raises(ConfigError, match=r"^base_learners\.linf\.resources\.label_selector\.zone: expected a label's"):
        load_config(None, change)


def test_auto_takes_all_nodes_for_equal():
    change = ["base_learners.linf.workers=auto", "base_learners.linf.resources.accelerator_type=A100"]
    words = r"base_learners\.linf\.workers: expected a number with resources\.accelerator_type, because .*; got auto"
    with pytest.raises(ConfigError, match=words):
        load_config(None, change)
