"""Writes what editors and readers need of configurations: `python -m genray.config schema > run.schema.json`.

`schema` is the JSON Schema of a run's YAML, `grid-schema` that of a grid of `genray.tune`, `results-schema` and
`evaluation-schema` those of `results.json` of a run and of an evaluation, `reference` the page of all fields of a run,
`records` that of the fields of its records.
"""

import json

from genray.cli.parser import Parser
from genray.config.grid_file import GridFile
from genray.config.model import json_schema
from genray.config.reference import fields_page, reference
from genray.config.schema import RunConfig
from genray.records import EpochRecord, EvaluationRecord, IdentityRecord, ImageRow, RunResults, StoredImageRow

SCHEMAS = {"schema": RunConfig, "grid-schema": GridFile}
SCHEMAS |= {"results-schema": RunResults, "evaluation-schema": EvaluationRecord}


RECORDS = {
    "results.json of a run": RunResults,
    "metrics.jsonl": EpochRecord,
    "data.json: an entry": IdentityRecord,
    "results.json of an evaluation": EvaluationRecord,
    "results.parquet": ImageRow,
    "images/*.parquet": StoredImageRow,
}
RECORDS_HEAD = """# Fields of the records

<!-- Made by `python -m genray.config records > docs/records.md`; a test fails when it is not up to date. -->

What runs and evaluations write. A file may have further fields, of newer versions; one of an older version lacks those
that came later. Fractions are from 0 to 1, times in seconds, pixels on the scale [0, 1]. As JSON Schema:
`python -m genray.config results-schema`, `python -m genray.config evaluation-schema`.
"""


def main(args):
    if args.what == "reference":
        print(reference(), end="")
    elif args.what == "records":
        print(fields_page(RECORDS_HEAD, RECORDS), end="")
    else:
        print(json.dumps(json_schema(SCHEMAS[args.what]), indent=1))


def parse_args(argv):
    parser = Parser("genray config schema", prog="genray.config", description=__doc__)
    kinds = [*SCHEMAS, "reference", "records"]
    parser.add_argument("what", choices=kinds, metavar="|".join(kinds))
    return parser.parse_args(argv)
