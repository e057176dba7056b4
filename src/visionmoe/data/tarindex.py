"""Where the images of tar shards lie, found once and kept beside the shards."""

import contextlib
import itertools
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from visionmoe.data.decode import SUFFIXES
from visionmoe.data.indexing import alone, each, kept_below
from visionmoe.data.sources import DEFAULT_CACHE
from visionmoe.files import atomic_write, one_line

_log = logging.getLogger(__name__)
INDEX_NAME = ".visionmoe-index.npz"
_MEMBER = re.compile(
    r"((?:.*/)?[^./][^/.]*)\.([^/]+)"
)  # WebDataset's: the key ends at the first dot of the file's name
_PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")
_LONGEST_LABEL = 1 << 20  # bytes of a .cls or .json
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class ShardIndex:
    """offsets, sizes: bytes, int64 (N,), of the images in the shard; labels: int64 (N,); pickles: members not read."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    pickles: int = 0


@dataclass
class _Sample:
    """The members of one key. image: (offset, size); kinds: the suffixes of all that were seen."""

    image: tuple[int, int] | None = None
    labels: dict[str, int] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)


Stamp = tuple[int, int]  # size and time of change (ns): another one, and the shard is indexed anew


def read_indices(shards: list[Path]) -> list[ShardIndex]:
    """The index of every shard: as kept, else found and kept. Raises ValueError or OSError that names the shard."""
    stamps = {shard: _stamp(shard) for shard in shards}
    found: dict[Path, ShardIndex] = {}
    for folder in sorted({shard.parent for shard in shards}):
        here = {shard: stamps[shard] for shard in shards if shard.parent == folder}
        known = _current(here)
        if len(known) < len(here):
            with alone([file.with_suffix(".lock") for file in _files(folder)]):
                known = _current(here)  # another process of the job may have found it meanwhile
                known |= _found(folder, [shard for shard in here if shard not in known], stamps)
        found |= known
    pickles = sum(found[shard].pickles for shard in shards)
    if pickles:
        _log.warning("%s: %d members are pickles (.%s), which are never read", shards[0].parent, pickles, _PICKLES[0])
    return [found[shard] for shard in shards]


def _current(stamps: dict[Path, Stamp]) -> dict[Path, ShardIndex]:
    """Those of a folder's shards whose index is kept and still holds."""
    kept = _kept(next(iter(stamps)).parent)
    return {s: kept[s.name][1] for s, stamp in stamps.items() if s.name in kept and kept[s.name][0] == stamp}


def _found(folder: Path, shards: list[Path], stamps: dict[Path, Stamp]) -> dict[Path, ShardIndex]:
    found: dict[Path, ShardIndex] = {}
    try:
        for shard, index in each(f"indexing shards in {folder}", shards, index_shard) if shards else ():
            found[shard] = index
    finally:  # what is found stays found when the rest is interrupted
        if found:
            _keep(folder, {shard.name: (stamps[shard], index) for shard, index in found.items()})
    return found


def index_shard(path: Path) -> ShardIndex:
    """Reads the headers and the labels of a shard. Raises ValueError for one that is damaged or lacks labels."""
    samples: dict[str, _Sample] = {}
    pickles = 0
    with open(path, "rb", buffering=1 << 13) as stream:  # a label and the next header are mostly one read
        for member in _members(path, stream):
            match = _MEMBER.fullmatch(member.name)
            if not match or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                continue
            sample, kind = samples.setdefault(match[1], _Sample()), match[2].lower()
            if kind in sample.kinds:
                raise ValueError(f"{path} has two members {member.name}")
            sample.kinds.add(kind)
            if kind in ("cls", "json"):
                label = _label(f"{path} {member.name}", kind, stream, member)
                sample.labels |= {} if label is None else {kind: label}
            elif f".{kind}" in SUFFIXES and sample.image is None:
                sample.image = member.offset_data, member.size
            pickles += kind.rpartition(".")[2] in _PICKLES
    samples = {key: sample for key, sample in samples.items() if sample.image}
    unlabelled = next((key for key, sample in samples.items() if not sample.labels), None)
    if unlabelled is not None:
        needed = 'a member .cls (a class number), or .json with a number "label"'
        raise ValueError(f"{path}: sample {unlabelled} has no label: {needed}")
    places = np.array([sample.image for sample in samples.values()], np.int64).reshape(-1, 2)
    labels = np.array([s.labels.get("cls", s.labels.get("json")) for s in samples.values()], np.int64)
    return ShardIndex(places[:, 0], places[:, 1], labels, pickles)


