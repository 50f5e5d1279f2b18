"""Measure robustness: `python -m genray.evaluate RUN_OR_CHECKPOINT`, or `genray.evaluate(model, x, y)`."""

import argparse
import copy
import hashlib
import json
import os
from contextlib import closing, nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib import metadata
from typing import Literal

from genray.cli.parser import Parser, check_again
from genray.config.arguments import Count, Natural, Place, Seconds, checked
from genray.console import say
from genray.errors import DataError, StorageError
from genray.runtime.ray.loopback import keep_on_loopback
from genray.types import ThreatModel, fraction_text


@checked
def evaluate(
    model,
    x,
    y,
    *,
    attacks=("standard",),
    norms=("linf",),
    epsilon=None,
    step_size=None,
    num_classes: Count | None = None,
    seed: Natural = 0,
    block_size: Count | None = None,
    engine: str | None = None,
    workers: Natural | None = None,
    address: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    startup_timeout_s: Seconds = 120.0,
    stall_timeout_s: Seconds = 1800.0,
    max_failures: Natural = 5,
    output: Place | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data=None,
) -> dict:
    """Natural and robust accuracy of any model on any images.

    Args:
        model: `torch.nn.Module` or a function, images (N, C, H, W) float32 in [0, 1] -> logits (N, K); evaluated in
            eval mode and float32, and neither it nor `x` is changed.
        x: (N, C, H, W) tensor or array, float in [0, 1] or uint8.
        y: (N,) integer labels, 0..K-1.
        attacks: column names or groups: `paper` (all), `standard` (AutoAttack), `pgd20`, `pgd100`, `mim`, `cw`,
            `apgd_ce`, `apgd_dlr`, `apgd_t`, `fab_t`, `square`, `aa`; or one text "pgd20,aa".
        norms: of "linf", "l2", "l1".
        epsilon: norm -> radius on the [0, 1] pixel scale (8/255 may be the text "8/255"). With one norm the radius
            alone will do. By default the radii that a model of genray was trained for, else those of the papers:
            8/255, 128/255 and 12.
        step_size: norm -> step size of pgd20, pgd100, mim and cw; epsilon / 4 by default.
        num_classes: K; by default the number of logits.
        seed: of all random numbers.
        block_size: examples a block (part of the protocol: attacks that draw for a batch draw for a block); None for
            `default_block_size`, 100 unless images are tiny.
        engine: who runs the members of AutoAttack: "genray", "genray-bf16" or "pyautoattack" (`evaluation/engines.py`);
            None for "genray" in linf and l2 and "pyautoattack" in l1.
        workers: None evaluates in this process; a number starts as many Ray actors, 0 one a device.
        address: Ray cluster of the workers.
        device: of the workers: "auto", "cpu", or "cuda", which asks for a GPU each although none may be there yet.
        startup_timeout_s: how long the cluster may take to start a worker.
        stall_timeout_s: how long a worker may go without computing anything before another one takes its block.
        max_failures: how often a block may lose its worker, and a worker be lost in a row, before the evaluation ends.
        output: folder for finished blocks, `results.json` and `results.parquet`; None keeps nothing.
        resume: go on with the blocks that are in `output`, which say `block_size` and `engine` where they are None.
        overwrite: replace the evaluation that is in `output`, once the first new block is done.
        data: {"source", "split"} for the record.

    Returns:
        The record: `natural`, `norms`, `union` (several norms), `findings` (why a number may not be trusted) and
        `protocol`. Accuracies are fractions with 95 % Wilson intervals.

    Raises:
        InputError: arguments, data or folder are wrong; nothing was evaluated.
        StorageError: files could not be written until minutes after the end; the record was printed.
    """
    from genray.data.fingerprint import fingerprint as data_fingerprint
    from genray.evaluation import inputs
    from genray.evaluation.checks import look_at_origin
    from genray.evaluation.contract import as_network
    from genray.evaluation.engines import ENGINES
    from genray.evaluation.estimate import TimeLeft
    from genray.evaluation.job import Request, as_pixels, default_block_size
    from genray.evaluation.record import build_record, flags_parquet, join, protocol, record_table
    from genray.evaluation.task_queue import TaskQueue
    from genray.interop.origin import origin_of
    from genray.recording.evaluation_folder import EvaluationFolder, fingerprint, protocol_in
    from genray.recording.progress import Progress

    check_again(resume, overwrite)
    origin = origin_of(model)
    attacks, norms = inputs.names(attacks), inputs.names(norms)
    radii = inputs.radii(norms, epsilon, origin.radii())
    threats = tuple(ThreatModel(norm, radius) for norm, radius in radii.items())
    inputs.check_engine(engine)
    request = Request(threats, attacks, inputs.step_sizes(norms, step_size), seed, engine=engine)
    for norm in norms:
        request.columns(norm)
    images, labels = inputs.check_images(x, y)
    model, logits, findings = as_network(model, as_pixels(images[:32]))
    classes = inputs.check_classes(labels, logits, num_classes)
    before = protocol_in(output) if output and resume else {}
    block_size = block_size or before.get("block_size") or default_block_size(images.shape[1:])
    engine = engine or (before["engine"] if before.get("engine") in ENGINES else None)
    request = replace(request, block_size=block_size, engine=engine)
    described = {"source": "arrays", "split": "given", **(data or {}), "examples": len(labels)}
    described |= {"fingerprint": data_fingerprint(images, labels)}
    stated = protocol(request, described, classes, _versions())
    identity = {
        "protocol": {key: value for key, value in stated.items() if key not in ("versions", "engines")},
        "model": fingerprint(model.state_dict() | dict(model.named_buffers())),
        "images": fingerprint({"x": images, "y": labels}),
        "predictions": fingerprint({"first images": logits.argmax(1)}),  # equal weights may be another network's
    }
    folder = EvaluationFolder(output, identity, resume, overwrite) if output else None
    findings = look_at_origin(origin, threats, images.shape[1:]) + findings
    for finding in findings:
        Progress().say(f"! {finding}")  # now: the table is hours away
    findings += _look(model, images, labels, request)
    limits = {"startup_timeout_s": startup_timeout_s, "stall_timeout_s": stall_timeout_s, "max_failures": max_failures}
    cluster = {"workers": workers, "address": address, "device": device, "limits": limits}
    left = TimeLeft(request, len(labels), classes, together=1 if workers is None else workers or os.cpu_count() or 1)
    stored = (lambda tasks: left.stored(folder.finished(tasks))) if folder else (lambda tasks: {})
    todo = TaskQueue(request, len(labels), stored)
    try:
        with closing(_run(todo, model, images, labels, classes, cluster, left)) as found:
            for task, result in _shown(found, left):
                if folder:
                    folder.write(task, result)
                todo.finish(task, result)
    except BaseException:
        if folder:
            folder.save()
        raise
    results = {task: todo.results[task] for task in todo.known()}  # in an order that no worker has a say in
    flags = join(results)
    record = build_record(request, flags, results, labels.numpy(), findings, stated)
    if folder:
        try:
            folder.finish(record, flags_parquet(flags, labels.numpy()))
        except StorageError:
            say(record_table(record))  # the figures are not lost with the files
            raise
    return record


