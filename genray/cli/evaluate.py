"""Measure robustness: `python -m genray.evaluate RUN_OR_CHECKPOINT`, or `genray.evaluate(model, x, y)`."""

import argparse
import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import get_args

from genray.api import Device, evaluate
from genray.cli.parser import Parser, at_least, seconds
from genray.config.arguments import check_again
from genray.core.user_code import allow_typed
from genray.runtime.ray.loopback import keep_on_loopback
from genray.types import fraction_text

OF_WORKERS = ("startup_timeout_s", "stall_timeout_s", "max_failures")


def main(args):
    allow_typed(args.attacks)
    if args.workers is not None and not args.address:
        keep_on_loopback()
    if args.workers is None:
        from genray.run.devices import device_here

        args.device = device_here(args.device or "auto")  # before data are read
    if args.mixtures is not None or args.save_mixture is not None:
        _mixtures(args)
        return
    from genray.evaluation.published import row_of_run
    from genray.evaluation.record import parts_of, record_table
    from genray.evaluation.sources import load, look_at
    from genray.recording.evaluation_folder import check_place
    from genray.recording.progress import Progress

    check_again(args.resume, args.overwrite)
    asked = _asked(args)
    named = look_at(args.model, args.data, asked.norms, asked.epsilon, _file_options(args))
    asked = replace(asked, epsilon=named.radii, data={"source": named.source["source"], "split": "test"})
    where = check_place(args.output or _place(args, asked, named), args.resume, args.overwrite)  # before data are read
    model, split = load(named, Progress())
    examples = split if args.examples is None else split.first(args.examples, "--examples")
    record = _evaluate(args, model, examples, replace(asked, output=where))
    balls = [(ball, threat) for ball, threat, _ in parts_of(record) if named.config and threat["norm"] == "linf"]
    published = {ball: row_of_run(named.config, "linf", Fraction(threat["epsilon"])) for ball, threat in balls}
    print(record_table(record, published))
    print(f"everything is in {where}")


def _asked(args):
    """The `EvaluationArguments` of the options."""
    from genray.attacks.transfer import TRANSFER
    from genray.evaluation.inputs import EvaluationArguments, given_by_norm

    norms, attacks = tuple(args.norms.split(",")), tuple(args.attacks.split(","))
    return EvaluationArguments(
        attacks=attacks,
        norms=norms,
        epsilon=given_by_norm("--epsilon", args.epsilon, norms),
        step_size=given_by_norm("--step-size", args.step_size, norms),
        seed=args.seed,
        block_size=args.block_size,
        engine=args.engine,
        output=args.output,
        resume=args.resume,
        overwrite=args.overwrite,
        transfer=args.model if TRANSFER in attacks else None,
        save_images=args.save_images,
    )


def _evaluate(args, model, examples, asked):
    """Evaluates one model on one split, on the workers of the options or in this process."""
    if args.workers is None:
        model = model.to(args.device)
    given = {name: getattr(args, name) for name in ("device", *OF_WORKERS) if getattr(args, name) is not None}
    how = {**vars(asked), **given, "workers": args.workers, "address": args.address}
    return evaluate(model, *examples.take(), **how)


def _file_options(args):
    from genray.evaluation.sources import FileOptions

    return FileOptions(args.arch, args.width, args.normalize, args.weights)


def _mixtures(args):
    """Measures `--mixtures`, writes `--save-mixture` and prints both."""
    from genray.evaluation.mixture_sweep import MixtureSweep
    from genray.recording.writer import write_all
    from genray.reporting.mixtures import AGAIN, mixture_files, mixture_table
    from genray.tables import as_text

    _file_options(args).refuse()
    splits = args.split and tuple(dict.fromkeys(args.split.split(",")))
    points = {"mixtures": args.mixtures, "save_mixture": args.save_mixture, "batch_norm": args.batch_norm}
    sweep = MixtureSweep(args.model, _asked(args), **points, splits=splits, data=args.data, examples=args.examples)
    cluster = nullcontext
    if args.workers is not None:
        from genray.runtime.ray.cluster import connected

        cluster = partial(connected, args.address, num_cpus=args.workers or os.cpu_count() or 1)
    if sweep.mixtures:
        results = sweep.evaluate(partial(_evaluate, args), cluster)
        for split in results["splits"]:
            print(as_text(mixture_table(results, split), intervals=True, notes=True), end="\n\n")
        if results["step"] < results["total_steps"]:
            print(f"the run has not ended: base learners of step {results['step']} of {results['total_steps']}")
        files = mixture_files(results)
        if not any(name.endswith(".png") for name in files):
            print(AGAIN)
        write_all(sweep.storage, files)
        print(f"everything is in {sweep.storage}")
    if sweep.saved:
        print(f"wrote {sweep.save()}")


