"""Images in parquet files, as Hugging Face writes them: encoded bytes (or {bytes, path}) beside a label."""

import bisect
import os
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np

from visionmoe.data.decode import one_line
from visionmoe.data.sources import Source
from visionmoe.data.splits import canonical_name, parse_split

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from visionmoe.data.columns import class_labels, metadata_class_names, pick_columns
except ImportError:
    raise ValueError("parquet: data needs the package pyarrow (pip install pyarrow)") from None

WHOLE_BYTES = 1 << 30  # columns of images up to this size are read once and kept
KEPT_GROUPS = 8  # of larger ones, this many row groups per process
_SPLIT_NAME = re.compile(r"(train|training|test|testing|val|valid|validation|dev)(?![a-z])")


class ParquetSource(Source):
    """Rows of parquet files. Row groups are read when first needed; all are kept only where they are small together."""

    def __init__(self, files: list[Path], column: str, labels: np.ndarray, class_names: tuple[str, ...]):
        super().__init__(labels, class_names)
        self.files, self.column = files, column
        self._group: list[tuple[int, int]] = []  # (file, row group) of every row group, in order
        self._start = [0]  # first row of every row group, and the number of rows
        size = 0
        for number, file in enumerate(files):
            meta = _open(file).metadata
            for group in range(meta.num_row_groups):
                self._group.append((number, group))
                self._start.append(self._start[-1] + meta.row_group(group).num_rows)
                size += meta.row_group(group).total_byte_size
        self._limit = len(self._group) if size <= WHOLE_BYTES else KEPT_GROUPS
        self._kept: OrderedDict[int, dict[str, pa.ChunkedArray]] = OrderedDict()

    def read(self, index: int) -> bytes:
        number = bisect.bisect_right(self._start, index) - 1
        row = index - self._start[number]
        group = self._read(number)
        data = group["bytes"][row].as_py()
        path = group["path"][row].as_py() if data is None and "path" in group else None
        if path:
            return (self.files[self._group[number][0]].parent / path).read_bytes()
        if data is None:
            raise OSError("the row holds no image")
        return data

    def name(self, index: int) -> str:
        number = bisect.bisect_right(self._start, index) - 1
        file = self._group[number][0]
        first = next(s for s, (f, _) in zip(self._start, self._group, strict=False) if f == file)
        return f"{self.files[file]} row {index - first}"

    def _read(self, number: int) -> "dict[str, pa.ChunkedArray]":
        """The columns "bytes" and, where there is one, "path" of a row group."""
        if number not in self._kept:
            file, group = self._group[number]
            try:  # Opened anew: processes must not share a file's position. No threads: Arrow's do not survive fork.
                table = _open(self.files[file]).read_row_group(group, columns=[self.column], use_threads=False)
            except (pa.ArrowException, ValueError, OSError) as error:
                raise OSError(f"row group {group} cannot be read: {one_line(error)}") from None
            column = table.column(0)
            if pa.types.is_struct(column.type):
                fields = [column.type.field(i).name for i in range(column.type.num_fields)]
                self._kept[number] = {f: pc.struct_field(column, f) for f in ("bytes", "path") if f in fields}
            else:
                self._kept[number] = {"bytes": column}
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


def open_parquet(
    path: Path, split: str, image: str | None = None, label: str | None = None
) -> tuple[ParquetSource, str | None, str | None]:
    """The rows of a file or of a folder's files, and the boundaries of the slice that `split` asks for."""
    splits = find_splits(path)
    name, start, stop = parse_split(split, splits)
    schema = _open(splits[name][0]).schema_arrow
    image, label = pick_columns(str(path), schema, image, label)
    columns = {key: _label_column(files, label) for key, files in splits.items()}
    labels, class_names = class_labels(str(path), columns, metadata_class_names(schema, label))
    return ParquetSource(splits[name], image, labels[name], class_names), start, stop


def find_splits(path: Path) -> dict[str, list[Path]]:
    """Parquet files by split, which their own name (train-00000-of-00005, test) or their folder's begins with.

    Where no name says a split, all files are "train".
    """
    if path.is_file():
        return {_split_name(path, path.parent) or "train": [path]}
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = sorted(Path(where) / name for where, _, names in os.walk(path) for name in names)
    files = [file for file in files if file.suffix == ".parquet" and not file.name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"there are no .parquet files in {path}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_name(file, path) or "", []).append(file)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        raise ValueError(f"{unnamed[0]} must say its split: a name that begins with train, test or val")
    return splits or {"train": unnamed}


def _split_name(file: Path, root: Path) -> str | None:
    for part in (file.stem, *reversed(file.relative_to(root).parts[:-1])):
        if match := _SPLIT_NAME.match(part.lower()):
            return canonical_name(match[1])
    return None


def _label_column(files: list[Path], label: str) -> "pa.ChunkedArray":
    parts = []
    for file in files:
        parquet = _open(file)
        if label not in parquet.schema_arrow.names:
            raise ValueError(f"{file} has no column {label!r}, there are {', '.join(parquet.schema_arrow.names)}")
        parts.append(parquet.read(columns=[label], use_threads=False).column(0))
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=parts[0].type)


def _open(file: Path) -> "pq.ParquetFile":
    try:
        return pq.ParquetFile(file, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {one_line(error)}") from None
