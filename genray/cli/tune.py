"""Compare whole runs: `python -m genray.tune GRID.yaml`, or `genray.tune(grid)`."""

import os
import sys
import time
from functools import partial
from importlib.util import find_spec

from genray.cli.parser import Parser, check_again
from genray.config.arguments import Count, Place, checked
from genray.errors import GenrayError, PlacementError, StorageError
from genray.runtime.ray.loopback import keep_on_loopback

DEFAULT_STORAGE = "runs"


@checked
def tune(
    grid: Place,
    overrides=(),
    *,
    address: str | None = None,
    storage: Place = DEFAULT_STORAGE,
    max_concurrent: Count | None = None,
    resume: bool = False,
    overwrite: bool = False,
):
    """Runs every trial of a grid to its end and writes their table.

    Args:
        grid: path of a grid file.
        overrides: for every trial: "key=value" strings, or a mapping with nested or dotted keys.
        address: Ray cluster to join, "auto" or "host:port"; None starts a private Ray on this machine.
        storage: folder or URI that holds the grid's folder; every node has to see it.
        max_concurrent: at most so many trials at once; None for as many as fit.
        resume: go on with a grid of this name: what is finished is not done again.
        overwrite: begin a grid of this name anew; its trials' runs are removed once the new ones can start.

    Returns:
        The `Trials`: one row a trial.

    Raises:
        InputError: the grid, a configuration, the storage or the cluster is wrong; no trial was started.
        GenrayError: trials failed; the others' table is written.
    """
    from genray.tuning.grid import load_grid

    return _run_all(load_grid(grid, overrides), storage, address, max_concurrent, resume, overwrite)


def _run_all(grid, storage, address, max_concurrent, resume, overwrite=False, debug=False, say=lambda text: None):
    """As `tune`, of a grid that was read; `say` is called with the plan before the first trial starts."""
    check_again(resume, overwrite)
    _require_ray()
    from genray.tuning.run import begin_folder, check_folder, check_room, run_grid

    place = check_folder(grid, storage, resume, overwrite)  # before the data are read
    needs, widest = _needs(grid, address)
    from genray.cli.train import train
    from genray.reporting.trials import markdown
    from genray.runtime.ray.cluster import connected, node_resources

    with connected(address, num_cpus=widest):
        say(plan_text(needs, node_resources(), None if address else os.cpu_count(), max_concurrent))
        check_room(needs, bool(address))
        folder = begin_folder(grid, place, overwrite)
        options = {"max_concurrent": max_concurrent, "debug": debug}
        try:
            outcome = run_grid(needs, folder, train=train, evaluate=judge, **options)
        finally:
            trials, unwritten = _report(folder)
    _check_ended(outcome, grid.size)
    if unwritten:
        print(markdown(trials))
        raise unwritten
    return trials


def _check_ended(outcome, size):
    """Raises what a grid has to say that left trials without a result."""
    if outcome.failed:
        name, reason = next(iter(outcome.failed.items()))
        raise GenrayError(
            f"{len(outcome.failed)} of {size} trials failed, first {name}: {reason}; --resume tries again"
        )
    if not outcome.finished:
        ends = "; ".join(f"{name} was stopped at epoch {epoch}" for name, epoch in list(outcome.stopped.items())[:3])
        raise GenrayError(f"none of {size} trials was finished, so that there is no result: {ends or 'none began'}")


def _require_ray():
    if find_spec("ray") is None:
        raise PlacementError("genray.tune: ray is not installed; pip install 'ray[train,tune]'")


def _needs(grid, address):
    """(what the trials need, CPUs of the widest one), checked as far as it goes without a cluster."""
    _require_ray()
    from genray.tuning.checks import check_private
    from genray.tuning.loggers import check_loggers
    from genray.tuning.resources import Needs
    from genray.tuning.search import check_searcher

    check_loggers(grid)
    check_searcher(grid)
    needs = Needs(grid)
    if not address:
        check_private(needs, os.cpu_count() or 1)
    return needs, max(sum(bundle.get("CPU", 0) for bundle in trial) for trial in needs.bundles(0).values())


def judge(folder, config, arguments: dict) -> dict:
    """Evaluates a finished run as the grid's `evaluate` section says, into `evaluation/` in its folder.

    Args:
        folder: the run's `Storage`.
        config: the run's.
        arguments: of `genray.evaluate`, and `examples`.

    Returns:
        {"test_<norm>_<attack>": fraction, ...} for the scheduler's log.
    """
    from genray.cli.evaluate import evaluate
    from genray.data.datasets import load_image_data
    from genray.evaluation.sources import data_of
    from genray.interop.load import load_model

    arguments = dict(arguments)
    examples = arguments.pop("examples", None)
    attack = config.evaluation.attack
    arguments.setdefault("norms", [attack.norm])
    radii = {attack.norm: attack.epsilon} | (arguments.get("epsilon") or {})
    arguments["epsilon"] = {norm: radius for norm, radius in radii.items() if norm in arguments["norms"]}
    test = load_image_data(**data_of(config), decode=("test",)).test
    test = test if examples is None else test.first(examples, "evaluate.examples")
    data = {"source": config.data.source, "split": "test"}
    record = evaluate(
        load_model(folder), test.images, test.labels, output=folder / "evaluation", resume=True, data=data, **arguments
    )
    columns = [(norm, c, r["value"]) for norm, part in record["norms"].items() for c, r in part["columns"].items()]
    found = {f"test_{norm}_{column}": value for norm, column, value in columns}
    return found | ({"test_union": record["union"]["value"]} if record.get("union") else {})


