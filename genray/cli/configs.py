"""The configurations that come with genray, and one for your own images: `genray configs list|copy|init`."""

from pathlib import Path

from genray.cli.parser import Parser
from genray.config.presets import first_comment, preset_text, presets
from genray.errors import RunFolderError


def main(args):
    if args.what == "list":
        found = presets()
        width = max(map(len, found))
        print("\n".join(f"{name:<{width}}  {first_comment(path)}" for name, path in found.items()))
        return
    if args.what == "copy":
        target = Path(args.folder)
        if target.suffix != ".yaml":
            target /= f"{Path(args.name.removesuffix('.yaml')).name}.yaml"
        text = preset_text(args.name)
    else:
        from genray.run.starter import starter_config

        target = Path(args.output)
        _check_free(target)  # before the images are looked at
        text = starter_config(args.folder, str(target))
    _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{target}: cannot be written: {error.strerror}") from None
    print(f"wrote {target}; genray {'tune' if 'grid.schema' in text.partition(chr(10))[0] else 'train'} {target}")


def _check_free(target):
    if target.exists():
        raise RunFolderError(f"{target}: exists; it is not overwritten")


def parse_args(argv):
    parser = Parser("genray configs copy digits my_configs", prog="genray.configs", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True, metavar="list|copy|init")
    what.add_parser("list", help="names, and what each is")
    copy = what.add_parser("copy", help="one of them, as a file of yours")
    copy.add_argument("name", metavar="NAME", help="as listed: paper/cifar10_resnet18_generalist")
    copy.add_argument("folder", metavar="DIR|FILE.yaml", nargs="?", default=".", help="(default: here)")
    init = what.add_parser("init", help="a new one, with the sizes of your images filled in")
    init.add_argument("folder", metavar="FOLDER_OF_IMAGES", help="with train/<class>/ and test/<class>/, path or URI")
    init.add_argument("output", metavar="FILE.yaml", nargs="?", default="images.yaml", help="(default: images.yaml)")
    return parser.parse_args(argv)
