"""What a report says, in order: sections of tables, figures, galleries and notes, whatever they are written as."""

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

from genray.errors import ConfigError
from genray.evaluation.published import published_row
from genray.reporting import plots, run_plots
from genray.reporting.boards import Board, board_table, boards
from genray.reporting.found import Found, Run
from genray.reporting.gallery import Gallery, draw_gallery
from genray.reporting.mixture_plot import draw_parts
from genray.reporting.mixture_record import study_table
from genray.reporting.paper import tables_of
from genray.reporting.style import MISSING
from genray.reporting.table import Cell, Table, TableRow, cell_of, head_of, one_line
from genray.reporting.trials import trials_table

MOST_RUNS = 12  # runs whose curves are drawn one by one
CAUTION = "CAUTION: "


@dataclass(frozen=True)
class Figure:
    """Attributes:
    name: of its files.
    caption: what it shows, for those too who do not see it.
    files: ending -> content.
    in_page: the page of HTML shows it; False for what that shows in another way.
    """

    name: str
    caption: str
    files: dict
    in_page: bool = True


@dataclass(frozen=True)
class Notes:
    lines: tuple[str, ...]


@dataclass
class Section:
    """Attributes:
    key: of its place in the page.
    title: one line.
    blocks: Tables, Figures, Notes, Galleries and Sections below this one.
    """

    key: str
    title: str
    blocks: list = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Attributes:
    summary: what was found and the best of it, a line each.
    cautions: why numbers may not be what they seem, a line each.
    sections: the rest.
    tables: the tables that a terminal shows.
    """

    summary: tuple[str, ...]
    cautions: tuple[str, ...]
    sections: list[Section]
    tables: list[Table]


def build_report(found: Found, gallery: Gallery | None, no_gallery: str, with_plots: bool) -> Report:
    """Everything that can be said of what was found.

    Args:
        found: what lay in the folders; problems that turn up here are added to it.
        gallery: the images, or None.
        no_gallery: why there are none; "" where nobody wanted any.
        with_plots: matplotlib is there.
    """
    make = _Make(found, with_plots)
    sections = [
        make.accuracy(), make.trade_off(), make.grids(), make.runs(), make.radii(), make.studies(), make.time(),
        _gallery_section(gallery, no_gallery, with_plots), make.published(), make.protocols(), make.left_out(),
    ]  # fmt: skip
    if not with_plots:
        sections.insert(1, Section("plots", "Plots", [Notes((MISSING,))]))
    return Report(make.summary(), make.cautions(), [s for s in sections if s.blocks], make.tables)


class _Make:
    def __init__(self, found: Found, with_plots: bool):
        self.found, self.with_plots = found, with_plots
        self.boards = boards(found)
        self.tables = [board_table(board, number) for number, board in enumerate(self.boards, 1)]
        self.alone = [run for run in found.runs if not run.grid]

    def figure(self, name, caption, make):
        """A list of one figure, of none without matplotlib."""
        return [Figure(name, one_line(caption, 600), make())] if self.with_plots else []

    # --- on top -----------------------------------------------------------------------------------------------------

    def summary(self):
        found = self.found
        counts = [(len(self.alone), "run"), (len(found.grids), "grid"), (len(found.runs) - len(self.alone), "trial"),
                  (len(found.evaluations), "evaluation"), (len(found.studies), "study of operating points")]  # fmt: skip
        text = ", ".join(f"{n} {_plural(word, n)}" for n, word in counts if n)
        lines = [f"Found: {text}." if text else "Found: nothing that could be shown."]
        for board in self.boards:
            lines += _best(board)
        return tuple(lines)

    def cautions(self):
        lines = [
            note.removeprefix(CAUTION) for table in self.tables for note in table.notes if note.startswith(CAUTION)
        ]
        for study in self.found.studies:
            if study.results["theta_g_selected_on"] == "test":
                lines.append(f"{one_line(study.results['run'])}: theta_g's epoch was chosen on the test images")
        few = sorted({board.setting.examples for board in self.boards if board.setting.examples < 1000})
        if few:
            lines.append(f"few test images ({', '.join(map(str, few))}): differences of a few points may be chance")
        weak = [board for board in self.boards if not {"aa", "union"} & set(board.columns)]
        if weak and len(weak) == len(self.boards):
            lines.append("no AutoAttack: accuracy under PGD alone is an upper bound of robustness")
        if self.found.problems:
            lines.append(f"{len(self.found.problems)} folders are left out or shown only in part: see the end")
        return tuple(dict.fromkeys(lines))

    # --- sections ---------------------------------------------------------------------------------------------------

    def accuracy(self):
        return Section("accuracy", "Accuracy", list(self.tables))

    def trade_off(self):
        section = Section("trade-off", "Natural against robust accuracy")
        for number, board in enumerate(self.boards, 1):
            for column in board.robust_columns:
                section.blocks += self._scatter(number, board, column)
        return section

    def _scatter(self, number, board, column):
        points = [
            plots.Point(
                group.label, 100 * natural, 100 * robust, *(_percent(group.spread(c)) for c in ("natural", column))
            )
            for group in board.groups
            if (natural := group.mean("natural")) is not None and (robust := group.mean(column)) is not None
        ]
        published = [
            plots.Point(f"{row[0]}{'' if len(board.published) == 1 else f', {table.network}'}", *values)
            for table in board.published
            for row in table.read()[1]
            if (values := _published_place(table.name, row[0], column))
        ]
        if len(points) + len(published) < 2 or not points:
            return []
        caption = (
            f"{board.setting}: natural accuracy and {head_of(column)}. Dashed: Pareto front of what was found here"
        )
        caption += "; bars: one standard deviation over seeds" if any(p.natural_bar is not None for p in points) else ""
        caption += "; grey: published, their epoch chosen on the test set." if published else "."
        name = f"scatter_{number}_{column}"
        return self.figure(name, caption, lambda: plots.scatter(points, head_of(column), published, "published"))

    def grids(self):
        section = Section("grids", "Grids")
        for number, (path, trials) in enumerate(self.found.grids, 1):
            part = Section(f"grid-{number}", f"{one_line(trials.name, 80)}")
            section.blocks.append(part)
            if not trials.measures:
                part.blocks.append(Notes(("no trial has finished",)))
                continue
            part.blocks.append(trials_table(trials))
            if not self.with_plots:
                continue
            name = f"grid_{number}"
            if len(trials.measures) > 1:
                up = head_of(trials.measures[-1])
                part.blocks += self.figure(f"{name}_scatter", f"{trials.name}: natural accuracy and {up} of every place "
                                           "in the grid, mean over seeds.", lambda t=trials: plots.trials_scatter(t))  # fmt: skip
            shown = dict.fromkeys(("natural", trials.measures[-1]))
            try:
                for measure in shown:
                    part.blocks += self.figure(f"{name}_heat_{measure.replace('/', '_')}",
                                               f"{trials.name}: {head_of(measure)} over the two fields, mean over seeds.",
                                               lambda t=trials, m=measure: plots.heat_map(t, m))  # fmt: skip
            except ConfigError as error:
                part.blocks.append(Notes((str(error),)))
            runs = [run for run in self.found.runs if run.grid == path and run.records]
            if runs:
                part.blocks += self.figure(f"{name}_epochs", f"{trials.name}: theta_g of every trial over epochs, on the "
                                           "images that checkpoints are chosen on.", lambda r=runs: run_plots.grid_epochs(r))  # fmt: skip
        return section

    def runs(self):
        section = Section("runs", "Runs")
        for number, run in enumerate(self.alone, 1):
            part = Section(f"run-{number}", run.name)
            if run.results:
                part.blocks.append(models_table(run, number))
            if run.records and number <= MOST_RUNS:
                part.blocks += self.figure(
                    f"run_{number}_epochs", _epochs_caption(run), lambda r=run: run_plots.epochs(r)
                )
                part.blocks += self.figure(f"run_{number}_schedules", f"{run.name}: mixing weights (a robust learner's is "
                                           "gamma) and learning rates.", lambda r=run: run_plots.schedules(r))  # fmt: skip
            section.blocks.append(part)
        if len(self.alone) > MOST_RUNS and self.with_plots:
            section.blocks.append(Notes((f"curves of the first {MOST_RUNS} of {len(self.alone)} runs; name a run's folder "
                                         "to see its own",)))  # fmt: skip
        return section

    def radii(self):
        section = Section("epsilon", "Robust accuracy over epsilon")
        for number, (label, norm, examples, curves) in enumerate(self._curves_over_epsilon(), 1):
            caption = (
                f"{label}: accuracy over the radius of the {norm} ball on {examples} test images, with 95 % intervals"
            )
            section.blocks += self.figure(f"epsilon_{number}", f"{caption}; epsilon 0 is natural accuracy.",
                                          lambda c=curves, n=norm: plots.over_epsilon(c, n))  # fmt: skip
        return section

    def _curves_over_epsilon(self):
        by_model = defaultdict(lambda: defaultdict(dict))
        labels = {}
        for evaluation in self.found.evaluations:
            record = evaluation.record
            for threat in record["protocol"]["threats"]:
                key = evaluation.model, threat["norm"], record["protocol"]["data"]["examples"]
                labels.setdefault(key, self._label_of(evaluation))
                curves = by_model[key]
                part = record["norms"][threat["norm"]]["columns"]
                for attack in threat["attacks"]:
                    name = head_of(attack["name"])
                    curves[name][0.0] = _triple(record["natural"])
                    curves[name][float(Fraction(threat["epsilon"]))] = _triple(part[attack["name"]])
        for (model, norm, examples), curves in by_model.items():
            several = {name: curve for name, curve in curves.items() if len(curve) > 2}
            if several:
                yield labels[model, norm, examples], norm, examples, several

    def _label_of(self, evaluation):
        for board in self.boards:
            for group in board.groups:
                for entry in group.entries:
                    if entry.path == evaluation.path:
                        return entry.label
        return evaluation.path

    def studies(self):
        section = Section("operating-points", "Operating points of a trained run")
        for number, study in enumerate(self.found.studies, 1):
            part = Section(f"study-{number}", one_line(study.results["run"], 80))
            for split in study.results["splits"]:
                part.blocks.append(study_table(study.results, split, f"mixtures_{number}_{split}"))
                if self.with_plots:
                    for name, files in draw_parts(study.results, split).items():
                        part.blocks.append(
                            Figure(f"mixtures_{number}_{split}_{name}", _study_caption(study, split, name), files)
                        )
            section.blocks.append(part)
        return section

    def time(self):
        section = Section("time", "Where time went")
        measured = {run.name: run_plots.times(run.records) for run in self.alone}
        for path, trials in self.found.grids:
            measured[trials.name] = run_plots.times(
                [r for run in self.found.runs if run.grid == path for r in run.records]
            )
        measured = {name: of for name, of in measured.items() if of}
        older = [run.name for run in self.found.runs if run.records and not run_plots.times(run.records)]
        if measured:
            section.blocks.append(_time_table(measured))
            section.blocks += self.figure("time", "Seconds of each learner, cut into what they went for; of a grid, the sum "
                                          "over its trials.", lambda: run_plots.time_split(measured))  # fmt: skip
        if older:
            section.blocks.append(Notes((f"not measured by {len(older)} runs of an older genray: "
                                         f"{one_line(', '.join(older), 160)}",)))  # fmt: skip
        return section

    def published(self):
        data = dict.fromkeys(board.setting.data for board in self.boards)
        return Section("published", "Published tables of these data", [t for name in data for t in tables_of(name)])

    def protocols(self):
        section = Section("protocol", "How it was measured")
        seen = {}
        for evaluation in self.found.evaluations:
            protocol = evaluation.record["protocol"]
            seen.setdefault(protocol["hash"], (protocol, []))[1].append(self._label_of(evaluation))
        for protocol, labels in seen.values():
            section.blocks += [_attacks_table(protocol, threat, labels) for threat in protocol["threats"]]
        versions = dict.fromkeys(_versions(run) for run in self.found.runs if run.results)
        section.blocks += [Notes(tuple(versions))] if versions else []
        return section

    def left_out(self):
        lines = tuple(f"{path}: {reason}" for path, reason in self.found.problems)
        return Section("left-out", "Left out, or shown only in part", [Notes(lines)] if lines else [])


def _plural(word, number):
    return word if number == 1 else "studies of operating points" if word.startswith("study") else f"{word}s"


def _percent(fraction):
    return None if fraction is None else 100 * fraction


def _triple(record):
    return record["value"], record["low"], record["high"]


def _best(board: Board):
    column = next(iter(board.robust_columns), None)
    rated = [g for g in board.groups if column and g.mean("natural") is not None and g.mean(column) is not None]
    if not rated:
        return
    best = max(rated, key=lambda g: g.mean("natural") + g.mean(column))
    of = f"best sum of both among {len(rated)}: " if len(rated) > 1 else ""
    cells = [f"{head_of(c)} {best.cell(c).number} %" for c in ("natural", column)]
    yield f"{board.setting}: {of}{best.label} with {', '.join(cells)}."


def _published_place(table, method, column):
    values = published_row(table, method)["values"]
    return (values["natural"], values[column]) if column in values else None


def models_table(run: Run, number: int) -> Table:
    """All models of a finished run at the end of training: theta_g, the last one, the base learners."""
    models, protocol = run.results["models"], run.results["protocol"]
    columns = list(dict.fromkeys(name for by_attack in models.values() for name in by_attack))
    names = {"global": f"theta_g, epoch {run.results['best_epoch']} (model.pt)", "global_last": "theta_g, last epoch"}
    rows = [
        TableRow((names.get(name, f"base learner {name}"),), tuple(
            cell_of(r["value"], None, r["low"], r["high"]) if (r := by_attack.get(c)) else Cell() for c in columns))
        for name, by_attack in models.items()
    ]  # fmt: skip
    title = f"{run.name}: all models on {protocol['examples']} test images, {protocol['norm']} {protocol['epsilon']}"
    notes = (f"accuracy in %, 95 % Wilson intervals; {protocol['attack']}; checkpoint chosen on {protocol['selected_on']} images",
             f"seed {run.results['seed']}")  # fmt: skip
    return Table(
        f"run_{number}_models", one_line(title), ("model",), tuple(map(head_of, columns)), tuple(rows), notes
    ).ranked()


def _epochs_caption(run):
    on = run.config.evaluation.select_on
    return (
        f"{run.name}: theta_g on the {on} images, natural (circles) and under attack (squares); dashed: each learner on its own "
        "training inputs, which for a robust learner are attacked; diamonds: base learners on the test images at the end, "
        "filled natural, hollow under attack; grey bands: theta_g was handed back to the learners."
    )


def _study_caption(study, split, name):
    of = f"{one_line(study.results['run'], 80)}, {split} images: "
    if name == "over_gamma":
        return f"{of}accuracy over gamma with 95 % intervals."
    chosen = "; star: chosen on the validation images" if study.results["chosen"] else ""
    return f"{of}robust over natural accuracy of the mixtures; filled points are Pareto-optimal{chosen}."


def _time_table(measured):
    rows = []
    for run, of in measured.items():
        for learner, parts in of.items():
            cells = tuple(Cell(f"{parts[part]:.1f}") for part in run_plots.PARTS)
            rows.append(TableRow((run, learner), cells))
    notes = ("seconds; attack: crafting adversarial images; step: the rest of the optimiser steps; averaging: the learner's "
             "average and its share of theta_g; transfer: copying weights out of and into the device's memory at the end of a "
             "window; waiting: from one window to the next apart from that (on theta_g, on others; with --runtime local, on the "
             "other learners' turns and on evaluations)",
             "on a GPU attack and averaging are measured in the first 32 steps of every window and scaled up")  # fmt: skip
    return Table("time", "Seconds of each learner", ("run", "learner"), run_plots.PARTS, tuple(rows), notes)


def _attacks_table(protocol, threat, labels):
    rows = []
    for attack in threat["attacks"]:
        size = attack.get("step_size")
        cells = [attack["num_steps"], "" if size is None else f"{size:.6g}", attack.get("restarts", ""),
                 attack.get("passes", ""), attack.get("queries", "")]  # fmt: skip
        rows.append(
            TableRow((head_of(attack["name"]), str(attack.get("loss", ""))), tuple(Cell(str(c)) for c in cells))
        )
    title = f"{threat['norm']} {threat['epsilon']} ({threat['epsilon_decimal']:.6g}), protocol {protocol['hash']}"
    data = protocol["data"]
    notes = (f"of {one_line(', '.join(labels), 160)}; {data['examples']} {data.get('split', '')} images of {data['source']}, "
             f"blocks of {protocol.get('block_size', '?')}, engine {protocol['engine']}, seed {protocol['seed']}",)  # fmt: skip
    heads = ("steps", "step size", "restarts", "passes", "queries")
    return Table(
        f"protocol_{protocol['hash']}_{threat['norm']}", one_line(title), ("attack", "loss"), heads, tuple(rows), notes
    )


def _versions(run):
    found = run.results["versions"]
    text = ", ".join(
        f"{key} {one_line(found[key], 60)}" for key in ("genray", "torch", "ray", "python") if found.get(key)
    )
    devices = found.get("devices")
    text += (
        f"; on {one_line(', '.join(map(str, dict.fromkeys(devices))), 120)}"
        if isinstance(devices, list) and devices
        else ""
    )
    return f"computed with {text}"


def _gallery_caption(gallery):
    return (
        f"Each: image, magnified perturbation, attacked image, of the first {gallery.examined} test images; {gallery.attack}; "
        "a → b: prediction without and under attack."
    )


def _gallery_section(gallery, why_not, with_plots):
    section = Section("gallery", "Images and predictions")
    if gallery:
        section.blocks.append(gallery)
        if with_plots and any(gallery.cards.values()):
            section.blocks.append(Figure("gallery", _gallery_caption(gallery), draw_gallery(gallery), in_page=False))
    elif why_not:
        section.blocks.append(Notes((f"no gallery: {why_not}",)))
    return section
