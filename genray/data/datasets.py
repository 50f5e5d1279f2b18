"""Image data sets by name: everything becomes two uint8 tensors with labels in memory."""

from functools import partial
from typing import Annotated, Any, Literal

from genray.config.arguments import Count, checked
from genray.config.values import AsTuple
from genray.core.memory import check_memory
from genray.data.arrays import load_arrays
from genray.data.catalogue import without
from genray.data.home_choice import FILE_SOURCES, choose_home, make_home, stored_part
from genray.data.homes import Resident
from genray.data.parquet import load_parquet
from genray.data.reading import Reading
from genray.data.request import PARTS, DataRequest
from genray.data.sources import load_digits, load_image_folder, load_torchvision
from genray.data.splits import ImageData, Split, validation_split
from genray.errors import DataError

__all__ = ["SOURCES", "ImageData", "Split", "load_image_data", "validation_split"]

# The legal values of data.source.
SOURCES = {
    "digits": load_digits,
    "cifar10": load_torchvision,
    "cifar100": load_torchvision,
    "mnist": load_torchvision,
    "svhn": load_torchvision,
    "parquet": load_parquet,
    "image_folder": load_image_folder,
    "arrays": load_arrays,
}


@checked(error=DataError, prefix="data.")
def load_image_data(
    source: Literal[tuple(SOURCES)],  # type: ignore[valid-type]  # the names stand once
    *,
    path: Any = None,
    image_column: str | None = None,
    label_column: str | None = None,
    download: bool = True,
    image_size: Annotated[tuple[Count, Count], AsTuple] | None = None,
    train_examples: Count | None = None,
    test_examples: Count | None = None,
    decode: Any = PARTS,
    copies: Count = 1,
    progress: Any = None,
    check: Any = None,
    home: Literal["auto", "resident", "mapped", "files"] = "resident",
    cache: str | None = None,
    on_broken: Literal["fail", "skip"] = "fail",
) -> ImageData:
    """Opens a data set, by default into memory.

    Args:
        source: a key of SOURCES. `digits` comes with scikit-learn; `cifar10`, `cifar100`, `mnist` and `svhn` come from
            torchvision; `parquet` reads the Hugging Face hub's layout; `image_folder` reads train/<class>/ and
            test/<class>/ (or val/); `arrays` takes {"train": ..., "test": ...} as its path, each as in `genray.train`.
        path: where the data lies. torchvision: a local folder, ~/.cache/genray by default. parquet and image_folder: a
            local folder, a URI (file:///, s3://, gs://, ...) or a tuple (pyarrow.fs.FileSystem, folder in it). digits:
            none.
        image_column, label_column: parquet only; by default found from the column types.
        download: torchvision only; fetch what is absent.
        image_size: (H, W) in pixels to resize every image to; by default images must agree in size.
        train_examples, test_examples: take the first so many examples in stored order; by default all. Classes are
            counted before that.
        decode: the parts whose images are wanted. Of the others only labels and the shape of the first image are read;
            their images are tensors on torch's device "meta", which have a shape and no pixels.
        copies: how often the images will be in the memory of this machine.
        progress: a `Progress` that shows how far decoding is, and what was left out or changed; None shows nothing.
        check: called with the `Catalogue` and {"train": images that are there in all, "test": ...} before anything is
            decoded; what it raises ends the call. It judges the numbers of examples, too.
        home: where the images are: in memory (resident), in a file under `cache` that is mapped into memory, in the
            image files, which are decoded when they are needed, or (auto) resident if they take at most half of the
            free memory.
        cache: folder of the files that this machine makes once; ~/.cache/genray/images by default.
        on_broken: skip leaves out image files that cannot be decoded.

    Returns:
        The data with images (N, C, H, W) uint8, C = 1 for grey and 3 for RGB, and labels 0..K-1, K >= 2.

    Raises:
        DataError: the data is absent, unreadable, inconsistent, does not fit the arguments, or (found before anything
            is decoded) does not fit into memory. One line names the argument as data.<argument> or the file, with what
            was expected and what came.
    """
    reading = Reading(progress)
    request = DataRequest(
        *(source, path, image_column, label_column, download, image_size, train_examples, test_examples, reading),
        refuses=check is None,
        skips=on_broken == "skip",
    )
    catalogue = SOURCES[source](request)
    _check_sizes(source, catalogue.parts)
    if check is not None:
        check(catalogue, request.available)
    needed = sum(part.nbytes for name, part in catalogue.parts.items() if name in decode)
    kind, note = choose_home("resident" if source == "arrays" else home, copies * needed, cache, source in FILE_SOURCES)
    reading.say(note if decode else "")
    shape = "x".join(map(str, catalogue.parts["train"].shape))
    counted = [f"{len(part.labels)} {name} images" for name, part in catalogue.parts.items() if name in decode]
    if kind == "resident":
        check_memory(copies * needed, f"{' and '.join(counted)} of {shape} bytes{', twice' * (copies > 1)}")
    homes, labels = {}, {}
    for name, part in catalogue.parts.items():
        found, broken = Resident(part.undecoded()), []
        if name in decode:
            column = catalogue.columns.get("image_column")
            stored = stored_part(name, request, column, cache, partial(_reopened, name))
            found, broken = make_home(kind, part, request, stored)
            reading.leave_out_broken(name, broken, stored.root)
        homes[name], labels[name] = found, without(part.labels, broken)
    channels = max(found.shape[0] for found in homes.values())
    splits = {name: Split(found.with_channels(channels), labels[name]) for name, found in homes.items()}
    reading.report()
    opened = splits["train"], splits["test"], catalogue.class_names, source, catalogue.columns
    return ImageData(*opened, reading.notes, reading.broken)


def _reopened(part, request):
    return SOURCES[request.source](request).parts[part]


def _check_sizes(source, parts):
    train, test = (parts[name].shape for name in PARTS)
    if train[1:] != test[1:]:
        raise DataError(
            f"{source} data: expected test images of the training images' {train[1]}x{train[2]} pixels (H x W), came "
            f"{test[1]}x{test[2]}; set data.image_size to resize all images"
        )
