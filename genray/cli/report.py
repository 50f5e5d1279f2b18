"""Tables, plots and a page of finished runs: `python -m genray.report RUN_OR_FOLDER...`, or `genray.report(paths)`."""

import os
import sys

from genray.cli.parser import Parser
from genray.config.arguments import Count, Place, checked
from genray.config.model import did_you_mean
from genray.errors import InputError, RunFolderError

DEFAULT_OUTPUT = "report"
DEFAULT_IMAGES = 300


@checked
def report(
    paths,
    *,
    output: Place = DEFAULT_OUTPUT,
    formats=None,
    gallery=None,
    images: Count = DEFAULT_IMAGES,
):
    """Makes a report of everything that lies below some folders.

    Args:
        paths: folders of runs, evaluations, mixtures and grids, or folders that hold such, in any mixture.
        output: folder or URI; a report that is there is overwritten, nothing else is.
        formats: a list, or one text "html,md", of html, md, csv, tex, png, svg; all but svg by default.
        gallery: two models, each a run folder, RUN:LEARNER or a model file in a run; None for theta_g and the robust
            base learner of the first run that has both; () for no gallery.
        images: at most so many test images are attacked for the gallery.

    Returns:
        (the `Report`, [(folder, why it is left out or shown only in part)]).

    Raises:
        InputError: nothing that could be shown was found, or an argument is wrong; nothing was written.
    """
    from genray.recording.progress import Progress
    from genray.reporting.build import build_report
    from genray.reporting.found import find
    from genray.reporting.style import MissingMatplotlib, require_matplotlib
    from genray.reporting.write import DEFAULT_FORMATS, files_of, open_output, write_files

    formats = formats.split(",") if isinstance(formats, str) else formats
    formats = _checked_formats(DEFAULT_FORMATS if formats is None else formats)
    storage, before = open_output(output)
    found = find([paths] if isinstance(paths, (str, os.PathLike)) else paths)
    if found.nothing:
        raise RunFolderError("; ".join(f"{path}: {reason}" for path, reason in found.problems) or "no folder given")
    try:
        require_matplotlib()
        with_plots = True
    except MissingMatplotlib:
        with_plots = False
    progress = Progress()
    try:
        shown, why_not = _gallery(found, gallery, images, progress)
    finally:
        progress.close()
    made = build_report(found, shown, why_not, with_plots)
    write_files(storage, before, files_of(made, formats))
    return made, found.problems


def _checked_formats(formats):
    from genray.reporting.write import FORMATS

    wrong = [name for name in formats if name not in FORMATS]
    hint = did_you_mean(wrong[0], FORMATS) if wrong else ""
    if wrong or not formats:
        raise RunFolderError(
            f"--format: expected some of {', '.join(FORMATS)}, got {wrong[0] if wrong else 'none'!r}{hint}"
        )
    return tuple(formats)


def _gallery(found, wanted, images, progress):
    """(gallery or None, why there is none). Models that are asked for have to be there; by default they need not."""
    from genray.reporting.gallery import default_sides, make_gallery

    if wanted is not None and len(wanted) == 0:
        return None, ""
    if wanted is not None:
        if len(wanted) != 2:
            raise RunFolderError(f"--gallery: expected two models, got {len(wanted)}")
        return make_gallery(*map(str, wanted), images, progress), ""
    sides = default_sides(found.runs)
    if sides is None:
        return None, "no finished run here holds model.pt and the models of its base learners"
    try:
        return make_gallery(*sides, images, progress), ""
    except InputError as error:
        return None, " ".join(str(error).split())


def main(args):
    from genray.reporting.style import MISSING, MissingMatplotlib, require_matplotlib
    from genray.reporting.table import as_text
    from genray.storage import Storage

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
    parser = Parser(prog="genray.report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="RUN_OR_FOLDER", help="runs, evaluations, grids, or what holds them"
    )
    parser.add_argument("--format", metavar="NAME,...", help="of html, md, csv, tex, png, svg (default: all but svg)")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, metavar="DIR", help="folder or URI (default: report)")
    parser.add_argument(
        "--gallery",
        nargs=2,
        metavar="MODEL",
        help="two models to compare on images: RUN, RUN:LEARNER or a file in a run",
    )
    parser.add_argument("--no-gallery", action="store_true", help="attack no images")
    parser.add_argument(
        "--gallery-images",
        type=int,
        default=DEFAULT_IMAGES,
        metavar="N",
        help="attack at most N test images (default: 300)",
    )
    parser.add_argument("--tables", type=int, default=3, metavar="N", help="print at most N tables (default: 3)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.gallery_images < 1:
        parser.error(f"--gallery-images: expected at least 1, got {args.gallery_images}")
    if args.tables < 0:
        parser.error(f"--tables: expected 0 or more, got {args.tables}")
    return args
