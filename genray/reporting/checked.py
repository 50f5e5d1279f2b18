"""What files of runs, evaluations, mixtures and grids must hold before anything is made of them.

A *shape* is a predicate, or a dict of what keys must hold ("key?" may be absent; others may be there too), or one of
`each` (values of a dict), `every` (items of a list), `maybe` (or null).
"""

import math
from fractions import Fraction

from genray.reporting.table import one_line


class Damaged(ValueError):
    """A file is not what it should be; the message says how."""


def check(content, shape, where: str = ""):
    """Raises:
    Damaged: names the first place that does not fit.
    """
    if isinstance(shape, dict):
        if not isinstance(content, dict):
            raise Damaged(f"{where or 'the file'}: expected a section, got {one_line(repr(content), 60)}")
        for key, part in shape.items():
            name = key.removesuffix("?")
            if name in content:
                check(content[name], part, f"{where}.{name}".lstrip("."))
            elif key == name:
                raise Damaged(f"{where}.{name}".lstrip(".") + ": missing")
    elif not shape(content, where):
        raise Damaged(f"{where}: expected {shape.__doc__}, got {one_line(repr(content), 60)}")


def each(shape):
    def fits(content, where):
        """a section"""
        if isinstance(content, dict):
            for key, value in content.items():
                check(value, shape, f"{where}.{one_line(key, 40)}")
        return isinstance(content, dict)

    return fits


def every(shape):
    def fits(content, where):
        """a list"""
        if isinstance(content, list):
            for i, value in enumerate(content):
                check(value, shape, f"{where}[{i}]")
        return isinstance(content, list)

    return fits


def maybe(shape):
    def fits(content, where):
        """null or something else"""
        if content is not None:
            check(content, shape, where)
        return True

    return fits


def text(value, where=""):
    """text"""
    return isinstance(value, str)


def whole(value, where=""):
    """a whole number"""
    return isinstance(value, int) and not isinstance(value, bool)


def flag(value, where=""):
    """true or false"""
    return isinstance(value, bool)


def number(value, where=""):
    """a number"""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value, where=""):
    """a finite number"""
    return number(value) and math.isfinite(value)


def rate(value, where=""):
    """a number from 0 to 1"""
    return number(value) and 0 <= value <= 1


def fraction(value, where=""):
    """a number above 0 as text, such as 8/255"""
    return _fraction(value) is not None and 0 < _fraction(value) < 10_000


def share(value, where=""):
    """a number from 0 to 1 as text"""
    return _fraction(value) is not None and 0 <= _fraction(value) <= 1


def _fraction(value):
    try:
        return Fraction(value) if isinstance(value, str) and len(value) < 40 and "e" not in value.lower() else None
    except (ValueError, ZeroDivisionError):
        return None


def accuracy(value, where=""):
    """an accuracy with its interval"""
    check(value, {"value": rate, "low": rate, "high": rate, "examples": whole}, where)
    return value["low"] <= value["value"] <= value["high"] and value["examples"] > 0


BALL = {"norm": text, "epsilon": fraction, "epsilon_decimal": finite}
RESULTS = {
    "models": each(each(accuracy)),
    "protocol": {**BALL, "data": text, "fingerprint?": text, "examples": whole, "selected_on": text, "attack": text,
                 "step_size?": text, "threat_model": text, "other_norms?": each({**BALL, "step_size": text})},
    "best_epoch": whole, "seed": whole, "wall_s": finite, "versions": {},
}  # fmt: skip
ATTACK = {"name": text, "num_steps": whole, "notes": every(text), "loss?": text, "step_size?": maybe(finite),
          "restarts?": maybe(whole), "passes?": maybe(whole), "queries?": maybe(whole)}  # fmt: skip
EVALUATION = {
    "natural": accuracy, "union?": maybe(accuracy), "findings": every(text),
    "norms": each({"columns": each(accuracy), "union?": maybe(accuracy), "findings": every(text)}),
    "protocol": {"hash": text, "engine": text, "seed": whole, "block_size?": whole, "engines?": each(each(text)),
                 "data": {"source": text, "split?": text, "examples": whole, "fingerprint?": text},
                 "threats": every({**BALL, "attacks": every(ATTACK)})},
}  # fmt: skip
POINT = {"kind": text, "name": text, "weights": maybe(each(share)), "natural": accuracy, "robust": accuracy,
         "columns": each(each(accuracy)), "findings": every(text), "pareto?": flag}  # fmt: skip
STUDY = {
    "run": text, "data": text, "learners": every(text), "gamma_of": maybe(text), "chosen": maybe(text),
    "batch_norm": text, "norms": every(text), "theta_g_selected_on": text,
    "splits": each({"protocol": {"data": {"examples": whole}, "threats": every(BALL)}, "rows": every(POINT)}),
}  # fmt: skip
RECORD = {
    "epoch": whole, "redistributions": whole, "wall_s": finite, "best_epoch": whole, "learners": each(each(number)),
    "mixing_weights": each(finite), "global": maybe(each(rate)),
}  # fmt: skip
TRIAL = {"method": text, "seed": whole, "point": {}, "config": {"data": {"source": text, "path?": maybe(text)}}}


def check_results(results: dict) -> dict:
    """`results.json` of a run."""
    check(results, RESULTS)
    check(results["models"], {"global": {"natural": accuracy}}, "models")
    return results


def check_evaluation(record: dict) -> dict:
    """`results.json` of an evaluation."""
    check(record, EVALUATION)
    for threat in record["protocol"]["threats"]:
        columns = {attack["name"]: accuracy for attack in threat["attacks"]}
        check(record["norms"], {threat["norm"]: {"columns": columns}}, "norms")
    if not record["protocol"]["threats"]:
        raise Damaged("protocol.threats: expected at least one, got none")
    return record


def check_request(request: dict) -> dict:
    """`request.json` of an evaluation."""
    check(request, {"model": text})
    return request


def check_grid(record: dict) -> dict:
    """`grid.json`."""
    check(record, {"trials": each(TRIAL)})
    return record


def check_study(results: dict) -> dict:
    """`results.json` of mixtures."""
    check(results, STUDY)
    if results["batch_norm"] not in ("mix", "reestimate"):
        raise Damaged(f"batch_norm: expected mix or reestimate, got {one_line(results['batch_norm'], 40)}")
    for split, part in results["splits"].items():
        where, mixtures = f"splits.{one_line(split, 40)}", [r for r in part["rows"] if r["kind"] == "mixture"]
        if not mixtures or not part["rows"][0]["columns"] or not all(part["rows"][0]["columns"].values()):
            raise Damaged(f"{where}: expected mixtures with at least one attack, got none")
        columns = {norm: {name: accuracy for name in of} for norm, of in part["rows"][0]["columns"].items()}
        for row in part["rows"]:
            check(row, {"columns": columns}, where)
        for row in mixtures:
            check(row, {"pareto": flag}, where)
            check(row, {"weights": {results["gamma_of"]: share} if results["gamma_of"] is not None else {}}, where)
    return results


def check_record(record: dict) -> dict:
    """One line of `metrics.jsonl`."""
    check(record, RECORD)
    timed = {f"{part}seconds": finite for part in ("", "attack_", "averaging_", "transfer_", "waiting_")}
    for name, values in record["learners"].items():
        check(values, timed if "attack_seconds" in values else {}, f"learners.{one_line(name, 40)}")
    return record
