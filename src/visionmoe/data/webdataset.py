"""WebDataset shards: tar files in which the members of a sample stand together, as 0001.jpg and 0001.cls.

Every shard is read through once, for an index of where its images lie; after that an image is one read from a known
place. So any image can be had by its number, and order, processes and resuming are those of every other source.
"""

import glob
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from tarfile import HeaderError, TarInfo

import numpy as np

from visionmoe.data.order import Pieces
from visionmoe.data.sources import Source
from visionmoe.data.splits import files_by_split, parse_split
from visionmoe.data.tarindex import ShardIndex, expand_braces, read_indices

FEW_SHARDS = 64  # up to so many stay open, and images come from all of them in any order
_AT_ONCE = 256  # of more shards, so many are read at a time
_OPEN = 256  # files that a process keeps open


class WebDatasetSource(Source):
    """Images in tar files. shards: the files; indices: what each of them holds."""

    def __init__(self, shards: list[Path], indices: list[ShardIndex], class_names: tuple[str, ...]):
        starts = np.cumsum([0, *(len(index.labels) for index in indices)])
        pieces = Pieces(np.unique(starts), _AT_ONCE) if len(shards) > FEW_SHARDS else None
        super().__init__(np.concatenate([index.labels for index in indices]), class_names, pieces)
        self.shards, self._starts = shards, starts
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._set_up()

    def _set_up(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor; the last used is the last
        weakref.finalize(self, _close, self._open)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._set_up()

    def read(self, index: int) -> bytes:
        return self._read(index, int(self._offsets[index]), int(self._sizes[index]))

    def name(self, index: int) -> str:
        offset = int(self._offsets[index])
        try:
            member = TarInfo.frombuf(self._read(index, offset - 512, 512), "utf-8", "surrogateescape").name
        except (HeaderError, OSError):
            member = f"byte {offset}"
        return f"{self.shards[self._shard(index)]} {member}"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """Bytes of the image's shard. pread knows no position, so processes made by fork share descriptors safely."""
        shard = self._shard(index)
        if shard not in self._open:
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > _OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        data = os.pread(self._open[shard], size, offset)
        if len(data) < size:
            raise OSError("the shard is shorter than when it was indexed")
        return data


def open_wds(pattern: str, split: str) -> tuple[WebDatasetSource, str | None, str | None]:
    """The images of the shards that `pattern` names, and the boundaries of the slice that `split` asks for.

    pattern: paths of tar files or of folders of such, joined by "::", with {000..127}, {a,b}, * and [...]. Classes are
    named by classes.txt (a name per line, class 0 first) beside the first shard, else by their numbers.
    Raises ValueError or OSError that names the shard.
    """
    shards = find_shards(pattern)
    splits = files_by_split(shards, Path(os.path.commonpath([shard.parent for shard in shards])), anywhere=True)
    name, start, stop = parse_split(split, splits)
    names = _class_names(shards[0].parent / "classes.txt")
    needed = splits[name] if names else shards  # the number of classes is that of all splits
    found = dict(zip(needed, read_indices(needed), strict=True))
    highest = max((int(index.labels.max(initial=-1)) for index in found.values()), default=-1)
    names = names or tuple(str(i) for i in range(highest + 1))
    if highest >= len(names):
        raise ValueError(f"wds:{pattern}: label {highest} has no name, classes.txt has {len(names)}")
    return WebDatasetSource(splits[name], [found[shard] for shard in splits[name]], names), start, stop


def find_shards(pattern: str) -> list[Path]:
    """The tar files that a pattern names, each once, in order. Raises ValueError or FileNotFoundError."""
    shards: dict[Path, None] = {}
    missing = []
    for path in (path for part in pattern.split("::") for path in expand_braces(part)):
        if "://" in path or path.startswith("pipe:"):
            raise ValueError(f"wds: shards must be files of a local or shared disk, got {path}")
        if os.path.isdir(path):
            found = sorted(os.path.join(where, name) for where, _, names in os.walk(path) for name in names)
            found = [file for file in found if file.endswith(".tar") and not os.path.basename(file).startswith(".")]
        elif os.path.exists(path):
            found = [path]
        else:
            found = sorted(glob.glob(path))
        missing += [] if found else [path]
        shards.update((Path(os.path.abspath(file)), None) for file in found)
    if missing:
        more = f" ({len(missing)} are missing)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"there is no shard (tar file) {missing[0]}{more}")
    return list(shards)


def _class_names(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return ()
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{file} must hold one class name per line, each once")
    return names


def _close(descriptors: "OrderedDict[int, int]") -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
    descriptors.clear()
