"""Image data sets by name: everything becomes two uint8 tensors with labels in memory."""

from typing import Any, Literal

from genray.config.arguments import Count, checked
from genray.data.parquet import load_parquet
from genray.data.request import DataRequest
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
}


@checked(error=DataError, prefix="data.")
def load_image_data(
    source: Literal[tuple(SOURCES)],
    *,
    path: Any = None,
    image_column: str | None = None,
    label_column: str | None = None,
    download: bool = True,
    image_size: tuple[Count, Count] | None = None,
    train_examples: Count | None = None,
    test_examples: Count | None = None,
) -> ImageData:
    """Loads a whole data set into memory.

    Args:
        source: a key of SOURCES. `digits` comes with scikit-learn; `cifar10`, `cifar100`, `mnist` and `svhn` come from
            torchvision; `parquet` reads the Hugging Face hub's layout; `image_folder` reads train/<class>/ and
            test/<class>/ (or val/).
        path: where the data lies. torchvision: a local folder, ~/.cache/genray by default. parquet and image_folder: a
            local folder, a URI (file:///, s3://, gs://, ...) or a tuple (pyarrow.fs.FileSystem, folder in it). digits:
            none.
        image_column, label_column: parquet only; by default found from the column types.
        download: torchvision only; fetch what is absent.
        image_size: (H, W) in pixels to resize every image to; by default images must agree in size.
        train_examples, test_examples: take the first so many examples in stored order; by default all. Classes are
            counted before that.

    Returns:
        The data with images (N, C, H, W) uint8, C = 1 for grey and 3 for RGB, and labels 0..K-1, K >= 2.

    Raises:
        DataError: the data is absent, unreadable, inconsistent or does not fit the arguments. One line names the
            argument as data.<argument> or the file, with what was expected and what came.
    """
    request = DataRequest(source, path, image_column, label_column, download, image_size, train_examples, test_examples)
    data = SOURCES[source](request)
    train, test = data.train.images.shape[1:], data.test.images.shape[1:]
    if train != test:
        raise DataError(
            f"{source} data: expected test images of the training images' shape {tuple(train)} (C, H, W), "
            f"came {tuple(test)}"
        )
    return data
