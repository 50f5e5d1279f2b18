"""Images in Parquet files, laid out as the Hugging Face hub lays them out.

One row an image: a struct column holding the encoded file in its field `bytes` (or a plain binary column) and an
integer class label. A split is one or several files, train-*.parquet and test-*.parquet.
"""

import json
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from genray.data.files import Folder
from genray.data.images import ImageStack
from genray.data.request import PARTS, DataRequest, one_line, resolve_classes
from genray.data.splits import ImageData, Split
from genray.errors import DataError

_SHARD = re.compile(r"(train|test|validation)([-_.].*)?\.parquet")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
_LABEL_NAMES = ("label", "fine_label")
_ROWS_AT_ONCE = 1024  # bounds the memory that encoded images take beside the decoded ones


class Shard:
    """One open Parquet file of a split."""

    def __init__(self, folder: Folder, path: str):
        self.path = path
        with _reading(path):
            self._file = pq.ParquetFile(path, filesystem=folder.filesystem)
            self.schema = self._file.schema_arrow

    @property
    def num_rows(self) -> int:
        return self._file.metadata.num_rows

    def labels(self, column: str) -> torch.Tensor:
        """(rows,) int64, the whole label column."""
        self._require("label", column, pa.types.is_integer)
        with _reading(self.path):
            values = self._file.read(columns=[column]).column(column)
        if values.null_count:
            row = pc.index(pc.is_null(values), True).as_py()
            raise DataError(f"{self.path}, row {row}: expected an integer class label in {column!r}, came null")
        return torch.tensor(values.to_numpy(), dtype=torch.int64)

    def read_images(self, column: str, count: int, stack: ImageStack) -> None:
        """Decodes the first `count` images of the file into `stack`."""
        self._require("image", column, lambda kind: _is_image_struct(kind) or _is_binary(kind))
        is_struct = pa.types.is_struct(self.schema.field(column).type)
        with _reading(self.path):
            batches = self._file.iter_batches(_ROWS_AT_ONCE, columns=[f"{column}.bytes" if is_struct else column])
        start = 0
        while start < count:
            with _reading(self.path):
                values = next(batches).column(0).slice(0, count - start)
                blobs = (pc.struct_field(values, "bytes") if is_struct else values).to_pylist()
            stack.append(blobs, lambda index, start=start: f"{self.path}, row {start + index}")
            start += len(blobs)

    def _require(self, role: str, column: str, fits: Callable[[pa.DataType], bool]) -> None:
        """The files of a data set may differ from the first, whose columns were chosen."""
        if column not in self.schema.names or not fits(self.schema.field(column).type):
            raise _no_column(self.path, role, column, self.schema)


def load_parquet(request: DataRequest) -> ImageData:
    """The source "parquet"; see `genray.data.datasets.load_image_data`. Rows count from 0 in messages."""
    shards = find_shards(Folder(request.require_path()))
    schema = shards["train"][0].schema
    image_column, label_column = find_columns(schema, request.image_column, request.label_column)
    pieces = {part: [shard.labels(label_column) for shard in shards[part]] for part in PARTS}
    labels = {part: torch.cat(pieces[part]) for part in PARTS}

    def locate(part, index):
        for shard, piece in zip(shards[part], pieces[part], strict=True):
            if index < len(piece):
                return f"{shard.path}, row {index}"
            index -= len(piece)

    names = resolve_classes(labels, class_names(schema, label_column), locate)
    splits = {}
    for part in PARTS:
        count = request.count(part, len(labels[part]))
        stack, missing = ImageStack(count, request.image_size), count
        for shard, piece in zip(shards[part], pieces[part], strict=True):
            shard.read_images(image_column, min(missing, len(piece)), stack)
            missing -= min(missing, len(piece))
        splits[part] = Split(stack.finish(), labels[part][:count].clone())
    return ImageData(splits["train"], splits["test"], names, request.source)


