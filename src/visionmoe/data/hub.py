"""Data sets of the Hugging Face hub, read over the network as needed: row group by row group, nothing kept on disk.

The `datasets` library says which parquet files a data set consists of. Their footers and label columns are read once
and kept in the user's cache; after that any image can be had by its number, as in local parquet files, and order,
processes and resuming are the same. See decisions/0014-shards-and-streams.md for why `datasets` does not stream here.
"""

import functools
import importlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem

from visionmoe.data.columns import class_labels, metadata_class_names, needs_all_splits, pick_columns
from visionmoe.data.indexing import alone, each, kept_below
from visionmoe.data.parquet import FileIndex, ParquetSource, index_file, label_column, open_file
from visionmoe.data.sources import DEFAULT_CACHE
from visionmoe.data.splits import canonical_name, parse_split
from visionmoe.files import atomic_write, one_line

_REMOTE = "hf://"
_KEY = b"visionmoe"  # of the schema's metadata, under which an index keeps its row groups


class HubSource(ParquetSource):
    """Rows of parquet files of the hub. A network that fails ends the run, which resumes; it loses no images."""

    def __init__(self, hub: HfFileSystem, files: list[str], *arguments: Any):
        super().__init__(files, *arguments)
        self._hub = hub

    def _open(self, file: int) -> pq.ParquetFile:
        return _open_remote(self._hub, str(self.files[file]), self._footers.get(file))

    def _column(self, file: int, group: int) -> pa.ChunkedArray:
        try:
            return self._fetch(file, group)
        except Exception as error:  # the network's errors are of many kinds, Arrow's of two
            what = f"row group {group} of {self.files[file]} cannot be read: {one_line(error)}"
            if isinstance(error, pa.ArrowException) or type(error) is OSError:
                raise OSError(what) from None
            raise ValueError(what) from None


def open_hub(
    name: str,
    split: str,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    revision: str | None = None,
) -> tuple[ParquetSource, str | None, str | None]:
    """The rows of a data set of the hub, or of a folder laid out as one, and the boundaries of the slice of `split`.

    revision: a branch or commit; without one a later start reads what is then the newest. Raises ValueError or OSError.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError("hf-stream: data needs the package datasets (pip install datasets)") from None
    where = f"hf-stream:{name}"
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
    except Exception as error:  # of datasets, huggingface_hub and the network, some of several lines
        raise ValueError(f"{where}: {one_line(error)}") from None
    splits = _parquet_files(where, builder.config.data_files)
    which, start, stop = parse_split(split, splits)
    hub = HfFileSystem() if splits[which][0].startswith(_REMOTE) else None
    opened: Callable[[str], pq.ParquetFile] = functools.partial(_open_remote, hub) if hub else open_file
    schema = _tried(opened, splits[which][0]).schema_arrow
    image, label = pick_columns(where, schema, image, label)
    names = getattr((builder.info.features or {}).get(label), "names", None) or metadata_class_names(schema, label)
    keys = splits if needs_all_splits(schema, label, names) else [which]
    indices = {key: _indices(where, splits[key], label, opened, keep=hub is not None) for key in keys}
    labels, class_names = class_labels(where, {key: label_column(found) for key, found in indices.items()}, names)
    rest = indices[which], image, labels[which], class_names
    source = HubSource(hub, splits[which], *rest) if hub else ParquetSource(splits[which], *rest)
    return source, start, stop


def _parquet_files(where: str, data_files: Mapping[Any, list[str]] | None) -> dict[str, list[str]]:
    """The data set's files by split. ValueError where they are not parquet, or not the whole data set."""
    splits = {canonical_name(str(split)): [str(file) for file in files] for split, files in (data_files or {}).items()}
    other = next((file for files in splits.values() for file in files if not file.endswith(".parquet")), None)
    if other or not splits:
        found = f"such as {other.rpartition('/')[2]}" if other else "none"
        hint = "?revision=refs/convert/parquet names the hub's own conversion, hf: downloads the files as they are"
        raise ValueError(f"{where} must consist of parquet files, its files are {found}; {hint}")
    partial = next((file for files in splits.values() for file in files if "/partial-" in file), None)
    if partial:
        raise ValueError(f"{where}: the hub has converted only a part of it ({partial.rpartition('/')[0]})")
    return splits


def _indices(
    where: str, files: list[str], label: str, opened: Callable[[str], pq.ParquetFile], *, keep: bool
) -> list[FileIndex]:
    """The index of every file: as kept, else found, and kept where asked. Files of the hub are named with a commit."""
    work = functools.partial(_index, opened, label)
    title = f"reading the labels of {where}"
    if not keep:
        return [index for _, index in each(title, files, work)]
    path = kept_below(DEFAULT_CACHE, json.dumps([label, files]), ".parquet")
    if not (found := _kept_indices(path)):
        with alone([path.with_suffix(".lock")]):
            if not (found := _kept_indices(path)):
                found = [index for _, index in each(title, files, work)]
                groups = json.dumps([[index.rows, index.sizes] for index in found]).encode()
                table = pa.table({label: label_column(found)}).replace_schema_metadata({_KEY: groups})
                with atomic_write(path) as temporary:
                    pq.write_table(table, temporary)
    return found


def _index(opened: Callable[[str], pq.ParquetFile], label: str, file: str) -> FileIndex:
    return index_file(_tried(opened, file), label, file)


def _kept_indices(path: Path) -> list[FileIndex]:
    """None are kept where the file is missing or damaged."""
    try:
        table = pq.read_table(path, use_threads=False)
        groups = json.loads(table.schema.metadata[_KEY])
        starts = np.cumsum([0, *(sum(rows) for rows, _ in groups)]).tolist()
        if starts[-1] != table.num_rows:
            return []
        parts = [table.column(0).slice(first, last - first) for first, last in itertools.pairwise(starts)]
        return [FileIndex(rows, sizes, part) for (rows, sizes), part in zip(groups, parts, strict=True)]
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return []


def _open_remote(hub: HfFileSystem, file: str, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    # Arrow asks for whole column chunks; reading ahead of them would fetch what nobody needs.
    return pq.ParquetFile(hub.open(file, "rb", cache_type="none"), metadata=footer)


def _tried(opened: Callable[[str], pq.ParquetFile], file: str) -> pq.ParquetFile:
    try:
        return opened(file)
    except Exception as error:  # of the network, of Arrow, of the hub
        raise ValueError(f"{file} is not a readable parquet file: {one_line(error)}") from None