def plan_text(needs, nodes: list[dict], cores: int | None, max_concurrent: int | None) -> str:
    """What will be run, before it is: trials, what each holds, how many at once and about how long it takes.

    Args:
        needs, nodes, cores, max_concurrent: as in `genray.tuning.resources.make_plan`; no nodes: of a cluster that is
            not looked at.
    """
    from genray.tuning.resources import make_plan, total

    grid = needs.grid
    lines = [f"grid           {grid.name}: {grid.size} trials{', suggested by Optuna' if grid.space else ''}"]
    wanted = needs.bundles(total(nodes).get("GPU", 0))
    for trial in grid.trials[:1] if grid.space else grid.trials:
        cpus, gpus = (total(wanted[trial.name]).get(kind, 0) for kind in ("CPU", "GPU"))
        who = "each" if grid.space else trial.name
        lines.append(f"trial          {who}: {cpus:g} CPU, {gpus:g} GPU, {trial.config.training.epochs} epochs")
    if not nodes:
        return "\n".join([*lines, "at once        as many as the cluster holds"])
    plan = make_plan(needs, nodes, cores, max_concurrent)
    where = f"on {len(nodes)} node{'s' * (len(nodes) > 1)}"
    lines.append(f"at once        {plan.at_once} {where}" if plan.at_once else f"at once        none yet {where}")
    return "\n".join([*lines, *_time_lines(plan)])


def _time_lines(plan):
    if plan.seconds is None:
        return ["time           not known before the first epochs are done; then it is shown"]
    lines = [
        f"time           about {_duration(plan.seconds)} of computing, at the pace of a training step measured on this "
        "machine just now; starting the processes of a trial adds some seconds"
    ]
    return lines + [f"               and at most {_duration(plan.judging_s)} for `evaluate`"] * bool(plan.judging_s)


def _duration(seconds):
    if seconds < 1:
        return "a second"
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * size or unit == "h":
            return f"{seconds / size:.2g} {unit}"


def main(args):
    if not args.address:
        keep_on_loopback()
    from genray.reporting.trials import markdown
    from genray.storage import Storage
    from genray.tuning.grid import load_grid

    grid = load_grid(args.grid, args.overrides)
    folder = Storage(args.storage) / grid.name
    if args.report:
        _, unwritten = _report(folder)
        if unwritten:
            raise unwritten
        return
    if args.dry_run:
        print(_dry_run(grid, args.address, args.max_concurrent))
        return
    began = time.perf_counter()
    options = {"overwrite": args.overwrite, "debug": args.debug, "say": partial(print, flush=True)}
    trials = _run_all(grid, args.storage, args.address, args.max_concurrent, args.resume, **options)
    print(markdown(trials))
    print(f"{time.perf_counter() - began:.0f} s; everything is in {folder}")


def _dry_run(grid, address, max_concurrent):
    """The plan on this machine, as a Ray of our own would have it; a cluster is not joined."""
    needs, widest = _needs(grid, address)
    if address:
        return plan_text(needs, [], None, max_concurrent)
    import torch

    node = {"CPU": max(widest, os.cpu_count() or 1), "GPU": torch.cuda.device_count(), "memory": float("inf")}
    return plan_text(needs, [node], os.cpu_count() or 1, max_concurrent)


def _report(folder):
    """Writes the tables, and the plots where matplotlib is.

    Returns:
        (the `Trials`, a `StorageError` that lists the files that could not be written, or None).
    """
    from genray.errors import ConfigError
    from genray.recording.writer import write_all
    from genray.reporting.plots import heat_map, trials_scatter
    from genray.reporting.trials import files_of, read_trials
    from genray.storage import Storage

    trials = read_trials(folder)
    files = files_of(trials, folder)
    try:
        if trials.measures:
            files["scatter.png"] = trials_scatter(trials)["png"]
        for measure in trials.measures:
            files[f"heat_{measure.replace('/', '_')}.png"] = heat_map(trials, measure)["png"]
    except ConfigError as error:
        print(f"note: {error}", file=sys.stderr)
    try:
        write_all(Storage(folder), files)
    except StorageError as error:
        return trials, StorageError(f"{error}; --report writes them again")
    return trials, None


def parse_args(argv):
    parser = Parser(prog="genray.tune", description=__doc__)
    parser.add_argument("grid", metavar="GRID.yaml", help="which runs to compare: configs/ablations, configs/paper")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a field of every run: data.path=/data/mnist")
    parser.add_argument("--address", metavar="auto|HOST:PORT", help="join this Ray cluster (default: a private one)")
    parser.add_argument("--max-concurrent", type=int, metavar="N", help="at most N trials at once (default: what fits)")
    parser.add_argument("--storage", default=DEFAULT_STORAGE, metavar="URI", help="folder of the grid's folder")
    parser.add_argument("--resume", action="store_true", help="go on; what is finished is not done again")
    parser.add_argument("--overwrite", action="store_true", help="begin a grid of this name anew; its runs are removed")
    parser.add_argument("--report", action="store_true", help="only write the tables and plots of what is there")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args(argv)
    if args.max_concurrent is not None and args.max_concurrent < 1:
        parser.error(f"--max-concurrent: expected at least 1, got {args.max_concurrent}")
    return args