def find_shards(folder: Folder) -> dict[str, list[Shard]]:
    """The files of each split in order of their names, from the folder itself or else its sub-folder `data`.

    `validation-*` serves as the test split where there is no `test-*`.

    Raises:
        DataError: a split has no file, or of its numbered files (-00000-of-00002) some are missing.
    """
    found = {}
    for below in ("", "data"):
        for info in folder.list(below):
            if match := _SHARD.fullmatch(info.base_name):
                found.setdefault(match[1], []).append(info.path)
        if found:
            break
    found.setdefault("test", found.get("validation", []))
    for part in PARTS:
        if not found.get(part):
            others = " or validation-*.parquet" if part == "test" else ""
            raise DataError(
                f"data.path: expected files {part}-*.parquet{others} in {folder.root} or its sub-folder data, came none"
            )
        _check_complete(found[part])
    return {part: [Shard(folder, path) for path in found[part]] for part in PARTS}


def unlabeled_shards(folder: Folder) -> list[Shard]:
    """Parquet files whose labels are of no interest, from the folder itself or else its sub-folder `data`, in order of
    their names: train-*.parquet, or where there are none all that are no test or validation part.

    Raises:
        DataError: there are none, or of numbered files some are missing.
    """
    for below in ("", "data"):
        names = {info.path: info.base_name for info in folder.list(below) if info.base_name.endswith(".parquet")}
        parts = {path: match[1] if (match := _SHARD.fullmatch(name)) else "" for path, name in names.items()}
        for wanted in ("train", ""):
            if paths := [path for path, part in parts.items() if part == wanted]:
                _check_complete(paths)
                return [Shard(folder, path) for path in paths]
    raise DataError(f"data.path: expected files *.parquet in {folder.root} or its sub-folder data, came none")


def find_columns(schema: pa.Schema, image: str | None = None, label: str | None = None) -> tuple[str, str]:
    """Names of the image and the label column; those given are checked, the others found by their types.

    Raises:
        DataError: a given column is absent or of another type, or none or several fit; lists all columns.
    """
    labels = [field.name for field in schema if pa.types.is_integer(field.type)]
    usual = [name for name in _LABEL_NAMES if name in labels][:1]
    return (
        find_image_column(schema, image),
        _pick(schema, "label", "an integer column", label, usual or labels, labels),
    )


def find_image_column(schema: pa.Schema, given: str | None = None) -> str:
    """Name of the image column, as in `find_columns`."""
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    images = structs or [field.name for field in schema if _is_binary(field.type)]
    every = [field.name for field in schema if _is_image_struct(field.type) or _is_binary(field.type)]
    return _pick(schema, "image", "a struct column with the field bytes, or a binary column", given, images, every)


def class_names(schema: pa.Schema, label_column: str) -> list[str] | None:
    """Class names from the schema's `huggingface` metadata, None where it does not say."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, ValueError, TypeError):  # names are decoration: data written without them is fine
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _pick(schema, role, wanted, given, candidates, legal) -> str:
    if given is not None:
        if given not in legal:
            raise _no_column("data", role, given, schema, wanted)
        return given
    if len(candidates) != 1:
        came = f"{len(candidates)} that fit ({', '.join(candidates)})" if candidates else "none"
        raise DataError(
            f"data.{role}_column: expected one column to be {wanted}, came {came}; name it, the columns "
            f"are {_columns(schema)}"
        )
    return candidates[0]


def _no_column(where, role, name, schema, wanted="a column that every file has in a fitting type") -> DataError:
    return DataError(
        f"data.{role}_column: expected {wanted}, came {name!r}; the columns of {where} are {_columns(schema)}"
    )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _check_complete(paths: list[str]) -> None:
    """A shard lost in copying would otherwise silently shrink the data set."""
    numbered = [match for path in paths if (match := _NUMBERED.search(path))]
    totals = sorted({int(match[2]) for match in numbered})
    if numbered and (len(totals) > 1 or len(numbered) != totals[0] or len(numbered) != len(paths)):
        raise DataError(
            f"data.path: expected all {totals[-1]} files beside {paths[0]}, came {len(paths)} files numbered "
            f"{', '.join(match[0][1:-8] for match in numbered)}"
        )


class _reading:
    """Turns a storage or format error while reading `path` into a DataError."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (OSError, pa.ArrowException)):
            raise DataError(f"{self.path}: expected a readable Parquet file: {one_line(error)}") from error
        return False
