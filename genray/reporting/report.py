"""Makes a report of folders and writes its files."""

import os

from genray.config.model import did_you_mean
from genray.errors import InputError, RunFolderError, StorageError, one_line
from genray.recording.progress import Progress
from genray.recording.writer import write_all
from genray.reporting.build import build_report
from genray.reporting.content import Report
from genray.reporting.found import find
from genray.reporting.gallery import default_sides, make_gallery
from genray.reporting.style import MissingMatplotlib, require_matplotlib
from genray.reporting.trials import Trials, markdown, read_trials, trials_csv
from genray.reporting.write import DEFAULT_FORMATS, FORMATS, files_of, open_output, write_files
from genray.storage import Storage


def make_report(paths, output, formats=None, gallery=None, images=300) -> tuple[Report, list[tuple[str, str]]]:
    """Makes a report as `genray.report`, which describes and checks the arguments."""
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
    shown, why_not = _gallery(found, gallery, images) if with_plots else (None, "")
    made = build_report(found, shown, why_not, with_plots)
    write_files(storage, before, files_of(made, formats))
    return made, found.problems


def _checked_formats(formats):
    wrong = [name for name in formats if name not in FORMATS]
    hint = did_you_mean(wrong[0], FORMATS) if wrong else ""
    if wrong or not formats:
        raise RunFolderError(
            f"--format: expected some of {', '.join(FORMATS)}, got {wrong[0] if wrong else 'none'!r}{hint}"
        )
    return tuple(formats)


def _gallery(found, wanted, images):
    """(figure or None, reason for None). The models that a user names must exist; the default ones may be absent."""
    wanted = wanted if wanted is None else [*map(str, wanted)]
    if wanted is not None and len(wanted) not in (0, 2):
        raise RunFolderError(f"--gallery: expected two models, got {len(wanted)}")
    if wanted == []:
        return None, ""
    sides = wanted or default_sides(found.runs)
    if sides is None:
        return None, "no finished run here holds model.pt and the models of its base learners"
    progress = Progress()
    try:
        return make_gallery(*sides, images, progress), ""
    except InputError as error:
        if wanted:
            raise
        return None, one_line(error)
    finally:
        progress.close()


def report_grid(folder) -> tuple[Trials, StorageError | None]:
    """Writes the tables of a grid, `trials.csv` and `table.md`, into its folder.

    Returns:
        (the `Trials`, an error that lists the files that could not be written, or None).
    """
    trials = read_trials(folder)
    try:
        write_all(Storage(folder), {"trials.csv": trials_csv(trials), "table.md": markdown(trials).encode()})
    except StorageError as error:
        return trials, StorageError(f"{error}; --report writes them again")
    return trials, None