def _shown(found, left):
    """Passes (task, result) on and shows how far they are, in shares of the time, and what is left of that."""
    from genray.recording.progress import Progress, repeated

    progress = Progress()
    progress.phase("evaluating", 100, unit="%")

    def show():
        progress.steps(100 * left.share(), left.left())

    try:
        with repeated(show, seconds=1.0):
            for task, result in found:
                left.finished(task, result)
                yield task, result
                show()
        progress.steps(100, 0.0)
    finally:
        progress.close()


def _look(model, images, labels, request):
    """Findings about the model; refuses attacks that cannot run on it."""
    from genray.evaluation.checks import NO_GRADIENT, look_at_model
    from genray.evaluation.contract import device_of
    from genray.evaluation.job import as_pixels

    device = device_of(model)
    findings = look_at_model(model, as_pixels(images[:32]).to(device), labels[:32].to(device))
    blind = {name for threat in request.threats for name in request.columns(threat.norm)} - {"square"}
    if NO_GRADIENT in findings and blind:
        raise DataError(f"model: {NO_GRADIENT}; of the attacks only square can run")
    return findings


def _run(todo, model, images, labels, classes, cluster, left):
    """Yields (task, result)."""
    from genray.evaluation.contract import device_of
    from genray.evaluation.engines import copies_kept
    from genray.evaluation.estimate import look
    from genray.evaluation.job import run_here

    first, device = todo.take(), device_of(model)
    if not first:
        return
    if cluster["workers"] is None:
        with copies_kept(model):
            left.saw(look(model, images, labels, todo.request))
            yield from run_here(todo, model, images, labels, classes, device, first)
        return
    from genray.runtime.ray.evaluation import run_on_workers
    from genray.runtime.ray.worker_pool import Limits

    # A copy, because the caller's model has to stay where it is.
    model = model if device.type == "cpu" else copy.deepcopy(model).cpu()
    cluster = cluster | {"limits": Limits(**cluster["limits"])}
    yield from run_on_workers(first, todo, model, images, labels, classes, **cluster)


def _versions():
    from genray.recording.run_folder import versions

    found = versions([])
    del found["devices"]  # the record is the same whatever computed it
    return found | {"pyautoattack": metadata.version("pyautoattack")}


