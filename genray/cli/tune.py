"""Compare whole runs: `python -m genray.tune GRID.yaml`, or `genray.tune(grid)`."""

import time
from functools import partial

from genray.api import DEFAULT_STORAGE, tune
from genray.cli.parser import Parser, at_least
from genray.runtime.ray.loopback import keep_on_loopback


def main(args):
    if not args.address:
        keep_on_loopback()
    from genray.reporting.trials import markdown
    from genray.storage import Storage
    from genray.tuning import require_ray
    from genray.tuning.grid import load_grid

    folder = Storage(args.storage) / load_grid(args.grid, args.overrides).name
    if args.report:
        from genray.reporting.report import report_grid

        _, unwritten = report_grid(folder)
        if unwritten:
            raise unwritten
        return
    if args.dry_run:
        require_ray()
        from genray.tuning.plan import dry_run

        print(dry_run(load_grid(args.grid, args.overrides), args.address, args.max_concurrent))
        return
    began = time.perf_counter()
    trials = tune(
        args.grid,
        args.overrides,
        address=args.address,
        storage=args.storage,
        max_concurrent=args.max_concurrent,
        resume=args.resume,
        overwrite=args.overwrite,
        on_plan=partial(print, flush=True),
        debug=args.debug,
    )
    print(markdown(trials))
    print(f"{time.perf_counter() - began:.0f} s; everything is in {folder}")


def parse_args(argv):
    parser = Parser("genray tune configs/ablations/averaging.yaml --dry-run", prog="genray.tune", description=__doc__)
    parser.add_argument("grid", metavar="GRID.yaml", help="which runs to compare: configs/ablations, configs/paper")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a field of every run: data.path=/data/mnist")
    parser.add_argument("--address", metavar="auto|HOST:PORT", help="join this Ray cluster (default: a private one)")
    parser.add_argument(
        "--max-concurrent", type=at_least(1), metavar="N", help="at most N trials at once (default: what fits)"
    )
    parser.add_argument("--storage", default=DEFAULT_STORAGE, metavar="URI", help="folder of the grid's folder")
    parser.add_argument("--resume", action="store_true", help="go on; what is finished is not done again")
    parser.add_argument("--overwrite", action="store_true", help="begin a grid of this name anew; its runs are removed")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    parser.add_allow_option()
    return parser.parse_intermixed_args(argv)
