"""A run from its configuration to its record, on either runtime."""

import os
from dataclasses import replace

from genray.config import listed_overrides, load_run, to_yaml
from genray.config.arguments import check_again
from genray.core.user_code import allow_typed, name_of, named, only_here
from genray.errors import PlacementError
from genray.models import count_parameters
from genray.recording import Progress, RunFolder, RunRecorder
from genray.recording.dry_run import measured_lines, plan_text
from genray.recording.trackers import check_trackers
from genray.run.allocation import plan_lines
from genray.run.devices import alone_lines, local_device
from genray.run.initial_weights import InitialWeights
from genray.run.setup import prepare
from genray.runtime.local import run_local

COLUMNS = ("image_column", "label_column")


@only_here()
def train_run(
    config,
    overrides=(),
    *,
    runtime,
    address,
    storage,
    name=None,
    resume=False,
    overwrite=False,
    network=None,
    train=None,
    test=None,
    on_epoch=None,
) -> dict:
    """As `genray.train`, which describes and checks the arguments."""
    check_again(resume, overwrite)
    arrays = None if train is None and test is None else {"train": train, "test": test}
    loaded, progress = _loaded(config, overrides, name, network, arrays), Progress()
    check_trackers(loaded.config.loggers)
    folder = RunFolder(storage, loaded.config.name)
    finished = folder.finished(loaded.config, _unsettled(loaded)) if resume else None
    if finished:
        return finished
    folder.storage.check_writable()
    with folder.lock():
        try:
            state = _starting_state(folder, loaded, resume, overwrite, progress)
            # Ray's object store holds a second copy of the images.
            given = {"network": network, "arrays": arrays, "stored": InitialWeights.of_checkpoint(state)}
            setup = _prepared(loaded, copies=2 if runtime == "ray" else 1, progress=progress, **given)
            if resume and folder.storage.exists("config.yaml"):
                folder.check_data(setup.identity)
                folder.check_resumable(setup.config)
            recorder = RunRecorder(setup, folder, progress, state, on_epoch)
            try:
                return _run(recorder, progress, runtime, address)
            except BaseException:
                recorder.save()  # the last checkpoint is written before any error leaves
                raise
        finally:
            progress.close()


def dry_run(config, overrides, name, runtime, address) -> str:
    """The resolved configuration and the plan as text; starts nothing and writes nothing."""
    loaded = _loaded(config, overrides, name)
    check_trackers(loaded.config.loggers)
    setup = _prepared(loaded, decode=False)
    if runtime == "local":
        places = [f"all learners in this process, one after another, on {local_device(setup.config)}"]
        places += alone_lines(setup.config)
    else:
        where = address or "a private Ray on this machine"
        places = [f"{where}: one actor a learner"]
        places += [f"{n}: {_wants(learner)}" for n, learner in setup.config.base_learners.items()]
        places += ["global learner: memory only", "evaluator: a spare device, else a fraction of the natural learner's"]
        places += plan_lines(setup.plan)
    parameters, measured = count_parameters(setup.build_network()), measured_lines(setup, runtime)
    text = plan_text(setup, parameters=parameters, places=places, measured=measured)
    return f"{to_yaml(setup.config)}\n{text}"


def _wants(learner):
    resources, several = learner.resources, f"{learner.workers} x " if learner.workers != 1 else ""
    gpus = resources.num_gpus if resources.num_gpus == "auto" else f"{resources.num_gpus:g}"
    kind = f" {resources.accelerator_type}" if resources.accelerator_type else ""
    labels = "".join(f", {key}: {value}" for key, value in resources.label_selector.items())
    return f"{several}{resources.num_cpus:g} CPU, {gpus} GPU{kind}{labels}"


def _loaded(config, overrides, name, network=None, arrays=None):
    own = [{"name": name}] if name is not None else []
    if network is not None:
        own.append({"model": {"name": name_of(network), "width": None, "batch_norm": False, "activation": "relu"}})
    if arrays is not None:
        own.append({"data": {"source": "arrays", "path": None, "image_column": None, "label_column": None}})
    given = [named(override) for override in listed_overrides(overrides)]
    loaded = load_run(named(config), [*given, *own])
    from_file = config is None or isinstance(config, (str, os.PathLike))
    allow_typed(given if from_file else (given, config))
    return loaded


def _prepared(loaded, progress=None, **how):
    for note in loaded.notes if progress else ():
        progress.say(f"note: {note}")
    setup = prepare(loaded.config, loaded.follows, progress=progress, **how)
    return replace(setup, notes=(*loaded.notes, *setup.notes))


def _unsettled(loaded):
    """Fields whose values follow from the data; the configuration of an unfinished run has them."""
    columns = {f"data.{name}" for name in COLUMNS if getattr(loaded.config.data, name) is None}
    model = loaded.config.model
    of_weights = {"model.mean", "model.std"} if model.weights is not None and model.mean is None else set()
    return loaded.follows | columns | of_weights


def _starting_state(folder, loaded, resume, overwrite, progress):
    """The checkpoint to resume from; None for a new run. Refuses the folder of another run before loading data."""
    if not resume:
        folder.check_free(overwrite)
        return None
    if not folder.storage.exists("config.yaml"):
        return None
    folder.check_resumable(loaded.config, _unsettled(loaded))
    return folder.read_newest_state(progress.say)


def _run(recorder, progress, runtime, address):
    if runtime == "local":
        return run_local(recorder, progress)
    try:
        from genray.runtime.ray.driver import run_on_ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        reason = "ray is not installed; pip install 'ray[train,tune]', or --runtime local"
        raise PlacementError(f"--runtime ray: {reason}") from None
    return run_on_ray(recorder, progress, address)
