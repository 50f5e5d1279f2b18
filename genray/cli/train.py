"""Train Generalist: `python -m genray.train [--config FILE] [key=value ...]`, or `genray.train(config)`."""

from dataclasses import replace
from typing import Literal

from genray.cli.parser import Parser, check_again
from genray.config import listed_overrides, load_run, to_yaml
from genray.config.arguments import Place, checked
from genray.errors import PlacementError
from genray.runtime.ray.loopback import keep_on_loopback

DEFAULT_STORAGE = "runs"
COLUMNS = ("image_column", "label_column")


@checked
def train(
    config=None,
    overrides=(),
    *,
    runtime: Literal["ray", "local"] = "ray",
    address: str | None = None,
    name: str | None = None,
    storage: Place = DEFAULT_STORAGE,
    resume: bool = False,
    overwrite: bool = False,
    on_epoch=None,
) -> dict:
    """Trains one run to its end and returns its final record.

    Args:
        config: path of a YAML file, a mapping, a `RunConfig`, or None for the embedded digits run.
        overrides: "key=value" strings, or a mapping with nested or dotted keys.
        runtime: "ray" (one actor a learner) or "local" (one after another in this process, same bits on CPU).
        address: Ray cluster to join, "auto" or "host:port"; None starts a private Ray on this machine.
        name: run name, instead of the configuration's.
        storage: path or URI of the folder that holds the runs.
        resume: go on from the newest checkpoint of a run of this name; of a finished one, only its record is read.
        overwrite: begin a run of this name anew; the old one is removed once the new one can start.
        on_epoch: called with each epoch's record, as in `metrics.jsonl`; again for those that a recovery replays.

    Returns:
        The record of `results.json`: accuracies are fractions with 95 % Wilson intervals.

    Raises:
        InputError: configuration, data, folder or cluster are wrong; nothing was started.
        GenrayError: the run failed.
    """
    from genray.recording import Progress, RunFolder, RunRecorder

    check_again(resume, overwrite)
    loaded, progress = _loaded(config, overrides, name), Progress()
    folder = RunFolder(storage, loaded.config.name)
    finished = folder.finished(loaded.config, _unsettled(loaded)) if resume else None
    if finished:
        return finished
    folder.storage.check_writable()
    with folder.lock():
        try:
            state = _starting_state(folder, loaded, resume, overwrite, progress)
            # Ray's object store holds the images of a machine beside those of this process.
            setup = _prepared(loaded, copies=2 if runtime == "ray" else 1, progress=progress)
            if resume and folder.storage.exists("config.yaml"):
                folder.check_data(setup.identity)
                folder.check_resumable(setup.config)
            setup = _pseudo_labelled(setup, folder, progress, runtime, address)
            return _saved(RunRecorder(setup, folder, progress, state, on_epoch), progress, runtime, address)
        finally:
            progress.close()


def _saved(recorder, progress, runtime, address):
    """Runs; however that ends, the last checkpoint is written first."""
    try:
        return _run(recorder, progress, runtime, address)
    except BaseException:
        recorder.save()
        raise


def _loaded(config, overrides, name):
    return load_run(config, [*listed_overrides(overrides), *([{"name": name}] if name is not None else [])])


def _prepared(loaded, progress=None, **how):
    from genray.run.setup import prepare

    for note in loaded.notes if progress else ():
        progress.say(f"note: {note}")
    setup = prepare(loaded.config, loaded.follows, progress=progress, **how)
    return replace(setup, notes=(*loaded.notes, *setup.notes))


def _unsettled(loaded):
    """Fields that the data settle; an unfinished run has them in its configuration."""
    columns = {f"data.{name}" for name in COLUMNS if getattr(loaded.config.data, name) is None}
    return loaded.follows | columns


def _starting_state(folder, loaded, resume, overwrite, progress):
    """The checkpoint to go on from; None for a new run. A foreign folder is refused here, before the data is loaded."""
    if not resume:
        folder.check_free(overwrite)
        return None
    if not folder.storage.exists("config.yaml"):
        return None
    folder.check_resumable(loaded.config, _unsettled(loaded))
    return folder.read_newest_state(progress.say)


