"""Comparisons of accuracies of one data set, network and threat model, measured in the same way."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction
from os.path import commonprefix

from genray.config import RunConfig, to_dict
from genray.evaluation.engines import not_by_the_package
from genray.evaluation.published import TABLES, in_the_tables_ball, row_of_run
from genray.evaluation.record import largest_balls, parts_of
from genray.reporting.found import Evaluation, Found, Run
from genray.reporting.paper import paper_table
from genray.reporting.trials import data_name
from genray.tables import DIFFERENCE, HEADS, PUBLISHED, Cell, Table, TableRow, cell_of, head_of, printable
from genray.types import NORMS

NETWORKS = {"resnet18": "ResNet-18", "preact_resnet18": "PreActResNet-18", "small_cnn": "SmallCNN"}
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "mnist": 10_000, "svhn": 26_032}
FORMATS = ("parquet", "image_folder", "arrays")  # what data are called whose folder is not known
SHORT = 6  # digits of a fingerprint that tell data of one name apart
AT_THE_END, EVALUATED = "at the end of training", "genray.evaluate"
SEVERAL = "several norms"


@dataclass(frozen=True)
class Setting:
    """The conditions under which two accuracies are comparable.

    Attributes:
        data, network: names of the data set and the architecture.
        norm, epsilon, decimal: the ball; epsilon exact, as text. Where norm is `SEVERAL`, epsilon names all balls.
        examples: test images.
        how: `AT_THE_END` (the run's own attack) or `EVALUATED`.
        fingerprint: of the test images; None in older records.
    """

    data: str
    network: str
    norm: str
    epsilon: str
    decimal: float
    examples: int
    how: str
    fingerprint: str | None = None

    @property
    def threat(self) -> str:
        if self.norm == SEVERAL:
            return self.epsilon
        same = self.epsilon == f"{self.decimal:.6g}"
        return f"{self.norm} {self.epsilon}" + ("" if same else f" ({self.decimal:.6g})")

    def __str__(self):
        return f"{self.network} on {self.data}, {self.threat}, {self.examples} test images, {self.how}"


@dataclass(frozen=True)
class ComparisonRow:
    """One model's accuracies in a setting: column -> record with value, low, high.

    Attributes:
        owner: path of the run that was evaluated; None for the run's own table and for other models.
    """

    label: str
    path: str
    seed: int | None
    config: RunConfig | None
    values: dict
    findings: tuple[str, ...]
    selected_on: str | None
    facts: tuple[str, ...]
    owner: str | None = None


@dataclass(frozen=True)
class ComparisonGroup:
    """Entries with equal configurations except for the seed.

    Attributes:
        label: of the row.
        entries: one a seed.
    """

    label: str
    entries: list[ComparisonRow]

    def mean(self, column: str) -> float | None:
        values = self._values(column)
        return statistics.fmean(values) if values else None

    def spread(self, column: str) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        values = self._values(column)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, column):
        return [entry.values[column]["value"] for entry in self.entries if column in entry.values]

    def cell(self, column: str) -> Cell:
        mean = self.mean(column)
        if mean is None:
            return Cell()
        record = self.entries[0].values.get(column)
        alone = len(self.entries) == 1
        return cell_of(mean, self.spread(column), *((record["low"], record["high"]) if alone else ()))


@dataclass
class Comparison:
    """A setting and the groups of entries in it."""

    setting: Setting
    groups: list[ComparisonGroup] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        there = {column for group in self.groups for entry in group.entries for column in entry.values}
        known = [column for column in (*HEADS, *NORMS) if column in there]
        return known + sorted(there - set(known) - {"union"}) + ["union"] * ("union" in there)

    @property
    def robust_columns(self) -> list[str]:
        """The robust columns of natural/robust plots: the union of several norms; of one norm AutoAttack (or the last
        attack) and PGD-20."""
        if self.setting.norm == SEVERAL:
            return ["union"]
        attacks = [column for column in self.columns if column not in ("natural", "union")]
        wanted = ("aa" if "aa" in attacks else next(reversed(attacks), ""), "pgd20")
        return [column for column in dict.fromkeys(wanted) if column in attacks]

    @property
    def published(self) -> list:
        """Published tables of the same data, within the same ball."""
        setting = self.setting
        if setting.norm == SEVERAL or not in_the_tables_ball(setting.data, setting.norm, Fraction(setting.epsilon)):
            return []
        return [table for table in TABLES if table.comparable and table.data == setting.data]


def comparisons(found: Found) -> list[Comparison]:
    """Returns all comparisons of the found results; adds a problem to `found` for each run that is there twice."""
    sorted_in, listed = defaultdict(list), [*_of_evaluations(found), *_of_runs(found)]
    data_of = _by_images([setting for setting, _ in listed])
    for setting, entry in listed:
        data, mark = data_of[setting]
        entries = sorted_in[replace(setting, data=data, fingerprint=mark)]
        if not _joined(entries, entry):
            entries.append(entry)
    made = [Comparison(setting, _groups(entries, found)) for setting, entries in sorted_in.items()]
    return sorted(
        made,
        key=lambda comparison: (comparison.setting.how == AT_THE_END, comparison.setting.data, comparison.setting.norm),
    )


def _joined(entries, entry) -> bool:
    """Puts the columns of another evaluation of the same run beside those that are there, where the numbers of columns
    that both have are equal; whether that was done."""
    for place, other in enumerate(entries):
        theirs, ours = dict(other.values), dict(entry.values)
        if {*theirs} - {*ours} and {*ours} - {*theirs}:  # a union is of the attacks of one of them only
            theirs.pop("union", None), ours.pop("union", None)
        same = all(ours[column] == theirs[column] for column in ours if column in theirs)
        if same and entry.owner is not None and entry.owner == other.owner:
            facts, findings = (
                tuple(dict.fromkeys(getattr(other, k) + getattr(entry, k))) for k in ("facts", "findings")
            )
            entries[place] = replace(other, values=theirs | ours, facts=facts, findings=findings)
            return True
    return False


def _by_images(settings):
    """Setting -> what its images are called, and their fingerprint.

    Equal fingerprints are the same images, whatever their folders are called; images of one name with different ones
    are different. A record without one is of the images of its name, where there are no two kinds of these.
    """
    marks, names = defaultdict(dict), defaultdict(dict)
    for setting in settings:
        if setting.fingerprint:
            marks[setting.data, setting.examples][setting.fingerprint] = None
            known = setting.data in TEST_IMAGES  # a data set's own name says more than a folder's
            names[setting.fingerprint][not known, setting.data in FORMATS, setting.data] = setting.data
    found = {}
    for setting in settings:
        of_name = list(marks[setting.data, setting.examples])
        mark = setting.fingerprint or (of_name[0] if len(of_name) == 1 else None)
        data = names[mark][min(names[mark])] if mark else setting.data
        several = len(marks[data, setting.examples]) > 1
        found[setting] = (f"{data} ({(mark or 'unknown')[:SHORT]})" if several else data), mark
    return found


def _of_runs(found):
    for run in found.runs:
        if run.results is None:
            continue
        protocol = run.results["protocol"]
        for *ball, values, fact in _at_the_end(run.results):
            data, network = data_name(vars(run.config.data)), network_name(run.config)
            setting = Setting(data, network, *ball, int(protocol["examples"]), AT_THE_END, protocol.get("fingerprint"))
            values = {"natural": run.results["models"]["global"]["natural"], **values}
            yield setting, ComparisonRow(run.name, run.path, run.config.seed, run.config, values, (),
                                 protocol["selected_on"], (fact,))  # fmt: skip


def _at_the_end(results):
    """norm, epsilon, decimal, accuracies under attack and how: of each norm, and of several together."""
    protocol, values = results["protocol"], dict(results["models"]["global"])
    others = protocol.get("other_norms", {})
    values.pop("natural")
    union = values.pop("union", None)
    first = {name: value for name, value in values.items() if name not in others}
    by_norm = {}
    for ball, of_norm in ((protocol, first), *((ball, {next(iter(first)): values[n]}) for n, ball in others.items())):
        steps = f", step size {ball['step_size']}" if "step_size" in ball else ""
        by_norm[ball["norm"]] = next(iter(of_norm.values()))
        yield ball["norm"], ball["epsilon"], float(ball["epsilon_decimal"]), of_norm, f"{protocol['attack']}{steps}"
    if others and union:
        balls = ", ".join(f"{ball['norm']} {ball['epsilon']}" for ball in (protocol, *others.values()))
        yield SEVERAL, balls, 0.0, {**by_norm, "union": union}, protocol["attack"]


def _of_evaluations(found):
    for evaluation in found.evaluations:
        run, label = owner_of(evaluation, found.runs)
        record, protocol = evaluation.record, evaluation.record["protocol"]
        data = data_name(vars(run.config.data)) if run else printable(protocol["data"]["source"])
        network = network_name(run.config) if run else "model of a file"
        of_run = (run.config.seed, run.config) if run else (None, None)
        selected = run.config.evaluation.select_on if run else None
        images = int(protocol["data"]["examples"]), EVALUATED, protocol["data"].get("fingerprint")
        for balls, values, findings, facts in _by_norm(record):
            setting = Setting(data, network, *balls, *images)
            values, findings = {"natural": record["natural"]} | values, (*findings, *record["findings"])
            owner = run.path if run else None
            yield setting, ComparisonRow(label, evaluation.path, *of_run, values, findings, selected, facts, owner)


def _by_norm(record):
    """(norm, epsilon, decimal), accuracies under attack, findings and facts: of each norm, and of several together."""
    protocol = record["protocol"]
    for _, threat, part in parts_of(record):
        values = {a["name"]: part["columns"][a["name"]] for a in threat["attacks"]}
        values |= {"union": part["union"]} if part.get("union") and len(values) > 1 else {}
        ball = threat["norm"], threat["epsilon"], float(threat["epsilon_decimal"])
        yield ball, values, part["findings"], _facts(protocol, [threat])
    if record.get("union"):
        largest = largest_balls(record)
        balls = ", ".join(f"{threat['norm']} {threat['epsilon']}" for _, threat, _ in largest)
        unions = {threat["norm"]: part["union"] for _, threat, part in largest if part.get("union")}
        findings = [finding for *_, part in largest for finding in part["findings"]]
        facts = _facts(protocol, [threat for _, threat, _ in largest])
        yield (SEVERAL, balls, 0.0), {**unions, "union": record["union"]}, findings, facts


def _facts(protocol, threats):
    notes = dict.fromkeys(note for threat in threats for attack in threat["attacks"] for note in attack["notes"])
    notes |= dict.fromkeys(note for threat in threats if (note := not_by_the_package(protocol, threat)))
    return (f"protocol {protocol['hash']}, engine {protocol['engine']}, attack seed {protocol['seed']}", *notes)


def owner_of(evaluation: Evaluation, runs: list[Run]) -> tuple[Run | None, str]:
    """Returns the run of the evaluated theta_g, or None if it is not known, and the label of the model."""
    owner = evaluation.owner
    below = evaluation.place.root.removeprefix(f"{owner.place.root}/").partition("/")[0] if owner else ""
    if below in ("evaluation", "evaluations"):
        return owner, owner.name
    for run in [owner] if owner else runs:
        if fingerprint_of(run) == evaluation.model:
            return run, run.name
    place = evaluation.place
    short = place.name if owner is None else place.root.removeprefix(f"{owner.place.root}/")
    name = printable(short.removesuffix(".eval"), 80)
    return None, f"{owner.name}: {name}" if owner else name


def fingerprint_of(run: Run) -> str | None:
    """Returns the fingerprint of the run's theta_g as in an evaluation; None if the model cannot be read."""
    from genray.interop.load import load_model
    from genray.recording.evaluation_folder import fingerprint

    try:
        model = load_model(run.place)
    except Exception:  # a damaged file of any kind: the evaluation is shown without its run
        return None
    return fingerprint(model.state_dict() | dict(model.named_buffers()))


def network_name(config: RunConfig) -> str:
    name = config.model.name
    text = NETWORKS.get(name, name.upper().replace("_", "-") if name.startswith("wrn") else name)
    return f"{text}, width {config.model.width}" if config.model.width else text


def _groups(entries, found):
    alike = defaultdict(list)
    for entry in entries:
        alike[_without_seed(entry)].append(entry)
    groups = []
    for members in alike.values():
        one_a_seed = {}
        for entry in members:
            if entry.seed in one_a_seed and entry.config is not None:
                reason = f"same configuration and seed as {one_a_seed[entry.seed].path}: counted once"
                if (entry.path, reason) not in found.problems:
                    found.problems.append((entry.path, reason))
            else:
                one_a_seed[entry.seed] = entry
        groups.append(ComparisonGroup(_common_label(list(one_a_seed.values())), list(one_a_seed.values())))
    return [replace(group, label=_told_apart(group, groups)) for group in groups]


def _told_apart(group, groups):
    """Its label, with its folder where another group is called the same."""
    same = sum(other.label == group.label for other in groups) > 1
    return f"{group.label} ({printable(group.entries[0].path, 80)})" if same else group.label


def _without_seed(entry):
    if entry.config is None:
        return entry.path
    plain = to_dict(entry.config)
    same = {
        key: value for key, value in plain.items() if key not in ("name", "seed", "device", "runtime", "checkpoint")
    }
    elsewhere = ("path", "download", "image_column", "label_column")  # other columns are other images or labels
    same["data"] = {key: value for key, value in same["data"].items() if key not in elsewhere}
    return json.dumps(same, sort_keys=True, default=str)


def _common_label(entries):
    labels = list(dict.fromkeys(entry.label for entry in entries))
    if len(labels) == 1:
        return labels[0]
    common = commonprefix(labels).rstrip("0123456789").rstrip(" _-.=")
    common = common.removesuffix("seed").rstrip(" _-.=")
    return common or f"{labels[0]} and {len(labels) - 1} more"


READING = (
    "accuracy of theta_g in %; best of a column in bold, second best underlined",
    "± standard deviation over seeds; of one seed its 95 % Wilson interval in brackets, which knows nothing of others",
)


# --- as a table -------------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison, number: int) -> Table:
    """Returns a table in the paper's layout: our rows, each with its difference from the published row if there is one,
    then the published table of the same data, ball and network."""
    columns = comparison.columns
    rows, matched = [], []
    for group in comparison.groups:
        seeds = len(group.entries)
        rows.append(TableRow((group.label, str(seeds)), tuple(map(group.cell, columns))))
        beside = _published_beside(group, comparison.setting)
        if beside:
            matched.append(beside["row"])
            rows += _beside(group, beside, columns)
    for table in _same_network(comparison):
        published = paper_table(table)
        by_head = [dict(zip(published.heads, row.cells)) for row in published.rows]
        for row, cells in zip(published.rows, by_head):
            found = tuple(cells.get(head_of(column), Cell()) for column in columns)
            rows.append(TableRow((f"published {row.labels[0]}", ""), found, PUBLISHED))
    heads = tuple(map(head_of, columns))
    table = Table(f"table_{number}", str(comparison.setting), ("model", "seeds"), heads, tuple(rows))
    return Table(**{**vars(table.ranked()), "notes": tuple(_notes(comparison, matched))})


def _published_beside(group, setting):
    config = group.entries[0].config
    return config and setting.norm != SEVERAL and row_of_run(config, setting.norm, Fraction(setting.epsilon))


def _beside(group, published, columns):
    values, name = published["values"], published["row"].removeprefix("published ")
    there = [column for column in columns if column in values and group.mean(column) is not None]
    differences = {column: 100 * group.mean(column) - values[column] for column in there}
    cells = tuple(Cell(f"{differences[c]:+.2f}") if c in differences else Cell() for c in columns)
    return [TableRow((f"{group.label} minus published {name}", ""), cells, DIFFERENCE)] if there else []


def _same_network(comparison):
    return [table for table in comparison.published if table.network.lower() == comparison.setting.network.lower()]


def _notes(comparison, matched):
    entries = [entry for group in comparison.groups for entry in group.entries]
    widest = max((r["high"] - r["low"]) / 2 for entry in entries for r in entry.values.values())
    yield f"with {comparison.setting.examples} test images a number is known to ±{100 * widest:.1f} points at worst"
    if "union" in comparison.columns:
        of = "in every norm" if comparison.setting.norm == SEVERAL else "of this table"
        yield f"union: classified correctly, and under every attack {of} too"
    yield from dict.fromkeys(fact for entry in entries for fact in entry.facts)
    on_test = [entry.label for entry in entries if entry.selected_on == "test"]
    if on_test:
        yield f"CAUTION: epoch chosen on the test images (evaluation.select_on: test): {', '.join(on_test)}"
    if any(entry.selected_on is None for entry in entries):
        yield "how a file's model was trained and chosen is not known here"
    if comparison.setting.how == EVALUATED and len({entry.facts[0] for entry in entries}) > 1:
        yield "CAUTION: not all rows have the same protocol; compare those with equal protocol only"
    findings = (
        f"{group.label}: {finding}" for group in comparison.groups for e in group.entries for finding in e.findings
    )
    yield from (f"CAUTION: {finding}" for finding in dict.fromkeys(findings))
    if matched or _same_network(comparison):
        yield "published: the best checkpoint was selected on the test set; ours was not, unless said otherwise"
        if comparison.setting.examples != TEST_IMAGES.get(comparison.setting.data):
            yield "CAUTION: published numbers are of all test images, ours are not"
