"""One trial: a whole run, in the placement group that Tune reserved for it."""

from ray import tune

from genray import records
from genray.config import load_config
from genray.data.datasets import load_image_data
from genray.evaluation.sources import data_of
from genray.interop.load import load_model
from genray.recording import RunFolder
from genray.recording.trackers import final_scalars, scalars
from genray.run.devices import local_device
from genray.storage import Storage
from genray.tuning.grid import stated_trials


def run_trial(tuned, *, configs, storage, runtime, train, evaluate, judged_by):
    """Runs one trial; Tune calls this function in a separate process.

    An existing run is resumed: a finished one is only reported, an unfinished one continues from its newest
    checkpoint. Its epochs are reported again, so that a scheduler decides as before.

    Args:
        tuned: {"point": {"trial": name, ...}}, the point that Tune sets.
        configs: name -> plain configuration; empty in a search.
        storage: folder or URI of the runs.
        runtime: as in `genray.train`.
        train, evaluate: `genray.train` and `genray.evaluate`.
        judged_by: arguments of `genray.evaluate` for a finished run, and `examples`; {} for no evaluation.
    """
    name = tuned["point"]["trial"]
    config = load_config(configs.get(name) or stated_trials(Storage(storage))[name]["config"])
    # The grid's command sends trials to trackers: nodes need neither their packages nor their accounts.
    config = config.replace(loggers=tuple(kept for kept in config.loggers if kept == "tensorboard"))
    folder = RunFolder(storage, config.name)
    report = _Reporter()
    for record in folder.read_metrics():
        report(record)
    if not folder.is_complete(config):
        train(config, runtime=runtime, storage=storage, resume=True, on_epoch=report)
    results = records.read(records.RunResults, folder.storage, "results.json")
    final = final_scalars(results)
    if judged_by:
        device = local_device(config) if runtime == "local" else "cpu"  # else the trial's own process has no GPU
        final |= _judged(folder.storage, config, judged_by, evaluate, device)
    report.finished(final)


def _judged(folder, config, arguments, evaluate, device):
    """Evaluates a finished run into `evaluation/` in its folder; {"test_<norm>_<attack>": fraction}."""
    arguments = dict(arguments)
    examples = arguments.pop("examples", None)
    attack = config.evaluation.attack
    arguments.setdefault("norms", [attack.norm])
    radii = {attack.norm: attack.epsilon} | (arguments.get("epsilon") or {})
    arguments["epsilon"] = {norm: radius for norm, radius in radii.items() if norm in arguments["norms"]}
    test = load_image_data(**data_of(config), decode=("test",)).test
    test = test if examples is None else test.first(examples, "evaluate.examples")
    data = {"source": config.data.source, "split": "test"}
    # Trusted: who started the grid has let its driver import what the configuration names.
    model = load_model(folder, trust=True).to(device)
    record = evaluate(model, *test.take(), output=folder / "evaluation", resume=True, data=data, **arguments)
    columns = [(norm, c, r["value"]) for norm, part in record["norms"].items() for c, r in part["columns"].items()]
    found = {f"test_{norm}_{column}": value for norm, column, value in columns}
    return found | ({"test_union": record["union"]["value"]} if record.get("union") else {})


class _Reporter:
    """Reports every evaluated epoch to Tune once."""

    def __init__(self):
        self.last = {"epoch": 0}

    def __call__(self, record):
        if record["global"] is None or record["epoch"] <= self.last["epoch"]:
            return
        rates = record["global"]
        losses = {f"loss_{name}": learner["loss"] for name, learner in record["learners"].items()}
        self.last = {"epoch": record["epoch"], "step": record["step"], "score": sum(rates.values()), **rates, **losses}
        tune.report(self.last | {"finished": False, "scalars": scalars(record)})

    def finished(self, final):
        tune.report(self.last | final | {"finished": True})