def _pseudo_labelled(setup, folder, progress, runtime, address):
    """The setup with pseudo-labels where the run trains on unlabelled images (`data.unlabeled`)."""
    from genray.recording.pseudo_labels import pseudo_labelled
    from genray.run.devices import local_device
    from genray.run.pseudo_labels import classify

    def train_teacher(config):
        train(config, runtime=runtime, address=address, storage=folder.storage.uri, resume=True)

    def classify_all(network, images, config):
        if runtime == "local" or address is None:
            return classify(network, images, config, local_device(config))
        from genray.runtime.ray.labelling import classify_on_cluster

        return classify_on_cluster(network, images, config, address)

    return pseudo_labelled(setup, folder, progress, train_teacher, classify_all)


def _run(recorder, progress, runtime, address):
    if runtime == "local":
        from genray.runtime.local import run_local

        return run_local(recorder, progress)
    try:
        from genray.runtime.ray.driver import run_on_ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        reason = "ray is not installed; pip install 'ray[train,tune]', or --runtime local"
        raise PlacementError(f"--runtime ray: {reason}") from None
    return run_on_ray(recorder, progress, address)


def dry_run(config, overrides, name, runtime, address) -> str:
    """The resolved configuration and the plan as text; starts nothing and writes nothing."""
    from genray.models import count_parameters
    from genray.recording.dry_run import plan_text
    from genray.run.allocation import plan_lines
    from genray.run.devices import alone_lines, local_device
    from genray.run.pseudo_labels import awaits_labels, load_teacher

    setup = _prepared(_loaded(config, overrides, name), decode=False)
    if awaits_labels(setup) and setup.config.data.unlabeled.teacher.path:
        load_teacher(setup)  # says what is wrong with it
    network = setup.build_network()
    if runtime == "local":
        places = [f"all learners in this process, one after another, on {local_device(setup.config)}"]
        places += alone_lines(setup.config)
    else:
        where = address or "a private Ray on this machine"
        places = [f"{where}: one actor a learner"]
        places += [f"{n}: {_wants(learner)}" for n, learner in setup.config.base_learners.items()]
        places += ["global learner: memory only", "evaluator: a spare device, else a share of the natural learner's"]
        places += plan_lines(setup.config)
    text = plan_text(setup, parameters=count_parameters(network), places=places)
    return f"{to_yaml(setup.config)}\n{text}"


def _wants(learner):
    resources, several = learner.resources, f"{learner.workers} x " if learner.workers != 1 else ""
    gpus = resources.num_gpus if resources.num_gpus == "auto" else f"{resources.num_gpus:g}"
    return f"{several}{resources.num_cpus:g} CPU, {gpus} GPU"


def main(args):
    overrides = [*args.overrides, *args.set]
    if args.dry_run:
        print(dry_run(args.config, overrides, args.name, args.runtime, args.address))
        return
    if args.runtime == "ray" and not args.address:
        keep_on_loopback()
    results = train(
        args.config,
        overrides,
        runtime=args.runtime,
        address=args.address,
        name=args.name,
        storage=args.storage,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    from genray.recording.table import results_table

    print(results_table(results))
    print(f"{results['wall_s']:g} s of training and evaluation; everything is in {results['folder']}")


def parse_args(argv):
    parser = Parser(prog="genray.train", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="[FILE] key=value", help="a YAML file; fields to override: training.epochs=10"
    )
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="the same as key=value")
    parser.add_argument("--config", metavar="FILE", help="a YAML file; without it, the embedded digits run")
    parser.add_argument("--runtime", choices=["ray", "local"], default="ray", help="default: ray")
    parser.add_argument("--address", metavar="auto|HOST:PORT", help="join this Ray cluster (default: a private one)")
    parser.add_argument("--name", help="run name, instead of the configuration's")
    parser.add_argument(
        "--storage", default=DEFAULT_STORAGE, metavar="URI", help="folder of the runs, local or s3://..."
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this name")
    parser.add_argument(
        "--overwrite", action="store_true", help="begin a run of this name anew; the old one is removed"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, start nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and args.overrides and args.overrides[0].endswith((".yaml", ".yml")):
        args.config = args.overrides.pop(0)  # named bare, as in tune and evaluate
    if args.runtime == "local" and args.address:
        parser.error("--address is for --runtime ray")
    return args
