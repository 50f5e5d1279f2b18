"""The model card of an exported model, `README.md`, written from the records of its run and of its evaluations."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from genray import records
from genray.storage import Storage

CARD = "README.md"


def model_card(model: Storage, metadata: Mapping[str, Any], place: str) -> str:
    """Returns the card as Markdown.

    Args:
        model: the model file; records are looked for beside it, as in a run folder.
        metadata: of the model file.
        place: what `load_model` is given.

    Raises:
        Damaged: a record is not valid.
    """
    name, data = metadata.get("run") or "model", (metadata.get("data") or {}).get("source")
    architecture = metadata["architecture"]
    head = {"library_name": "genray", "pipeline_tag": "image-classification", "tags": ["adversarial-robustness"]}
    threats = [f"{threat['norm']} {threat['epsilon']}" for threat in metadata.get("threat_models", [])]
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name}\n",
        f"An image classifier trained with genray{f' on {data}' if data else ''}; "
        f"architecture `{architecture['name']}`, {architecture['num_classes']} classes, images of shape "
        f"{_shape(architecture)} in [0, 1], normalised inside.\n",
        f"Threat models of its training and choice: {', '.join(dict.fromkeys(threats)) or 'not known'}.\n",
        f"```python\nimport genray\n\nmodel = genray.load_model({place!r})  # images -> logits\n```\n",
    ]
    run = model.parent
    return "\n".join([*lines, *_training(run, model.name), *_evaluations(run)]).rstrip() + "\n"


def _shape(architecture):
    return "x".join(str(side) for side in (architecture["in_channels"], *architecture["image_size"]))


def _training(run: Storage, model: str) -> Iterator[str]:
    """The run's own table; of theta_g's best epoch only, whose file is model.pt."""
    if model != "model.pt" or not run.is_file("results.json"):
        return
    found = records.read(records.RunResults, run, "results.json")
    protocol = found["protocol"]
    yield "## Accuracies of its run\n"
    yield (
        f"{protocol['attack']}; {protocol['threat_model']}, {protocol.get('num_steps', '')} steps, "
        f"{protocol['examples']} {protocol.get('split', 'test')} images, chosen on {protocol['selected_on']} images, "
        f"seed {found['seed']}, epoch {found['best_epoch']}.\n"
    )
    yield _table(found["models"]["global"].items())
    yield from _findings(found.get("warnings", ()), "Said while it was trained:")


def _evaluations(run: Storage) -> Iterator[str]:
    """One section an evaluation of the run, in `evaluation/` and `evaluations/<name>/`."""
    places = [run / "evaluation"] * run.is_folder("evaluation")
    if run.is_folder("evaluations"):
        places += [run / "evaluations" / name for name in (run / "evaluations").folders()]
    for place in places:
        if not place.is_file("results.json"):
            continue
        record = records.read(records.EvaluationRecord, place, "results.json")
        protocol = record["protocol"]
        yield f"## Evaluation {protocol['hash']}\n"
        balls = "; ".join(
            f"{threat['norm']} {threat['epsilon']}: {', '.join(attack['name'] for attack in threat['attacks'])}"
            for threat in protocol["threats"]
        )
        data = protocol["data"]
        yield (
            f"{data['examples']} images of {data['source']} {data.get('split') or ''}; "
            f"{balls}; seed {protocol['seed']}, engine {protocol['engine']}, protocol hash `{protocol['hash']}`.\n"
        )
        yield _table(_columns(record))
        found = [*record["findings"], *(line for norm in record["norms"].values() for line in norm["findings"])]
        yield from _findings(found, "Findings, reasons to distrust these numbers:")


def _columns(record) -> Iterator[tuple[str, dict]]:
    yield "natural", record["natural"]
    for ball, part in record["norms"].items():
        yield from ((f"{ball} {name}", accuracy) for name, accuracy in part["columns"].items())
        if part.get("union"):
            yield f"{ball} union", part["union"]
    if record.get("union"):
        yield "union", record["union"]


def _table(rows) -> str:
    lines = ["| accuracy under | % | 95 % interval | images |", "|---|---|---|---|"]
    for name, found in rows:
        value, low, high = (f"{100 * found[key]:.2f}" for key in ("value", "low", "high"))
        lines.append(f"| {name} | {value} | {low} to {high} | {found['examples']} |")
    return "\n".join(lines) + "\n"


def _findings(lines, title) -> Iterator[str]:
    if lines:
        yield "\n".join([title, "", *(f"- {line}" for line in dict.fromkeys(lines))]) + "\n"