def main(args):
    if args.workers is not None and not args.address:
        keep_on_loopback()
    if args.mixtures is not None or args.save_mixture is not None:
        _mixtures(args)
        return
    from genray.evaluation.published import row_of_run
    from genray.evaluation.record import record_table
    from genray.evaluation.sources import given_by_norm, load, look_at
    from genray.recording.evaluation_folder import check_place
    from genray.recording.progress import Progress
    from genray.storage import Storage

    check_again(args.resume, args.overwrite)
    norms = args.norms.split(",")
    named = look_at(args.model, args.data, norms, given_by_norm("--epsilon", args.epsilon, norms), _file_options(args))
    where = Storage(args.output or _place(args, named))
    check_place(where, args.resume, args.overwrite)  # before the data are read
    model, split = load(named, Progress())
    examples = split if args.examples is None else split.first(args.examples, "--examples")
    record = _evaluate(args, model, examples, named.radii, where, {"source": named.source["source"], "split": "test"})
    radii = [Fraction(t["epsilon"]) for t in record["protocol"]["threats"] if t["norm"] == "linf"]
    print(record_table(record, row_of_run(named.config, "linf", radii[0]) if named.config and radii else None))
    print(f"everything is in {where}")


def _file_options(args):
    from genray.evaluation.sources import FileOptions

    return FileOptions(args.arch, args.width, args.normalize, args.weights)


def _mixtures(args):
    """Does what `--mixtures` and `--save-mixture` ask for and prints it."""
    from genray.evaluation.mixture_sweep import MixtureSweep, SweepRequest, show
    from genray.evaluation.sources import given_by_norm

    norms = tuple(args.norms.split(","))
    asked = SweepRequest(
        model=args.model,
        mixtures=args.mixtures,
        save_mixture=args.save_mixture,
        batch_norm=args.batch_norm,
        splits=args.split and tuple(dict.fromkeys(args.split.split(","))),
        data=args.data,
        examples=args.examples,
        attacks=tuple(args.attacks.split(",")),
        norms=norms,
        epsilon=given_by_norm("--epsilon", args.epsilon, norms),
        step_size=given_by_norm("--step-size", args.step_size, norms),
        engine=args.engine,
        options=_file_options(args),
        output=args.output,
        resume=args.resume,
        overwrite=args.overwrite,
    )
    cluster = nullcontext
    if args.workers is not None:
        from genray.runtime.ray.cluster import connected

        cluster = partial(connected, args.address, num_cpus=args.workers or os.cpu_count() or 1)
    sweep = MixtureSweep(asked)
    if sweep.mixtures:
        show(sweep, sweep.evaluate(partial(_evaluate, args), cluster))
    if sweep.saved:
        print(f"wrote {sweep.save()}")


def _place(args, named):
    """Where an evaluation goes by default: beside others of the same model, under a name that says what is asked."""
    from genray.evaluation import inputs
    from genray.evaluation.engines import engines_text
    from genray.evaluation.sources import given_by_norm
    from genray.storage import Storage

    inputs.check_engine(args.engine)
    attacks, norms = inputs.names(args.attacks), inputs.names(args.norms)
    radii = {norm: fraction_text(radius) for norm, radius in inputs.radii(norms, named.radii or None).items()}
    steps = inputs.step_sizes(norms, given_by_norm("--step-size", args.step_size, norms) or None)
    asked = {"attacks": sorted(attacks), "radii": radii, "steps": steps, "engine": engines_text(args.engine, norms)}
    asked |= {"seed": args.seed, "block_size": args.block_size, "examples": args.examples}
    asked |= {"data": named.source, "model": [args.arch, args.width, args.normalize, args.weights]}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
    name = f"{'_'.join(attacks)[:60]}-{'_'.join(norms)}-{digest}"
    model = Storage(args.model)
    return (
        (model if named.config else model.parent)
        / ("evaluations" if named.config else f"{model.name}.evaluations")
        / name
    )


def _evaluate(args, model, examples, epsilon, where, data):
    """The evaluation that the arguments describe, of one model on one split."""
    from genray.evaluation.sources import given_by_norm

    return evaluate(
        model,
        examples.images,
        examples.labels,
        attacks=args.attacks.split(","),
        norms=args.norms.split(","),
        epsilon=epsilon,
        step_size=given_by_norm("--step-size", args.step_size, args.norms.split(",")) or None,
        seed=args.seed,
        block_size=args.block_size,
        engine=args.engine,
        workers=args.workers,
        address=args.address,
        device=args.device,
        startup_timeout_s=args.startup_timeout,
        stall_timeout_s=args.stall_timeout,
        max_failures=args.max_failures,
        output=where,
        resume=args.resume,
        overwrite=args.overwrite,
        data=data,
    )


