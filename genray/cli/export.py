"""Write a model for other programs: `python -m genray.export RUN_OR_MODEL --layout onnx`, or `genray.export(...)`."""

from typing import get_args

from genray.api import Layout, export
from genray.cli.parser import Parser


def main(args):
    from genray.storage import without_secrets

    written = export(args.source, args.layout, args.output, overwrite=args.overwrite)
    print(f"the model is in {without_secrets(written)}")


def parse_args(argv):
    parser = Parser("genray export runs/digits --layout onnx", prog="genray.export", description=__doc__)
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="a run folder, or a model file written by genray")
    parser.add_argument("--layout", choices=get_args(Layout), required=True, help="what the file is to look like")
    parser.add_argument("--output", metavar="FILE", help="path or URI (default: beside the model)")
    parser.add_allow_option()
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser.parse_args(argv)
