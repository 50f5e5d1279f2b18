"""What files of runs, evaluations and mixtures must hold before anything is made of them."""

import math
from fractions import Fraction

from genray.reporting.table import one_line


class Damaged(ValueError):
    """A file is not what it should be; the message says how."""


def _accuracy(record):
    """An accuracy with its interval, or an error."""
    value, low, high = (float(record[key]) for key in ("value", "low", "high"))
    if not 0 <= low <= value <= high <= 1 or isinstance(record["examples"], bool) or int(record["examples"]) < 1:
        raise ValueError(f"not an accuracy: {record}")


def _checked(what):
    """Turns whatever goes wrong while a file is looked through into one line."""

    def decorate(check):
        def run(content):
            try:
                check(content)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
                raise Damaged(f"results.json is not {what}: {one_line(repr(error), 120)}") from None
            return content

        return run

    return decorate


@_checked("of a genray run")
def check_results(results):
    for by_attack in results["models"].values():
        for record in by_attack.values():
            _accuracy(record)
    _accuracy(results["models"]["global"]["natural"])
    protocol = results["protocol"]
    texts = [protocol[key] for key in ("data", "norm", "epsilon", "selected_on", "attack")]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("protocol")
    (
        Fraction(protocol["epsilon"]),
        float(protocol["epsilon_decimal"]),
        int(protocol["examples"]),
        int(results["seed"]),
        int(results["best_epoch"]),
    )
    dict(results["versions"])


@_checked("of a genray evaluation")
def check_evaluation(record):
    _accuracy(record["natural"])
    protocol = record["protocol"]
    for threat in protocol["threats"]:
        part = record["norms"][threat["norm"]]
        float(threat["epsilon_decimal"]), Fraction(threat["epsilon"])
        for attack in threat["attacks"]:
            _accuracy(part["columns"][attack["name"]])
            list(attack["notes"]), int(attack["num_steps"])
        list(part["findings"])
    if "union" in record:
        _accuracy(record["union"])
    str(protocol["hash"]), str(protocol["engine"]), int(protocol["data"]["examples"]), list(record["findings"])
    str(protocol["data"]["source"]), int(protocol["seed"])


@_checked("of a run, an evaluation or a study of mixtures")
def check_study(results):
    for part in results["splits"].values():
        int(part["protocol"]["data"]["examples"])
        for threat in part["protocol"]["threats"]:
            str(threat["norm"]), str(threat["epsilon"]), float(threat["epsilon_decimal"])
        for row in part["rows"]:
            _accuracy(row["natural"])
            _accuracy(row["robust"])
            str(row["name"]), str(row["kind"]), dict(row["weights"] or {}), list(row["findings"])
            for by_name in row["columns"].values():
                for record in by_name.values():
                    _accuracy(record)
    for key in ("run", "data", "chosen", "theta_g_selected_on"):
        results[key]
    list(results["learners"]), list(results["norms"])
    if results["batch_norm"] not in ("mix", "reestimate"):
        raise ValueError("batch_norm")
    if results["gamma_of"] is not None:
        for part in results["splits"].values():
            [Fraction(row["weights"][results["gamma_of"]]) for row in part["rows"] if row["kind"] == "mixture"]
            [row["pareto"] for row in part["rows"] if row["kind"] == "mixture"]


def check_record(record: dict) -> dict:
    """One line of `metrics.jsonl`."""
    int(record["epoch"]), int(record["redistributions"]), float(record["wall_s"])
    numbers = [v for values in record["learners"].values() for v in values.values()]
    numbers += list((record["global"] or {}).values()) + list(record["mixing_weights"].values())
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        raise TypeError("not numbers")
    if not all(0 <= rate <= 1 and math.isfinite(rate) for rate in (record["global"] or {}).values()):
        raise ValueError("not accuracies")
    return record
