"""`python -m genray.config schema` writes the JSON Schema of a run's YAML, `reference` the page of all its fields."""

import argparse
import json

from genray.config.model import json_schema
from genray.config.reference import reference
from genray.config.schema import RunConfig


def main():
    parser = argparse.ArgumentParser(prog="genray.config", description=__doc__)
    parser.add_argument("what", choices=["schema", "reference"])
    if parser.parse_args().what == "reference":
        print(reference(), end="")
    else:
        print(json.dumps(json_schema(RunConfig), indent=1))


if __name__ == "__main__":
    main()
