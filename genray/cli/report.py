"""Tables, plots and a page of finished runs: `python -m genray.report RUN_OR_FOLDER...`, or `genray.report(paths)`."""

import sys

from genray.api import report
from genray.cli.parser import Parser, at_least


def main(args):
    from genray.reporting.style import MISSING, MissingMatplotlib, require_matplotlib
    from genray.storage import Storage
    from genray.tables import as_text

    gallery = () if args.no_gallery else args.gallery
    options = {"output": args.output, "gallery": gallery, "images": args.gallery_images}
    made, problems = report(args.folders, formats=args.format and args.format.split(","), **options)
    for path, reason in problems:
        print(f"note: {path}: {reason}", file=sys.stderr)
    for table in made.tables[: args.tables]:
        print(as_text(table), end="\n\n")
    for line in (*made.summary, *(f"CAUTION: {line}" for line in made.cautions)):
        print(line)
    try:
        require_matplotlib()
    except MissingMatplotlib:
        print(MISSING)
    place = Storage(args.output)
    page = f"; open {place / 'index.html'}" if args.format is None or "html" in args.format else ""
    print(f"everything is in {place}{page}")


def parse_args(argv):
    parser = Parser("genray report runs --output report", prog="genray.report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="RUN_OR_FOLDER", help="runs, evaluations, grids, or what holds them"
    )
    parser.add_argument("--format", metavar="NAME,...", help="of html, md, csv, tex, png, svg (default: all but svg)")
    parser.add_argument("--output", default="report", metavar="DIR", help="folder or URI (default: report)")
    parser.add_argument(
        "--gallery",
        nargs=2,
        metavar="MODEL",
        help="two models to compare on images: RUN or a model file in a run",
    )
    parser.add_argument("--no-gallery", action="store_true", help="attack no images")
    parser.add_argument(
        "--gallery-images",
        type=at_least(1),
        default=300,
        metavar="N",
        help="attack at most N test images (default: 300)",
    )
    parser.add_argument(
        "--tables", type=at_least(0), default=3, metavar="N", help="print at most N tables (default: 3)"
    )
    return parser.parse_args(argv)
