"""The records that `genray.train` and `genray.evaluate` return; a notebook shows them as a table."""

from genray.evaluation.record import record_table, tables_of
from genray.recording.table import results_table, table_of
from genray.tables import as_html


class Results(dict):
    """A record as in `results.json`: a dictionary whose `repr` is its table."""

    def __repr__(self):
        return results_table(self) if "models" in self else record_table(self)

    def _repr_html_(self):
        return "".join(map(as_html, [table_of(self)] if "models" in self else tables_of(self)))
