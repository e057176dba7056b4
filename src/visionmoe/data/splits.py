"""Split strings as in tfds: "train", "train[:99%]", "train[99%:]", "train[100:200]", "train[-10%:]"."""

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_NAME = re.compile(r"(?<![a-z])(train|training|test|testing|val|valid|validation|dev)(?![a-z])")
_OTHER_NAMES = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}


def canonical_name(name: str) -> str:
    """One name for what people call the same split: validation, valid and dev are "val"."""
    return _OTHER_NAMES.get(name.lower(), name)


def name_in(file: Path, root: Path, *, anywhere: bool = False) -> str | None:
    """The split that a file's name, or that of a folder between it and `root`, begins with (or has as a word)."""
    find = _NAME.search if anywhere else _NAME.match
    for part in (file.stem, *reversed(file.relative_to(root).parts[:-1])):
        if match := find(part.lower()):
            return canonical_name(match[1])
    return None


def files_by_split(files: list[Path], root: Path, *, anywhere: bool = False) -> dict[str, list[Path]]:
    """Files by the split that their names say; all are "train" where none says one. ValueError for a mixture."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(name_in(file, root, anywhere=anywhere) or "", []).append(file)
    unnamed = splits.pop("", [])
    if unnamed and splits:
        where = "has one of the words" if anywhere else "begins with"
        raise ValueError(f"{unnamed[0]} must say its split: a name that {where} train, test or val")
    return splits or {"train": unnamed}


def parse_split(split: str, allowed: Collection[str]) -> tuple[str, str | None, str | None]:
    """Cuts "name[start:stop]" into (name, start, stop); name is one of `allowed`. Raises ValueError."""
    match = _SPLIT.fullmatch(split.strip())
    if not match:
        raise ValueError(f"split must look like train, train[:99%] or train[100:200], got {split!r}")
    name = match["name"] if match["name"] in allowed else canonical_name(match["name"])
    if name not in allowed:
        raise ValueError(f"unknown split {match['name']!r}; there are: {', '.join(sorted(allowed))}")
    return name, match["start"], match["stop"]


def slice_positions(start: str | None, stop: str | None, size: int) -> tuple[int, int]:
    """The absolute positions of a slice of `size` images; percents are rounded to the nearest image.

    Raises ValueError when the slice reaches outside 0 .. size or holds nothing.
    """
    first = 0 if start is None else _absolute(start, size)
    last = size if stop is None else _absolute(stop, size)
    if not 0 <= first < last <= size:
        raise ValueError(f"slice [{start or ''}:{stop or ''}] must hold images between 0 and {size} (100%)")
    return first, last


def slice_indices(start: str | None, stop: str | None, labels: np.ndarray) -> np.ndarray:
    """Ascending indices of the images that a slice takes.

    Where the images stand sorted by class, as those of folders do, the slice is taken from a fixed shuffle: else
    "train[:99%]" would lack the last classes. Slices that share no position share no image either way.
    """
    first, last = slice_positions(start, stop, len(labels))
    if np.all(labels[1:] >= labels[:-1]):
        return np.sort(np.random.default_rng(0).permutation(len(labels))[first:last])
    return np.arange(first, last)


def _absolute(boundary: str, size: int) -> int:
    position = round(int(boundary[:-1]) * size / 100) if boundary.endswith("%") else int(boundary)
    return size + position if boundary.startswith("-") else position
