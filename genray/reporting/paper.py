"""The published tables in our layout, with their printed digits."""

from dataclasses import replace

from genray.evaluation.published import TABLES, PublishedTable
from genray.tables import PUBLISHED, Cell, Table, TableRow

LOWER_IS_BETTER = ("train_minutes",)
NUMBERS_FROM = ("NAT",)  # the first column of numbers; the columns before it are labels


def paper_table(published: PublishedTable) -> Table:
    """Returns one published table, best and second best marked, spreads beside their means."""
    heads, lines = published.read()
    first = next(i for i, head in enumerate(heads) if head in NUMBERS_FROM)
    numbers = [head for head in heads[first:] if not head.endswith("_std")]
    rows = []
    for line in lines:
        by_head = dict(zip(heads, line))
        cells = (Cell(by_head[head], by_head.get(f"{head}_std", "")) for head in numbers)
        rows.append(TableRow(tuple(line[:first]), tuple(cells), PUBLISHED))
    table = Table(f"published_{published.name}", f"Published: {published.title}", tuple(heads[:first]), tuple(numbers),
                  tuple(rows), (*published.notes, "accuracy in %; best in bold, second best underlined"))  # fmt: skip
    one_network = len({line[heads.index("network")] for line in lines}) == 1 if "network" in heads else True
    return table.ranked(LOWER_IS_BETTER) if one_network else replace(table, notes=published.notes)


def tables_of(data: str) -> list[Table]:
    """Returns all published tables of a data set."""
    return [paper_table(published) for published in TABLES if published.data == data]