def expand_braces(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" -> a-08.tar, a-09.tar, a-10.tar; {x,y} stands for x and y. Raises ValueError."""
    parts = _BRACES.split(pattern)
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(inner: str) -> list[str]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if match and int(match[1]) <= int(match[2]):
        return [f"{number:0{len(match[1])}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    if match or "," not in inner:
        raise ValueError(f"braces must look like {{000..127}} or {{train,val}}, got {{{inner}}}")
    return inner.split(",")


def _members(path: Path, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file that ends as it should; tarfile itself takes much for an end."""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:  # it would lead back, and round and round
                    raise tarfile.ReadError(f"{member.name} has a size below zero")
                yield member
            stream.seek(tar.offset)
    except (tarfile.TarError, EOFError) as error:
        stream.seek(0)
        if stream.read(2) == b"\x1f\x8b":
            raise ValueError(
                f"{path} is compressed: images are read from their places, which needs a plain tar"
            ) from None
        raise ValueError(f"{path} is cut off or no tar file: {one_line(error)}") from None
    if stream.read(512) != bytes(512):
        raise ValueError(f"{path} is cut off or damaged at byte {tar.offset}: a tar file ends with zeros")


def _label(where: str, kind: str, stream: BinaryIO, member: tarfile.TarInfo) -> int | None:
    """A .cls is a number; of a .json the number "label", None where it has none."""
    stream.seek(member.offset_data)
    text = stream.read(min(member.size, _LONGEST_LABEL))
    try:
        value = int(text) if kind == "cls" else json.loads(text)
    except (ValueError, RecursionError):
        needed = "a class number (0, 1, ...)" if kind == "cls" else "JSON"
        raise ValueError(f"{where} must hold {needed}, got {text[:20]!r}") from None
    if kind == "json":
        value = value.get("label") if isinstance(value, dict) else None
        if value is None:
            return None
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{where} must hold a class number (0, 1, ...), got {value!r}")
    return value


def _stamp(shard: Path) -> Stamp:
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns


def _files(folder: Path) -> list[Path]:
    """Where a folder's index may be: in it, or in the user's cache where it cannot be written."""
    return [folder / INDEX_NAME, kept_below(DEFAULT_CACHE, str(folder), ".npz")]


def _kept(folder: Path) -> dict[str, tuple[Stamp, ShardIndex]]:
    """By the shards' names. A file that cannot be used is as none."""
    entries: dict[str, tuple[Stamp, ShardIndex]] = {}
    for file in _files(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile):
            entries |= _read_index(file)
    return entries


def _read_index(file: Path) -> dict[str, tuple[Stamp, ShardIndex]]:
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
        names, stamps, pickles, counts, images = (
            data[key] for key in ("names", "stamps", "pickles", "counts", "images")
        )
    cuts = np.cumsum(counts)
    if images.shape != (cuts[-1], 3) or images.dtype != np.int64 or images.min(initial=0) < 0:
        raise ValueError(f"{file} is no index")
    indices = [
        ShardIndex(part[:, 0].copy(), part[:, 1].copy(), part[:, 2].copy(), int(count))
        for part, count in zip(np.split(images, cuts[:-1]), pickles, strict=True)
    ]
    pairs = zip([(int(size), int(time)) for size, time in stamps], indices, strict=True)
    return dict(zip(names.tolist(), pairs, strict=True))


def _keep(folder: Path, new: dict[str, tuple[Stamp, ShardIndex]]) -> None:
    entries = _kept(folder) | new  # read again: another process may have kept others meanwhile
    indices = [index for _, index in entries.values()]
    table: dict[str, Any] = {
        "names": np.array(list(entries)),
        "stamps": np.array([stamp for stamp, _ in entries.values()], np.int64),
        "pickles": np.array([index.pickles for index in indices], np.int64),
        "counts": np.array([len(index.labels) for index in indices], np.int64),
        "images": np.concatenate([np.stack([i.offsets, i.sizes, i.labels], axis=1) for i in indices]),
    }
    for file in _files(folder):
        try:
            with atomic_write(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **table)
            return
        except OSError as error:
            reason = one_line(error)
    _log.warning("the index of %s cannot be kept, so the next start finds it anew: %s", folder, reason)
