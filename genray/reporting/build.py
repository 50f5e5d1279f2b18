"""Builds a report of the runs, evaluations and grids found."""

from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from functools import partial

from genray.evaluation.published import published_row
from genray.evaluation.record import curves
from genray.recording.table import table_of
from genray.reporting import plots, run_plots
from genray.reporting.comparison import READING, Comparison, comparison_table, comparisons
from genray.reporting.content import CAUTION, Figure, Notes, Report, ReportSection
from genray.reporting.found import Found
from genray.reporting.mixtures import draw_split, mixture_table
from genray.reporting.paper import tables_of
from genray.reporting.record_tables import attacks_table, time_table, versions_line
from genray.reporting.style import MISSING
from genray.reporting.trials import trials_table, varying
from genray.tables import head_of, printable

MOST_RUNS = 12  # runs whose curves are drawn one by one


def build_report(found: Found, gallery: Figure | None, no_gallery: str, with_plots: bool) -> Report:
    """Builds the report of everything found.

    Args:
        found: content of the folders; new problems are added to it.
        gallery: the figure of images, or None.
        no_gallery: reason for None; "" if no gallery was asked for.
        with_plots: whether matplotlib is installed.
    """
    make = _Make(found, with_plots)
    sections = [
        make.accuracy(), make.trade_off(), make.grids(), make.runs(), make.radii(), make.studies(), make.time(),
        make.gallery(gallery, no_gallery), make.published(), make.protocols(), make.left_out(),
    ]  # fmt: skip
    if not with_plots:
        sections.insert(1, ReportSection("plots", "Plots", [Notes((MISSING,))]))
    return Report(make.summary(), make.cautions(), [s for s in sections if s.blocks], make.tables)


