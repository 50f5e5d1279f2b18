"""Images in Parquet files, laid out as the Hugging Face hub lays them out.

One row an image: a struct column holding the encoded file in its field `bytes` (or a plain binary column) and an
integer class label. A split is one or several files, train-*.parquet and test-*.parquet.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from genray.data.catalogue import Catalogue, Part, row_name
from genray.data.files import Folder, readable
from genray.data.images import ImageStack, shape_of
from genray.data.reading import Reading
from genray.data.request import PARTS, DataRequest, resolve_classes
from genray.errors import DataError
from genray.storage import Storage

_SHARD = re.compile(r"(train|test|validation)([-_.].*)?\.parquet")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_IMAGE_NAMES = ("image", "img")
_PANDAS_INDEX = "__index_level_0__"
_ROWS_AT_ONCE = 1024  # bounds the memory that encoded images take beside the decoded ones
_BUFFER_BYTES = 2**20  # read at once; without a buffer a whole row group is read for its first image


class ParquetShard:
    """One open Parquet file of a split."""

    def __init__(self, folder: Folder, path: str):
        self.path = path
        with readable(f"{path}: expected a readable Parquet file"):
            info = folder.filesystem.get_file_info(path)
            self.size_and_time = info.size, info.mtime_ns
            self._file = pq.ParquetFile(path, filesystem=folder.filesystem, buffer_size=_BUFFER_BYTES)
            self.schema = self._file.schema_arrow

    @property
    def num_rows(self) -> int:
        return self._file.metadata.num_rows

    def labels(self, column: str, names: "ClassNames") -> torch.Tensor:
        """(rows,) int64, the whole label column, as numbers of the classes in `names`."""
        self._require("label", column, pa.types.is_integer)
        with readable(f"{self.path}: expected a readable Parquet file"):
            values = self._file.read(columns=[column]).column(column)
        if values.null_count:
            row = pc.index(pc.is_null(values), True).as_py()
            raise DataError(f"{self.path}, row {row}: expected an integer class label in {column!r}, came null")
        labels = torch.tensor(values.to_numpy(), dtype=torch.int64)
        own = class_names(self.schema, column)
        if own is None or own == names.names:
            return labels
        return names.renumbered(labels, own, self.path)

    def marks(self, column: str) -> torch.Tensor:
        """(rows,) bool, a column of truth values; false if there is none.

        Raises:
            DataError: the column holds something else.
        """
        if column not in self.schema.names:
            return torch.zeros(self.num_rows, dtype=torch.bool)
        kind = self.schema.field(column).type
        if not pa.types.is_boolean(kind) and not pa.types.is_integer(kind):
            raise DataError(f"{self.path}: column {column}: expected truth values, got {kind}")
        with readable(f"{self.path}: expected a readable Parquet file"):
            marks = self._file.read(columns=[column]).column(column).cast("int64").fill_null(0)
            return torch.tensor(marks.to_numpy() != 0)

    def images(self, column: str, at_once: int) -> Iterator[list[bytes | None]]:
        """Lists of encoded images, in order; of the first one next to nothing else is read."""
        self._require("image", column, _is_image)
        is_struct = pa.types.is_struct(self.schema.field(column).type)
        with readable(f"{self.path}: expected a readable Parquet file"):
            for batch in self._file.iter_batches(at_once, columns=[f"{column}.bytes" if is_struct else column]):
                values = batch.column(0)
                yield (pc.struct_field(values, "bytes") if is_struct else values).to_pylist()

    def _require(self, role: str, column: str, fits: Callable[[pa.DataType], bool]) -> None:
        """The files of a data set may differ from the first, whose columns were chosen."""
        if column not in self.schema.names or not fits(self.schema.field(column).type):
            raise _no_column(self.path, role, column, self.schema)


@dataclass(frozen=True)
class ClassNames:
    """Class names of a data set, None where they are not stated, and where they stand."""

    path: str
    names: list[str] | None

    @classmethod
    def first(cls, shards: list[ParquetShard], label_column: str) -> "ClassNames":
        """Those of the first file that states any."""
        stated = ((shard.path, class_names(shard.schema, label_column)) for shard in shards)
        return next((cls(path, names) for path, names in stated if names), cls("", None))

    def renumbered(self, labels: torch.Tensor, own: list[str], path: str) -> torch.Tensor:
        """Labels of a file with class names `own`, as numbers of the same names here.

        Raises:
            DataError: a name that is not known here, or a label without a name.
        """
        unknown = [name for name in own if name not in self.names]
        if unknown or len(set(own)) != len(own):
            raise DataError(
                f"{path}: expected the class names of {self.path} ({_few(self.names)}), came {_few(unknown or own)}"
            )
        wrong = ((labels < 0) | (labels >= len(own))).nonzero().flatten()
        if len(wrong):
            raise DataError(
                f"{path}, row {wrong[0]}: expected a class label from 0 to {len(own) - 1}, came {labels[wrong[0]]}"
            )
        return torch.tensor([self.names.index(name) for name in own])[labels]


def load_parquet(request: DataRequest) -> Catalogue:
    """The source "parquet"; see `genray.data.datasets.load_image_data`. Rows count from 0 in messages."""
    shards = find_shards(Folder(request.require_path()), request.reading)
    schema = shards["train"][0].schema
    image_column, label_column = find_columns(schema, request.image_column, request.label_column)
    names = ClassNames.first([shard for part in PARTS for shard in shards[part]], label_column)
    pieces = {part: [shard.labels(label_column, names) for shard in shards[part]] for part in PARTS}
    labels = {part: torch.cat(pieces[part]) for part in PARTS}

    def locate(part, index):
        for shard, piece in zip(shards[part], pieces[part], strict=True):
            if index < len(piece):
                return f"{shard.path}, row {index}"
            index -= len(piece)

    class_names = resolve_classes(labels, names.names, locate)
    parts = {}
    for part in PARTS:
        taken = labels[part][: request.count(part, len(labels[part]))].clone()
        parts[part] = Part(taken, *stored_images(shards[part], image_column, len(taken), request))
    return Catalogue(parts, class_names, {"image_column": image_column, "label_column": label_column})


def stored_images(shards: list[ParquetShard], column: str, count: int, request: DataRequest):
    """What a `Part` of the first `count` images has behind its labels."""

    def lists(at_once):
        missing = count
        for shard in shards:
            for blobs in shard.images(column, at_once) if missing else ():
                yield blobs[:missing]
                missing -= len(blobs[:missing])
                if not missing:
                    break

    def read(target=None):
        stack, done = ImageStack(count, request.image_size, request.reading, target, skip=request.skips), 0
        for blobs in lists(_ROWS_AT_ONCE):
            stack.append(blobs, lambda index, done=done: row_name(places, done + index))
            done += len(blobs)
        return stack.finish(), stack.broken

    def mark():
        found = [[os.path.basename(shard.path), shard.num_rows, shard.size_and_time] for shard in shards]
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]

    def blobs():
        return chain.from_iterable(lists(_ROWS_AT_ONCE))

    places = [(shard.path, shard.num_rows) for shard in shards]
    singly = ((row_name(places, index), blob) for index, blob in enumerate(chain.from_iterable(lists(1))))
    return shape_of(singly, request.image_size, request.skips), read, mark, None, blobs, places


def find_shards(folder: Folder, reading: Reading) -> dict[str, list[ParquetShard]]:
    """The files of each split in order of their names, from the folder itself or else its sub-folder `data`.

    `validation-*` serves as the test split where there is no `test-*`. Other Parquet files are left out.

    Raises:
        DataError: a split has no file, or of its numbered files (-00000-of-00002) some are missing.
    """
    others = []
    for below in ("", "data"):
        found = _files(folder, below)
        others += found.pop("", [])
        if found:
            break
    if "test" not in found:
        found["test"] = found.pop("validation", [])
    for path in [*others, *found.get("validation", ())]:
        reading.leave_out(f"file {path.rpartition('/')[2]}")
    for part in PARTS:
        if not found.get(part):
            others = " or validation-*.parquet" if part == "test" else ""
            raise DataError(
                f"data.path: expected files {part}-*.parquet{others} in {folder.root} or its sub-folder data, came none"
            )
        _check_complete(found[part])
    return {part: [ParquetShard(folder, path) for path in found[part]] for part in PARTS}


def lone_shards(path) -> list[ParquetShard]:
    """A Parquet file, or those of a folder without parts: from the folder itself or else its sub-folder `data`, in
    order of their names, train-*.parquet, or where there are none all that are no test or validation part.

    Raises:
        DataError: there are none, or of numbered files some are missing.
    """
    with readable("data.path: expected Parquet files"):
        if str(path).endswith(".parquet") and (file := Storage(path)).is_file():
            return [ParquetShard(Folder(file.parent), file.root)]
    folder = Folder(path)
    for below in ("", "data"):
        found = _files(folder, below)
        if paths := found.get("train") or found.get(""):
            _check_complete(paths)
            return [ParquetShard(folder, path) for path in paths]
    raise DataError(f"data.path: expected files *.parquet in {folder.root} or its sub-folder data, came none")


def _files(folder, below):
    """Part -> its Parquet files in order of their names; "" for those of none."""
    found: dict[str, list[str]] = {}
    for info in folder.list(below):
        if info.base_name.endswith(".parquet"):
            match = _SHARD.fullmatch(info.base_name)
            found.setdefault(match[1] if match else "", []).append(info.path)
    return found


def find_columns(schema: pa.Schema, image: str | None = None, label: str | None = None) -> tuple[str, str]:
    """Names of the image and the label column; those given are checked, the others found by their types.

    Raises:
        DataError: a given column is absent or of another type, or none or several fit; lists all columns.
    """
    return (
        find_image_column(schema, image),
        _pick(schema, "label", "an integer column", label, _LABEL_NAMES, pa.types.is_integer),
    )


def find_image_column(schema: pa.Schema, given: str | None = None) -> str:
    """Name of the image column, as in `find_columns`."""
    wanted = "a struct column with the field bytes, or a binary column"
    return _pick(schema, "image", wanted, given, _IMAGE_NAMES, _is_image, first=_is_image_struct)


def class_names(schema: pa.Schema, label_column: str) -> list[str] | None:
    """Class names from the schema's `huggingface` metadata, None where it does not say."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, ValueError, TypeError):  # names are decoration: data written without them is fine
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _pick(schema, role, wanted, given, usual, fits, first=None) -> str:
    """The column that is given; else the one with a usual name; else the only one of a fitting type.

    A column with a usual name that does not fit is what the user means, so no other one is taken in its place.
    """
    fitting = [field.name for field in schema if fits(field.type) and field.name != _PANDAS_INDEX]
    if given is not None:
        if given not in fitting:
            raise _no_column("data", role, given, schema, wanted)
        return given
    meant = next((field for name in usual for field in schema if field.name.lower() == name), None)
    if meant is not None:
        if meant.name not in fitting:
            raise DataError(
                f"data.{role}_column: expected {wanted}, came {meant.name!r} of type {meant.type}; name another one, "
                f"the columns are {_columns(schema)}"
            )
        return meant.name
    candidates = [field.name for field in schema if first and first(field.type)] or fitting
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


def _few(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    return _is_image_struct(kind) or _is_binary(kind)


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
