"""Results as a table."""

from dataclasses import replace

from genray.tables import Table, TableRow, accuracy_cell, as_text


def results_table(results: dict) -> str:
    """The final table as text, without its title; `results` is the record of `results.json`."""
    return as_text(replace(table_of(results), title=""), intervals=True, notes=True)


def table_of(results: dict) -> Table:
    """The final table: one row a model, accuracies in per cent with 95 % intervals."""
    protocol, models = results["protocol"], results["models"]
    attacks = list(dict.fromkeys(name for by_attack in models.values() for name in by_attack))
    notes = [f"{protocol['examples']} test images; accuracy in % with its 95 % Wilson interval"]
    notes += extra_lines(protocol.get("extra"))
    if protocol["selected_on"] == "test":
        notes.append("NOTE: the checkpoint was chosen on the test images (evaluation.select_on: test)")
    rows = [
        TableRow((_model_name(name, results),), tuple(accuracy_cell(record.get(a)) for a in attacks))
        for name, record in models.items()
    ]
    heads = tuple(_head(attack, protocol) for attack in attacks)
    title = f"{results.get('folder', 'results')}: accuracy in %"
    return Table("results", title, ("model",), heads, tuple(rows), tuple(notes))


def extra_lines(extra: dict | None) -> list[str]:
    """`RunSetup.extra` in words."""
    if not extra:
        return []
    share = f", {100 * extra['batch_share']:g} % of each batch" if extra["batch_share"] else ""
    return [
        f"extra images: {extra['examples']} of {extra['source']}, {extra['pseudo_labelled']} pseudo-labelled{share}"
    ]


def _head(attack, protocol):
    if attack in ("natural", "union"):
        return attack
    ball = protocol.get("other_norms", {}).get(attack, protocol)
    return f"{attack.removesuffix('_' + ball['norm'])} {ball.get('threat_model') or ball['norm']}"


def _model_name(name, results):
    if name == "global":
        return f"theta_g, epoch {results['best_epoch']} (best on {results['protocol']['selected_on']})"
    return "theta_g, last epoch" if name == "global_last" else f"base learner {name}"
