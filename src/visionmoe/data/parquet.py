"""Images in parquet files, as Hugging Face writes them: encoded bytes (or {bytes, path}) beside a label."""

import bisect
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visionmoe.data.order import PHASES, Pieces
from visionmoe.data.sources import Source
from visionmoe.data.splits import files_by_split, parse_split
from visionmoe.files import one_line

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from visionmoe.data.columns import class_labels, metadata_class_names, needs_all_splits, pick_columns
except ImportError:
    raise ValueError("parquet: data needs the package pyarrow (pip install pyarrow)") from None

WHOLE_BYTES = 1 << 30  # images up to this size are read once and kept
AT_ONCE_BYTES = 1 << 30  # of larger ones, all processes together keep about so many bytes of row groups
_MOST_AT_ONCE = 256
KEPT_GROUPS = 8  # and each process at least so many row groups


@dataclass(frozen=True)
class FileIndex:
    """rows, sizes (bytes): of each row group. labels: the label column."""

    rows: list[int]
    sizes: list[int]
    labels: "pa.ChunkedArray"


class ParquetSource(Source):
    """Rows of parquet files. Row groups are read when first needed; all are kept only where they are small together.

    Else epochs take row groups a few at a time (`order`), and those that the last batches did not need are forgotten.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        indices: Sequence[FileIndex],
        column: str,
        labels: np.ndarray,
        class_names: tuple[str, ...],
    ):
        self.files, self.column = files, column
        self._group = [(n, group) for n, index in enumerate(indices) for group in range(len(index.rows))]
        self._start = np.cumsum([0, *(rows for index in indices for rows in index.rows)]).tolist()
        size = sum(sum(index.sizes) for index in indices)
        self._whole = size <= WHOLE_BYTES
        at_once = min(max(AT_ONCE_BYTES * len(self._group) // max(size, 1), 1), _MOST_AT_ONCE)
        self._limit = len(self._group) if self._whole else max(2 * at_once, KEPT_GROUPS)
        super().__init__(labels, class_names, None if self._whole else Pieces(np.unique(self._start), at_once))
        self._kept: OrderedDict[int, dict[str, pa.ChunkedArray]] = OrderedDict()
        self._batch = 0
        self._used: dict[int, int] = {}  # row group that is kept -> the last batch that needed it
        self._footers: dict[int, pq.FileMetaData] = {}

    def read(self, index: int) -> bytes:
        number = bisect.bisect_right(self._start, index) - 1
        row = index - self._start[number]
        group = self._read(number)
        data = group["bytes"][row].as_py()
        path = group["path"][row].as_py() if data is None and "path" in group else None
        if path:
            return (Path(self.files[self._group[number][0]]).parent / path).read_bytes()
        if data is None:
            raise OSError("the row holds no image")
        return data

    def name(self, index: int) -> str:
        number = bisect.bisect_right(self._start, index) - 1
        file = self._group[number][0]
        first = next(s for s, (f, _) in zip(self._start, self._group, strict=False) if f == file)
        return f"{self.files[file]} row {index - first}"

    def batch_done(self) -> None:
        self._batch += 1
        if not self._whole:
            for number in [n for n, batch in self._used.items() if batch < self._batch - PHASES]:
                del self._used[number]
                self._kept.pop(number, None)

    def _read(self, number: int) -> "dict[str, pa.ChunkedArray]":
        """The columns "bytes" and, where there is one, "path" of a row group."""
        if number not in self._kept:
            column = self._column(*self._group[number])
            if pa.types.is_struct(column.type):
                fields = [column.type.field(i).name for i in range(column.type.num_fields)]
                self._kept[number] = {f: pc.struct_field(column, f) for f in ("bytes", "path") if f in fields}
            else:
                self._kept[number] = {"bytes": column}
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        self._used[number] = self._batch
        return self._kept[number]

    def _column(self, file: int, group: int) -> "pa.ChunkedArray":
        """The images of a row group. Raises OSError."""
        try:
            return self._fetch(file, group)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise OSError(f"row group {group} cannot be read: {one_line(error)}") from None

    def _fetch(self, file: int, group: int) -> "pa.ChunkedArray":
        # Opened anew: processes must not share a file's position. No threads: Arrow's do not survive fork.
        with self._open(file) as parquet:
            self._footers[file] = parquet.metadata
            return parquet.read_row_group(group, columns=[self.column], use_threads=False).column(0)

    def _open(self, file: int) -> "pq.ParquetFile":
        return pq.ParquetFile(self.files[file], memory_map=False, metadata=self._footers.get(file))


def open_parquet(
    path: Path, split: str, image: str | None = None, label: str | None = None
) -> tuple[ParquetSource, str | None, str | None]:
    """The rows of a file or of a folder's files, and the boundaries of the slice that `split` asks for."""
    splits = find_splits(path)
    name, start, stop = parse_split(split, splits)
    schema = open_file(splits[name][0]).schema_arrow
    image, label = pick_columns(str(path), schema, image, label)
    class_names = metadata_class_names(schema, label)
    keys = splits if needs_all_splits(schema, label, class_names) else [name]
    indices = {key: [index_file(open_file(file), label, str(file)) for file in splits[key]] for key in keys}
    columns = {key: label_column(found) for key, found in indices.items()}
    labels, names = class_labels(str(path), columns, class_names)
    return ParquetSource(splits[name], indices[name], image, labels[name], names), start, stop


def find_splits(path: Path) -> dict[str, list[Path]]:
    """Parquet files by split, which their own name (train-00000-of-00005, test) or their folder's begins with.

    Where no name says a split, all files are "train".
    """
    if path.is_file():
        return files_by_split([path], path.parent)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = sorted(Path(where) / name for where, _, names in os.walk(path) for name in names)
    files = [file for file in files if file.suffix == ".parquet" and not file.name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"there are no .parquet files in {path}")
    return files_by_split(files, path)


def index_file(parquet: "pq.ParquetFile", label: str, name: str) -> FileIndex:
    """What a file holds, from its footer and its label column. Raises ValueError where it has no such column."""
    if label not in parquet.schema_arrow.names:
        raise ValueError(f"{name} has no column {label!r}, there are {', '.join(parquet.schema_arrow.names)}")
    groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
    labels = parquet.read(columns=[label], use_threads=False).column(0)
    return FileIndex([group.num_rows for group in groups], [group.total_byte_size for group in groups], labels)


def label_column(indices: Sequence[FileIndex]) -> "pa.ChunkedArray":
    """The label columns of files, one after the other."""
    return pa.chunked_array([c for index in indices for c in index.labels.chunks], type=indices[0].labels.type)


def open_file(file: str | Path) -> "pq.ParquetFile":
    """Raises ValueError for what is no parquet file."""
    try:
        return pq.ParquetFile(file, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {one_line(error)}") from None