def _place(args, asked, named):
    """The default folder of an evaluation: beside others of the same model, under a name of what is asked."""
    from genray.evaluation.engines import engines_text
    from genray.storage import Storage

    request = asked.request()
    radii: dict[str, str] = {}
    for threat in request.threats:
        before = f"{radii[threat.norm]}:" if threat.norm in radii else ""
        radii[threat.norm] = before + fraction_text(threat.epsilon)
    key = {"attacks": sorted(request.attacks), "radii": radii, "steps": request.step_sizes}
    key |= {"engine": engines_text(args.engine, radii), "seed": args.seed, "block_size": args.block_size}
    key |= {"examples": args.examples, "data": named.source}
    key |= {"model": [args.arch, args.width, args.normalize, args.weights]}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:8]
    name, model = (
        f"{'_'.join(request.attacks)[:60].replace(':', '.').replace('/', '.')}-{'_'.join(radii)}-{digest}",
        Storage(args.model),
    )
    return model / "evaluations" / name if named.config else model.parent / f"{model.name}.evaluations" / name


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
    parser = Parser(
        "genray evaluate runs/digits --attacks pgd20,cw --examples 100", prog="genray.evaluate", description=__doc__
    )
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
        "--attacks",
        default="standard",
        metavar="NAME,...",
        help="paper, standard (AutoAttack), columns, transfer, transfer_from=FILE, package.module:CLASS",
    )
    parser.add_argument("--norms", default="linf", metavar="NORM,...", help="of linf, l2, l1")
    parser.add_argument(
        "--epsilon",
        metavar="RADIUS",
        help="8/255, a curve 2/255,4/255,8/255, by norm linf=2/255:8/255,l2=0.5 (default: the run's, or papers')",
    )
    parser.add_argument(
        "--step-size", metavar="SIZE", help="of PGD, MIM and CW: 2/255, or linf=2/255,l2=0.1 (default: epsilon / 4)"
    )
    parser.add_argument(
        "--save-images", action="store_true", help="write the adversarial images, for genray.load_images"
    )
    parser.add_argument("--examples", type=int, metavar="N", help="only the first N test images")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of all random numbers of the attacks")
    parser.add_argument(
        "--block-size",
        type=at_least(1),
        metavar="N",
        help="examples a block; part of the protocol (default: 100; tiny: more)",
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="code of AutoAttack's members: genray (linf, l2), pyautoattack (l1), genray-bf16",
    )
    parser.add_argument(
        "--workers", type=at_least(0), metavar="N", help="Ray actors, 0 for one a device (default: this process)"
    )
    parser.add_argument("--address", metavar="auto|HOST:PORT", help="Ray cluster of the workers")
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        help="of this process or of the workers; cuda: a GPU each, none yet or not",
    )
    parser.add_argument(
        "--startup-timeout",
        type=seconds,
        dest="startup_timeout_s",
        metavar="S",
        help="seconds that the cluster may take to start a worker (120)",
    )
    parser.add_argument(
        "--stall-timeout",
        type=seconds,
        dest="stall_timeout_s",
        metavar="S",
        help="seconds that a worker may go without computing (1800)",
    )
    parser.add_argument(
        "--max-failures",
        type=at_least(0),
        metavar="N",
        help="lost workers of one block, or in a row, that are replaced (5)",
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
    parser.add_allow_option()
    args = parser.parse_args(argv)
    if args.workers is None and args.address:
        args.workers = 0
    for name in OF_WORKERS:
        if getattr(args, name) is not None and args.workers is None:
            option = f"--{name.removesuffix('_s').replace('_', '-')}"
            parser.error(f"{option}: has no effect without --workers or --address")
    if args.mixtures is None and args.split is not None:
        parser.error("--split: has no effect without --mixtures")
    if args.mixtures is None and args.save_mixture is None and args.batch_norm is not None:
        parser.error("--batch-norm: has no effect without --mixtures or --save-mixture")
    args.batch_norm = args.batch_norm or "mix"
    return args
