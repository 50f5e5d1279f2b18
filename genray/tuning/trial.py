"""One trial: a whole run, in the placement group that Tune reserved for it."""

import json

from ray import tune

from genray.config import load_stored_config
from genray.recording import RunFolder
from genray.storage import Storage
from genray.tuning.grid import stated_trials


def run_trial(tuned, *, configs, storage, runtime, train, evaluate, judged_by):
    """The function that Tune calls in a process of its own.

    A run folder that is there already is gone on with: a finished one is only reported, an unfinished one continues
    from its newest checkpoint. Its epochs are reported again, so that a scheduler decides as it did before.

    Args:
        tuned: {"point": {"trial": name, ...}}, what Tune varies.
        configs: name -> plain configuration, of a grid that states its trials.
        storage: folder or URI of the runs.
        runtime: as in `genray.train`.
        train, evaluate: `genray.train` and what judges a run folder: (its `Storage`, config, arguments) -> metrics.
        judged_by: arguments of the evaluation of a finished run, or {}.
    """
    name = tuned["point"]["trial"]
    config = load_stored_config(configs.get(name) or stated_trials(Storage(storage))[name]["config"])
    folder = RunFolder(storage, config.name)
    report = _Reporter()
    for record in folder.read_metrics():
        report(record)
    if not folder.is_complete(config):
        train(config, runtime=runtime, storage=storage, resume=True, on_epoch=report)
    results = json.loads(folder.storage.read("results.json"))
    final = {f"test_{name}": record["value"] for name, record in results["models"]["global"].items()}
    if judged_by:
        final |= evaluate(folder.storage, config, judged_by)
    report.finished(final)


class _Reporter:
    """Tells Tune of every evaluated epoch once."""

    def __init__(self):
        self.last = {"epoch": 0}

    def __call__(self, record):
        if record["global"] is None or record["epoch"] <= self.last["epoch"]:
            return
        rates = record["global"]
        losses = {f"loss_{name}": learner["loss"] for name, learner in record["learners"].items()}
        self.last = {"epoch": record["epoch"], "step": record["step"], "score": sum(rates.values()), **rates, **losses}
        tune.report(self.last | {"finished": False})

    def finished(self, final):
        tune.report(self.last | final | {"finished": True})
