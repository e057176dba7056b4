"""Split strings as in tfds: "train", "train[:99%]", "train[99%:]", "train[100:200]", "train[-10%:]"."""

import re
from collections.abc import Collection

import numpy as np

_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_OTHER_NAMES = {"validation": "val", "valid": "val", "dev": "val", "training": "train", "testing": "test"}


def canonical_name(name: str) -> str:
    """One name for what people call the same split: validation, valid and dev are "val"."""
    return _OTHER_NAMES.get(name.lower(), name)


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
