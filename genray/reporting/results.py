"""What `genray.train` and `genray.evaluate` return: the record, which a notebook shows as a table."""

from genray.evaluation.record import NATURAL, record_table
from genray.recording.table import head_text, model_name, results_table
from genray.reporting.table import Table, TableRow, as_html, cell_of, head_of


class Results(dict):
    """A record as in `results.json`: a dictionary whose `repr` is its table."""

    def __repr__(self):
        return results_table(self) if "models" in self else record_table(self)

    def _repr_html_(self):
        tables = [_of_run(self)] if "models" in self else map(self._of_threat, self["protocol"]["threats"])
        return "".join(map(as_html, tables))

    def _of_threat(self, threat):
        found = {NATURAL: self["natural"], **self["norms"][threat["norm"]]["columns"]}
        title = f"{threat['norm']}, epsilon {threat['epsilon']}, {self['protocol']['data']['examples']} examples"
        notes = (*self["norms"][threat["norm"]]["findings"], *self["findings"])
        return _table(title, (("accuracy in %", found),), [head_of(column) for column in found], notes)


def _of_run(results):
    models = [(model_name(name, results), record) for name, record in results["models"].items()]
    heads = [head_text(attack, results["protocol"]) for attack in models[0][1]]
    return _table(f"{results['folder']}: accuracy in %", models, heads)


def _table(title, rows, heads, notes=()):
    lines = [TableRow((label,), tuple(cell_of(r["value"], None, r["low"], r["high"]) for r in record.values()))
             for label, record in rows]  # fmt: skip
    return Table("results", title, ("",), tuple(heads), tuple(lines), tuple(notes))