def normalization(text):
    """What `load_into` takes, from the command line's word."""
    from genray.models.normalize import NORMALIZATIONS

    if text == "none" or text in NORMALIZATIONS:
        return text
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in text.split(":"))
        return mean, std
    except ValueError:
        known = ", ".join(NORMALIZATIONS)
        raise argparse.ArgumentTypeError(
            f"expected none, {known} or MEAN:STD such as 0.5,0.5,0.5:0.2,0.2,0.2, got {text!r}"
        ) from None


def parse_args(argv):
    parser = Parser(prog="genray.evaluate", description=__doc__)
    parser.add_argument(
        "model", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a model file of any known producer"
    )
    parser.add_argument(
        "--data", metavar="SOURCE[:PATH]", help="test images: cifar10, parquet:/folder (default: the run's)"
    )
    parser.add_argument("--arch", metavar="NAME", help="architecture of a model file (default: seen from its names)")
    parser.add_argument("--width", type=int, help="width of that architecture, where it is not the published one")
    parser.add_argument(
        "--normalize",
        type=normalization,
        metavar="HOW",
        help="of a model file's input: none, cifar10, cifar100, MEAN:STD",
    )
    parser.add_argument(
        "--weights", metavar="NAME", help="which of a model file's weights, where it holds several (state_dict_ema)"
    )
    parser.add_argument(
        "--attacks", default="standard", metavar="NAME,...", help="paper, standard (AutoAttack) or columns"
    )
    parser.add_argument("--norms", default="linf", metavar="NORM,...", help="of linf, l2, l1")
    parser.add_argument(
        "--epsilon", metavar="RADIUS", help="8/255, or linf=8/255,l2=0.5 (default: the run's, or papers')"
    )
    parser.add_argument(
        "--step-size", metavar="SIZE", help="of PGD, MIM and CW: 2/255, or linf=2/255,l2=0.1 (default: epsilon / 4)"
    )
    parser.add_argument("--examples", type=int, metavar="N", help="only the first N test images")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers of the attacks")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="examples a block; part of the protocol (default: 100; tiny: more)"
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="who runs AutoAttack's members: genray (linf, l2), pyautoattack (l1), genray-bf16",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="Ray actors, 0 for one a device (default: this process)"
    )
    parser.add_argument("--address", metavar="auto|HOST:PORT", help="Ray cluster of the workers")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], help="of the workers; cuda: a GPU each, none yet or not"
    )
    parser.add_argument(
        "--startup-timeout", type=float, metavar="S", help="seconds that the cluster may take to start a worker (120)"
    )
    parser.add_argument(
        "--stall-timeout", type=float, metavar="S", help="seconds that a worker may go without computing (1800)"
    )
    parser.add_argument(
        "--max-failures", type=int, metavar="N", help="lost workers of one block, or in a row, that are replaced (5)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the finished blocks that are there")
    parser.add_argument("--overwrite", action="store_true", help="replace the same evaluation, or the one in --output")
    parser.add_argument("--output", metavar="DIR", help="folder or URI (default: evaluations/<what is asked>)")
    parser.add_argument(
        "--mixtures",
        metavar="POINTS",
        help="re-mix a run's base learners: 0:1:0.1 (gamma), natural=0.3,linf=0.7, grid:0.25",
    )
    parser.add_argument("--save-mixture", metavar="POINT", help="write the model of one such point, for load_model")
    parser.add_argument(
        "--batch-norm", choices=["mix", "reestimate"], help="running statistics of mixtures (default: mix)"
    )
    parser.add_argument(
        "--split", metavar="NAME,...", help="of validation, test: where mixtures are measured (default: both)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.workers is None and args.address:
        args.workers = 0
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers: expected 0 or more, got {args.workers}")
    for name, default in WORKERS_OPTIONS.items():
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and args.workers is None:
            parser.error(f"{option}: has no effect without --workers or --address")
        if name.endswith("timeout") and value is not None and not 0 < value < float("inf"):
            parser.error(f"{option}: expected a number above 0, got {value}")
        setattr(args, name, default if value is None else value)
    if args.max_failures < 0:
        parser.error(f"--max-failures: expected 0 or more, got {args.max_failures}")
    if args.block_size is not None and args.block_size < 1:
        parser.error(f"--block-size: expected at least 1, got {args.block_size}")
    if args.seed < 0:
        parser.error(f"--seed: expected 0 or more, got {args.seed}")
    _check_mixture_options(parser, args)
    return args


WORKERS_OPTIONS = {"device": "auto", "startup_timeout": 120.0, "stall_timeout": 1800.0, "max_failures": 5}


def _check_mixture_options(parser, args):
    if args.mixtures is None and args.split is not None:
        parser.error("--split: has no effect without --mixtures")
    if args.mixtures is None and args.save_mixture is None and args.batch_norm is not None:
        parser.error("--batch-norm: has no effect without --mixtures or --save-mixture")
    args.batch_norm = args.batch_norm or "mix"
