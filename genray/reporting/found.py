"""Finds runs, evaluations, mixtures and grids in folders, and reports damaged ones."""

from dataclasses import dataclass, field
from pathlib import Path

from genray import records
from genray.config import RunConfig, load_config
from genray.config.load import yaml_mapping
from genray.errors import GenrayError, one_line
from genray.reporting.trials import Trials, read_trials
from genray.storage import Storage, without_secrets
from genray.tables import printable
from genray.tuning.grid import RECORD

DEEPEST = 8  # folders below those given
PARTS = {"checkpoints", "tensorboard", "blocks", "teacher", "tune"}  # of runs, evaluations and grids


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        place: the folder.
        config: of the run.
        records: of `metrics.jsonl`.
        results: the content of `results.json`; None for an unfinished run.
        grid: path of the grid it is a trial of, or "".
        point: method and place in that grid, as text.
    """

    place: Storage
    config: RunConfig
    records: list[dict]
    results: dict | None
    grid: str = ""
    point: str = ""

    @property
    def path(self) -> str:
        return str(self.place)

    @property
    def name(self) -> str:
        return printable(self.point or self.config.name, 80)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its folder, its record, its model's fingerprint, and the run whose folder it is in."""

    place: Storage
    record: dict
    model: str
    owner: Run | None

    @property
    def path(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class SweepResult:
    """The operating points of a run (`--mixtures`)."""

    path: str
    results: dict


@dataclass(frozen=True)
class Found:
    """Attributes:
    runs, evaluations, studies: the readable ones.
    grids: (path, its trials).
    problems: (path, reason for leaving it out or showing it in part).
    """

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    studies: list[SweepResult] = field(default_factory=list)
    grids: list[tuple[str, Trials]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        return not (self.runs or self.evaluations or self.studies or self.grids)


def find(paths) -> Found:
    """Finds everything below the given folders, each folder once.

    Args:
        paths: folders or URIs.
    """
    search = _Search()
    for path in paths:
        search.root(str(path))
    return search.found


class _Search:
    def __init__(self):
        self.found, self.seen, self.again = Found(), set(), False

    def problem(self, path, reason):
        self.found.problems.append((printable(path), printable(reason, 300)))

    def root(self, path):
        try:
            place = Storage(path)
            path = str(place)
            if not place.exists():
                self.problem(path, "there is nothing")
                return
            if not place.is_folder():
                self.problem(path, "expected the folder of a run, an evaluation or a grid, this is a file")
                return
            before, self.again = self._number(), False
            self._walk(place, 0, None, "", {})
            if self._number() == before and not self.again:
                self.problem(path, "no run, evaluation or grid in it")
        except (GenrayError, OSError) as error:
            self.problem(without_secrets(path), error)

    def _number(self):
        found = self.found
        return sum(map(len, (found.runs, found.evaluations, found.studies, found.grids, found.problems)))

    def _walk(self, storage, depth, owner, grid, points):
        path = str(storage)
        key = str(Path(storage.root).resolve()) if storage.is_local else storage.uri
        if key in self.seen:
            self.again = True
            return
        self.seen.add(key)
        names = storage.names()
        if RECORD in names:
            grid, points = self._grid(path, storage)
        elif "config.yaml" in names:
            owner = self._run(path, storage, names, grid, points.get(storage.name, ""))
        elif "request.json" in names:
            self._evaluation(path, storage, names, owner)
            return
        elif "results.json" in names:
            self._study(path, storage)
            return
        if depth < DEEPEST:
            for name in storage.folders():
                if name not in PARTS and not name.startswith("."):
                    self._walk(storage / name, depth + 1, owner, grid, points)

    def _grid(self, path, storage):
        try:
            trials = read_trials(storage)
            self.found.grids.append((path, trials))
            left = [row["trial"] for row in trials.rows if row["status"] == "not started"]
            if left:
                self.problem(path, f"{len(left)} of {len(trials.rows)} trials have not started, first {left[0]}")
            return path, {row["trial"]: trials.place_of(row) for row in trials.rows}
        except GenrayError as error:
            self.problem(path, one_line(error).removeprefix(f"{path}: "))
            return "", {}

    def _run(self, path, storage, names, grid, point):
        try:
            plain = yaml_mapping(storage.read("config.yaml"), "the file")
            config = load_config(plain)
        except (GenrayError, ValueError, TypeError, AttributeError, RecursionError) as error:
            self.problem(path, f"config.yaml is not of a genray run: {one_line(error)}")
            return None
        epochs, results = self._epochs(path, storage, names), None
        try:
            results = records.read(records.RunResults, storage, "results.json") if "results.json" in names else None
        except GenrayError as error:
            self.problem(path, f"{one_line(error)}; its table is left out")
        else:
            if results is None:
                self.problem(path, f"unfinished: {len(epochs)} of {config.training.epochs} epochs; only its curves")
        if results is None and not epochs:
            return None
        run = Run(storage, config, epochs, results, grid, point)
        self.found.runs.append(run)
        return run

    def _epochs(self, path, storage, names):
        if "metrics.jsonl" not in names:
            self.problem(path, "no metrics.jsonl, so no curves")
            return []
        found = []
        for number, line in enumerate(storage.read("metrics.jsonl").splitlines(), 1):
            try:
                found.append(records.parse(records.EpochRecord, line))
            except records.Damaged as error:
                self.problem(path, f"metrics.jsonl: line {number} is damaged; curves end before it: {error}")
                break
        return found

    def _evaluation(self, path, storage, names, owner):
        if "results.json" not in names:
            blocks = len(storage.names("blocks"))
            self.problem(path, f"unfinished evaluation: {blocks} blocks are done; genray.evaluate --resume goes on")
            return
        try:
            record = records.read(records.EvaluationRecord, storage, "results.json")
            request = records.read(records.EvaluationRequest, storage, "request.json")
            self.found.evaluations.append(Evaluation(storage, record, request["model"], owner))
        except GenrayError as error:
            self.problem(path, one_line(error))

    def _study(self, path, storage):
        try:
            results = records.read(records.MixtureResults, storage, "results.json")
            self.found.studies.append(SweepResult(path, results))
        except GenrayError as error:
            self.problem(path, one_line(error))