class _Make:
    def __init__(self, found: Found, with_plots: bool):
        self.found, self.with_plots = found, with_plots
        self.comparisons = comparisons(found)
        self.tables = [comparison_table(comparison, number) for number, comparison in enumerate(self.comparisons, 1)]
        self.alone = [run for run in found.runs if not run.grid]
        names = Counter(run.name for run in self.alone)
        self.names = {
            r.path: r.name if names[r.name] == 1 else f"{r.name} ({printable(r.path, 80)})" for r in self.alone
        }

    def figure(self, name, caption, make):
        """A list of one figure, of none without matplotlib."""
        return [Figure(name, printable(caption, 600), make())] if self.with_plots else []

    # --- on top -----------------------------------------------------------------------------------------------------

    def summary(self):
        found = self.found
        counts = {"run": self.alone, "grid": found.grids, "trial": [run for run in found.runs if run.grid]}
        counts |= {"evaluation": found.evaluations, "study of operating points": found.studies}
        lines = [f"Found: {', '.join(_counted(word, len(of)) for word, of in counts.items() if of)}."]
        for comparison in self.comparisons:
            lines += _best(comparison)
        return tuple(lines)

    def cautions(self):
        notes = [note for table in self.tables for note in table.notes]
        lines = [note.removeprefix(CAUTION) for note in notes if note.startswith(CAUTION)]
        for study in self.found.studies:
            if study.results["theta_g_selected_on"] == "test":
                lines.append(f"{printable(study.results['run'])}: theta_g's epoch was chosen on the test images")
        few = sorted(
            {comparison.setting.examples for comparison in self.comparisons if comparison.setting.examples < 1000}
        )
        if few:
            lines.append(f"few test images ({', '.join(map(str, few))}): differences of a few points may be chance")
        if self.comparisons and not any("aa" in comparison.columns for comparison in self.comparisons):
            lines.append("no AutoAttack: accuracy under PGD alone is an upper bound of robustness")
        if self.found.problems:
            lines.append(f"{len(self.found.problems)} folders are left out or shown only in part: see the end")
        return tuple(dict.fromkeys(lines))

    # --- sections ---------------------------------------------------------------------------------------------------

    def accuracy(self):
        return ReportSection("accuracy", "Accuracy", [Notes(READING), *self.tables] if self.tables else [])

    def trade_off(self):
        section = ReportSection("trade-off", "Natural against robust accuracy")
        for number, comparison in enumerate(self.comparisons, 1):
            for column in comparison.robust_columns:
                section.blocks += self._scatter(number, comparison, column)
        return section

    def _scatter(self, number, comparison, column):
        points = [
            plots.Point(group.label, 100 * natural, 100 * robust, *_bars(group, column))
            for group in comparison.groups
            if (natural := group.mean("natural")) is not None and (robust := group.mean(column)) is not None
        ]
        published = _published_points(comparison, column, min((point.robust for point in points), default=0))
        if len(points) + len(published) < 2 or not points:
            return []
        caption = (
            f"{comparison.setting}: natural accuracy and {head_of(column)}; dashed: Pareto front of what was found"
        )
        caption += "; bars: one standard deviation over seeds" if any(p.natural_bar is not None for p in points) else ""
        if published:
            names = ", ".join(f"{number} {point.label}" for number, point in enumerate(published, 1))
            caption += f"; grey: published, their epoch chosen on the test set: {names}"
        name, head = f"scatter_{number}_{column}", head_of(column)
        return self.figure(name, f"{caption}.", partial(plots.scatter, points, head, published))

    def grids(self):
        section = ReportSection("grids", "Grids")
        for number, (path, trials) in enumerate(self.found.grids, 1):
            part = ReportSection(f"grid-{number}", f"{printable(trials.name, 80)}")
            section.blocks.append(part)
            if not trials.measures:
                part.blocks.append(Notes(("no trial has finished",)))
                continue
            part.blocks.append(trials_table(trials))
            if not self.with_plots:
                continue
            name, fields = f"grid_{number}", varying(trials)
            for measure in dict.fromkeys(("natural", trials.measures[-1])) if len(fields) == 2 else ():
                caption = f"{trials.name}: {head_of(measure)} over the two fields, mean over seeds."
                of = partial(plots.heat_map, trials, measure)
                part.blocks += self.figure(f"{name}_heat_{measure.replace('/', '_')}", caption, of)
            if len(fields) != 2:
                note = f"no heat map: it is of two fields, this grid varies {', '.join(fields) or 'none'}"
                part.blocks.append(Notes((note,)))
            runs = [run for run in self.found.runs if run.grid == path and run.records]
            if runs:
                caption = f"{trials.name}: theta_g of every trial over epochs, on what checkpoints are chosen on."
                part.blocks += self.figure(f"{name}_epochs", caption, partial(run_plots.grid_epochs, runs))
        return section

    def runs(self):
        section = ReportSection("runs", "Runs")
        for number, run in enumerate(self.alone, 1):
            part = ReportSection(f"run-{number}", self.names[run.path])
            if run.results:
                table, test = table_of(run.results), run.results["protocol"]
                title = f"{run.name}: all models on {test['examples']} test images, {test['norm']} {test['epsilon']}"
                part.blocks.append(replace(table, name=f"run_{number}_models", title=printable(title)).ranked())
            if run.records and number <= MOST_RUNS:
                curves = partial(run_plots.epochs, run)
                part.blocks += self.figure(f"run_{number}_epochs", _epochs_caption(run), curves)
                caption = f"{run.name}: mixing weights (a robust learner's is gamma) and learning rates."
                part.blocks += self.figure(f"run_{number}_schedules", caption, partial(run_plots.schedules, run))
            section.blocks.append(part)
        if len(self.alone) > MOST_RUNS and self.with_plots:
            text = f"curves of the first {MOST_RUNS} of {len(self.alone)} runs; name a run's folder to see its own"
            section.blocks.append(Notes((text,)))
        return section

    def radii(self):
        section = ReportSection("epsilon", "Robust accuracy over epsilon")
        for number, (label, norm, examples, several) in enumerate(self._curves_over_epsilon(), 1):
            caption = f"{label}: accuracy over the radius of the {norm} ball on {examples} test images, with 95 %"
            caption += " intervals; epsilon 0 is natural accuracy."
            section.blocks += self.figure(f"epsilon_{number}", caption, partial(plots.over_epsilon, several, norm))
        return section

    def _curves_over_epsilon(self):
        by_model = defaultdict(lambda: defaultdict(dict))
        labels = {}
        for evaluation in self.found.evaluations:
            record = evaluation.record
            for norm, columns in curves(record).items():
                key = evaluation.model, norm, record["protocol"]["data"]["examples"]
                labels.setdefault(key, self._label_of(evaluation))
                for column, curve in columns.items():
                    points = {float(Fraction(radius)): _triple(found) for radius, found in curve.items()}
                    by_model[key][head_of(column)] |= points
        for (model, norm, examples), found in by_model.items():
            several = {name: curve for name, curve in found.items() if len(curve) > 2}
            if several:
                yield labels[model, norm, examples], norm, examples, several

    def _label_of(self, evaluation):
        for comparison in self.comparisons:
            for group in comparison.groups:
                for entry in group.entries:
                    if entry.path == evaluation.path:
                        return entry.label
        return evaluation.path

    def studies(self):
        section = ReportSection("operating-points", "Operating points of a trained run")
        for number, study in enumerate(self.found.studies, 1):
            part = ReportSection(f"study-{number}", printable(study.results["run"], 80))
            for split in study.results["splits"]:
                part.blocks.append(mixture_table(study.results, split, f"mixtures_{number}_{split}").ranked())
                if self.with_plots:
                    for name, files in draw_split(study.results, split).items():
                        caption = printable(_study_caption(study, split, name), 600)
                        part.blocks.append(Figure(f"mixtures_{number}_{split}_{name}", caption, files))
            section.blocks.append(part)
        return section

    def time(self):
        section = ReportSection("time", "Where time went")
        measured = {self.names[run.path]: run_plots.times(run.records) for run in self.alone}
        for path, trials in self.found.grids:
            of_grid = [record for run in self.found.runs if run.grid == path for record in run.records]
            measured[f"grid {printable(trials.name, 80)}"] = run_plots.times(of_grid)
        measured = {name: of for name, of in measured.items() if of}
        older = [run.name for run in self.found.runs if run.records and not run_plots.times(run.records)]
        if measured:
            section.blocks.append(time_table(measured))
            caption = "Seconds of each learner, cut into what they went for; of a grid, the sum over its trials."
            section.blocks += self.figure("time", caption, partial(run_plots.time_split, measured))
        if older:
            names = printable(", ".join(dict.fromkeys(older)), 160)
            section.blocks.append(
                Notes((f"not measured by {_counted('run', len(older))} of an older genray: {names}",))
            )
        return section

    def gallery(self, gallery, why_not):
        blocks = [gallery] * bool(gallery) + [Notes((f"no gallery: {why_not}",))] * bool(why_not)
        return ReportSection("gallery", "Images and predictions", blocks)

    def published(self):
        data = dict.fromkeys(comparison.setting.data for comparison in self.comparisons)
        return ReportSection(
            "published", "Published tables of these data", [t for name in data for t in tables_of(name)]
        )

    def protocols(self):
        section = ReportSection("protocol", "How it was measured")
        seen = {}
        for evaluation in self.found.evaluations:
            protocol = evaluation.record["protocol"]
            seen.setdefault(protocol["hash"], (protocol, []))[1].append(self._label_of(evaluation))
        for protocol, labels in seen.values():
            section.blocks += [attacks_table(protocol, threat, labels) for threat in protocol["threats"]]
        versions = dict.fromkeys(versions_line(run) for run in self.found.runs if run.results)
        section.blocks += [Notes(tuple(versions))] if versions else []
        return section

    def left_out(self):
        lines = tuple(f"{path}: {reason}" for path, reason in self.found.problems)
        return ReportSection("left-out", "Left out, or shown only in part", [Notes(lines)] if lines else [])


