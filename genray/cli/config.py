"""Writes what editors and readers need of configurations: `python -m genray.config schema > run.schema.json`.

`schema` is the JSON Schema of a run's YAML, `grid-schema` that of a grid of `genray.tune`, `reference` the page of all
fields of a run.
"""

import json

from genray.cli.parser import Parser
from genray.config.grid_file import GridFile
from genray.config.model import json_schema
from genray.config.reference import reference
from genray.config.schema import RunConfig


def main(args):
    if args.what == "reference":
        print(reference(), end="")
    else:
        print(json.dumps(json_schema(GridFile if args.what == "grid-schema" else RunConfig), indent=1))


def parse_args(argv):
    parser = Parser("genray config schema", prog="genray.config", description=__doc__)
    kinds = ["schema", "grid-schema", "reference"]
    parser.add_argument("what", choices=kinds, metavar="|".join(kinds))
    parser.set_defaults(debug=False)
    return parser.parse_args(argv)
