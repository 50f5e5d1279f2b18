"""Writes what editors and readers need of configurations: `python -m genray.config schema > run.schema.json`.

`schema` is the JSON Schema of a run's YAML, `grid-schema` that of a grid of `genray.tune`, `results-schema` and
`evaluation-schema` those of `results.json` of a run and of an evaluation, `reference` the page of all fields of a run.
"""

import json

from genray.cli.parser import Parser
from genray.config.grid_file import GridFile
from genray.config.model import json_schema
from genray.config.reference import reference
from genray.config.schema import RunConfig
from genray.records import EvaluationRecord, RunResults

SCHEMAS = {"schema": RunConfig, "grid-schema": GridFile}
SCHEMAS |= {"results-schema": RunResults, "evaluation-schema": EvaluationRecord}


def main(args):
    if args.what == "reference":
        print(reference(), end="")
    else:
        print(json.dumps(json_schema(SCHEMAS[args.what]), indent=1))


def parse_args(argv):
    parser = Parser("genray config schema", prog="genray.config", description=__doc__)
    kinds = [*SCHEMAS, "reference"]
    parser.add_argument("what", choices=kinds, metavar="|".join(kinds))
    return parser.parse_args(argv)
