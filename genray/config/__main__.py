"""`python -m genray.config schema` writes the JSON Schema of a run's YAML, `grid-schema` that of a grid of
`genray.tune`, `reference` the page of all fields of a run."""

import argparse
import json

from genray.config.grid_file import GridFile
from genray.config.model import json_schema
from genray.config.reference import reference
from genray.config.schema import RunConfig


def main():
    parser = argparse.ArgumentParser(prog="genray.config", description=__doc__)
    parser.add_argument("what", choices=["schema", "grid-schema", "reference"])
    what = parser.parse_args().what
    if what == "reference":
        print(reference(), end="")
        return
    print(json.dumps(json_schema(GridFile if what == "grid-schema" else RunConfig), indent=1))


if __name__ == "__main__":
    main()
