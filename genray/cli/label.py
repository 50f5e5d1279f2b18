"""Label images by a model: `python -m genray.label RUN_OR_MODEL --output FILE.npz`, or `genray.label(...)`.

The file is what `data.extra` of a run reads, its labels marked as pseudo-labels. Without --data, the images are the
training images that the run left out by data.train_examples.
"""

from typing import get_args

from genray.api import Device, label
from genray.cli.parser import Parser
from genray.runtime.ray.loopback import keep_on_loopback

SOURCES = "npz:FILE, parquet:FOLDER, image_folder:FOLDER, svhn_extra"


def main(args):
    from genray.storage import without_secrets

    if args.workers is not None and not args.address:
        keep_on_loopback()
    others = {"model", "output", "data", "debug", "allow"}
    options = {key: value for key, value in vars(args).items() if key not in others}
    written = label(args.model, args.output, args.data, **options)
    print(f"the labelled images are in {without_secrets(written)}")


def parse_args(argv):
    parser = Parser("genray label runs/teacher --output rest.npz", prog="genray.label", description=__doc__)
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, or a model file written by genray")
    parser.add_argument("--output", metavar="FILE", required=True, help="path or URI, *.npz or *.parquet")
    parser.add_argument("--data", metavar="SOURCE[:PATH]", help=f"{SOURCES} (default: what the run left out)")
    parser.add_argument("--image-column", metavar="NAME", help="of Parquet files (default: found by itself)")
    parser.add_allow_option()
    parser.add_argument("--resize", action="store_true", help="resize files to the size of the model's images")
    parser.add_argument("--examples", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images a forward pass (256)")
    parser.add_argument("--workers", type=int, metavar="N", help="so many Ray actors; 0: one a device")
    parser.add_argument("--address", metavar="auto|HOST:PORT", help="join this Ray cluster (default: a private one)")
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="default: auto")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    args = parser.parse_args(argv)
    if args.address and args.workers is None:
        args.workers = 0
    return args
