"""Train Generalist: `python -m genray.train [--config FILE] [key=value ...]`, or `genray.train(config)`."""

from typing import get_args

from genray.api import DEFAULT_STORAGE, Runtime, train
from genray.cli.parser import Parser
from genray.runtime.ray.loopback import keep_on_loopback


def main(args):
    overrides = [*args.overrides, *args.set]
    if args.dry_run:
        from genray.training import dry_run

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
    print(results)
    print(f"{results['wall_s']:g} s of training and evaluation; everything is in {results['folder']}")


def parse_args(argv):
    parser = Parser(
        "genray train configs/digits.yaml training.epochs=10 --name short", prog="genray.train", description=__doc__
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="[FILE] key=value", help="a YAML file; fields to override: training.epochs=10"
    )
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="the same as key=value")
    parser.add_argument("--config", metavar="FILE", help="a YAML file; without it, the embedded digits run")
    parser.add_argument("--runtime", choices=get_args(Runtime), default="ray", help="default: ray")
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
    parser.add_allow_option()
    args = parser.parse_intermixed_args(argv)
    if args.config is None and args.overrides and args.overrides[0].endswith((".yaml", ".yml")):
        args.config = args.overrides.pop(0)  # named bare, as in tune and evaluate
    if args.runtime == "local" and args.address:
        parser.error("--address is for --runtime ray")
    return args
