"""Results as text."""


def results_table(results: dict) -> str:
    """The final table: one row a model, accuracies in per cent with 95 % intervals.

    Args:
        results: the record of `results.json`.
    """
    protocol, models = results["protocol"], results["models"]
    attacks = list(next(iter(models.values())))
    heads = ["model", *(head_text(attack, protocol) for attack in attacks)]
    rows = [[model_name(name, results), *(_cell(record[a]) for a in attacks)] for name, record in models.items()]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [heads, *rows]]
    lines.insert(1, "-" * len(max(lines, key=len)))
    lines.append(f"{protocol['examples']} test images; accuracy in % with its {protocol['interval']} interval")
    lines += extra_lines(protocol.get("extra"))
    if protocol["selected_on"] == "test":
        lines.append("NOTE: the checkpoint was chosen on the test images (evaluation.select_on: test)")
    return "\n".join(lines)


def extra_lines(extra: dict | None) -> list[str]:
    """`RunSetup.extra` in words."""
    if not extra:
        return []
    share = f", {100 * extra['batch_share']:g} % of each batch" if extra["batch_share"] else ""
    return [
        f"extra images: {extra['examples']} of {extra['source']}, {extra['pseudo_labelled']} pseudo-labelled{share}"
    ]


def head_text(attack, protocol):
    if attack in ("natural", "union"):
        return attack
    ball = protocol.get("other_norms", {}).get(attack, protocol)
    return f"{attack.removesuffix('_' + ball['norm'])} {ball['threat_model']}"


def model_name(name, results):
    if name == "global":
        return f"theta_g, epoch {results['best_epoch']} (best on {results['protocol']['selected_on']})"
    return "theta_g, last epoch" if name == "global_last" else f"base learner {name}"


def _cell(record):
    return f"{100 * record['value']:6.2f}  [{100 * record['low']:.1f}, {100 * record['high']:.1f}]"