def _counted(word, number):
    several = word.replace("study", "studies") if word.startswith("study") else f"{word}s"
    return f"{number} {word if number == 1 else several}"


def _bars(group, column):
    spreads = (group.spread(c) for c in ("natural", column))
    return (None if spread is None else 100 * spread for spread in spreads)


def _triple(record):
    return record["value"], record["low"], record["high"]


def _best(comparison: Comparison):
    column = next(iter(comparison.robust_columns), None)
    rated = [g for g in comparison.groups if column and g.mean("natural") is not None and g.mean(column) is not None]
    if not rated:
        return
    best = max(rated, key=lambda g: g.mean("natural") + g.mean(column))
    of = f"best sum of both among {len(rated)} by these test images: " if len(rated) > 1 else ""
    cells = [f"{head_of(c)} {best.cell(c).number} %" for c in ("natural", column)]
    yield f"{comparison.setting}: {of}{best.label} with {', '.join(cells)}."


def _published_points(comparison, column, lowest):
    """Those of the same network where there are any; without natural training where nothing of ours is as weak."""
    tables = [table for table in comparison.published if table.network.lower() == comparison.setting.network.lower()]
    points = []
    for table in tables or comparison.published:
        for method in (row[0] for row in table.read()[1]):
            values = published_row(table.name, method)["values"]
            name = method if tables else f"{method} ({table.network})"
            points += [plots.Point(name, values["natural"], values[column])] if column in values else []
    return [point for point in points if point.robust > 1 or lowest < 10]


def _epochs_caption(run):
    own = "thin: the base learners' own models; " if run.config.evaluation.base_learners else ""
    return (
        f"{run.name}: theta_g on the {run.config.evaluation.select_on} images, natural (circles) and under attack "
        f"(squares); {own}dashed: each learner on its own training inputs, which for a robust learner are attacked; "
        "diamonds: base learners on the test images at the end, filled natural, hollow under attack; grey bands: "
        "theta_g was handed back to the learners."
    )


def _study_caption(study, split, name):
    of = f"{printable(study.results['run'], 80)}, {split} images: "
    if name == "over_gamma":
        return f"{of}accuracy over gamma with 95 % intervals."
    chosen = "; star: chosen on the validation images" if study.results["chosen"] else ""
    return f"{of}robust over natural accuracy of the mixtures; filled points are Pareto-optimal{chosen}."
