"""What a released checkpoint holds and where: its index, and the places of the pieces in its data files.

`.index` is {"shard_count": n, "index": nested dict whose leaves describe one array each, "version": "20220622"};
older files have no version. `.data-*` holds {magic: True, "leaf number": [[[flat pieces], slice], ...]}. Leaves are
numbered in the order of the tree with sorted keys. Only descriptions are read here, and all of them are checked:
that every element of every array is there exactly once, and that the bytes are really in the files.
"""

import io
import itertools
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionmoe.checkpoint.errors import CheckpointError, MissingFileError, printable
from visionmoe.checkpoint.msgpack_stream import Cursor, Token, decode, text

NDARRAY, COMPLEX, SCALAR, SHAPED_ARRAY, SLICE, SLICE_ND, INDEX_INFO = 1, 2, 3, 4, 5, 6, 8
ARRAY_CHUNKS = "__msgpack_array_chunk_a87ca2__"
FLAX_CHUNKED = "__msgpack_chunked_array__"
VERSION = "20220622"
# bfloat16, which numpy has not, is kept as its 16 bits.
STORAGE = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
        "float64", "complex64", "complex128",
    )
} | {"bfloat16": np.dtype("<u2")}  # fmt: skip
_MAX_RANK = 8
_MAX_INDEX_BYTES = 1 << 28

Box = tuple[tuple[int, int], ...]
"""A slice of an array: (start, stop) for every axis."""
Segment = bytes | tuple[int, int]
"""Bytes of a piece: themselves, or their (offset, size) in the data file."""


@dataclass(frozen=True)
class Leaf:
    """One array: its name "a/b/c", shape, dtype, and which boxes of it lie in which shards."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Box, ...]
    shards: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class Piece:
    """One box of leaf number `leaf`, in C order, as consecutive segments of file `path`."""

    leaf: int
    box: Box
    path: str
    segments: tuple[Segment, ...]


def shard_path(prefix: str | os.PathLike, shard: int, shard_count: int) -> str:
    return f"{os.fspath(prefix)}.data-{shard:05d}-of-{shard_count:05d}"


def read_index(prefix: str | os.PathLike) -> tuple[list[Leaf], int]:
    """Returns the arrays in the order of their numbers, and the number of data files."""
    path = f"{os.fspath(prefix)}.index"
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _MAX_INDEX_BYTES:
                raise CheckpointError(f"{path} is not a checkpoint index: {size} bytes is too large for one")
            data = stream.read()
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing: no checkpoint with this prefix") from None
    cursor = Cursor(io.BytesIO(data), path, 0, len(data))
    top = decode(cursor, _index_ext)
    cursor.end()
    if not isinstance(top, dict) or not isinstance(top.get("index"), dict):
        raise cursor.fail("it has no index")
    shard_count, version = top.get("shard_count"), top.get("version")
    if not isinstance(shard_count, int) or not 1 <= shard_count <= 99_999:
        raise cursor.fail(f"shard_count must be between 1 and 99999, got {shard_count!r}")
    if version not in (None, VERSION):
        raise cursor.fail(f"version must be {VERSION} or absent, got {version!r}")
    leaves = [_leaf(cursor, name, info) for name, info in _flatten(cursor, top["index"])]
    if len({leaf.name for leaf in leaves}) != len(leaves):
        raise cursor.fail("a name occurs twice")
    for leaf in leaves:
        if any(not 0 <= shard < shard_count for shard in leaf.shards):
            raise cursor.fail(f"{leaf.name} is in a data file beyond {shard_count}")
    return leaves, shard_count


def scan(prefix: str | os.PathLike, leaves: Sequence[Leaf], shard_count: int) -> list[Piece]:
    """Finds every piece of every array in the data files; reads no array. Raises when one is missing or too many."""
    paths = [shard_path(prefix, shard, shard_count) for shard in range(shard_count)]
    for path in paths:
        if not os.path.isfile(path):
            raise MissingFileError(f"{path} is missing: the checkpoint has {shard_count} data files")
    wanted: list[set[tuple[int, Box]]] = [set() for _ in paths]
    for number, leaf in enumerate(leaves):
        for box, shard in zip(leaf.boxes, leaf.shards, strict=True):
            wanted[shard].add((number, box))
    pieces = []
    for path, expected in zip(paths, wanted, strict=True):
        with open(path, "rb") as stream:
            cursor = Cursor(stream, path, 0, os.fstat(stream.fileno()).st_size)
            for piece in _scan_shard(cursor, leaves):
                if (piece.leaf, piece.box) not in expected:
                    raise cursor.fail(f"a piece of {leaves[piece.leaf].name} that the index does not have here")
                expected.remove((piece.leaf, piece.box))
                pieces.append(piece)
        if expected:
            name = printable(leaves[min(expected)[0]].name)
            raise CheckpointError(f"{path} lacks a piece of {name} that the index promises")
    return pieces


def covers_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes, all within `shape`, hold every element exactly once.

    They do when their volumes add up and every corner that is not a corner of the whole belongs to an even number
    of boxes: then each element lies in an odd number of boxes, hence in at least one.
    """
    boxes = [box for box in boxes if all(start < stop for start, stop in box)]
    if sum(_volume(box) for box in boxes) != math.prod(shape):
        return False
    odd: set[tuple[int, ...]] = set()
    for box in boxes:
        odd ^= set(itertools.product(*box))
    return not boxes or odd == set(itertools.product(*((0, size) for size in shape)))


def _flatten(cursor: Cursor, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, dict):
            yield from _flatten(cursor, value, f"{prefix}{key}/")
        elif value is not None:
            yield prefix + key, value


def _index_ext(code: int, cursor: Cursor) -> Any:
    if code != INDEX_INFO:
        raise cursor.fail(f"extension type {code} in the index, allowed: {INDEX_INFO}")
    info = decode(cursor, _no_ext)
    cursor.end()
    return (info,)


def _leaf(cursor: Cursor, name: str, info: Any) -> Leaf:
    """Checks one description: packed (shaped array, slices, shards)."""
    bad = cursor.fail(f"the description of {name} is broken")
    if not isinstance(info, tuple) or not _lengths(info[0], 3):
        raise bad
    packed_array, packed_boxes, shards = info[0]
    array = _unpack(packed_array, bad)
    if not _lengths(array, 4) or not isinstance(packed_boxes, list) or not isinstance(shards, list):
        raise bad
    shape, dtype = _shape(array[0], bad), _dtype(array[1], cursor)
    boxes = tuple(_box(box, shape, bad) for box in packed_boxes)
    if len(shards) != len(boxes) or not all(_is_int(shard) for shard in shards):
        raise bad
    if not covers_once(shape, boxes):
        raise cursor.fail(f"the slices of {name} overlap or leave a part of its shape {shape} out")
    if len(set(boxes)) != len(boxes):
        raise bad
    return Leaf(name, shape, dtype, boxes, tuple(shards))


def _box(packed: Any, shape: tuple[int, ...], bad: CheckpointError) -> Box:
    slices = _unpack(packed, bad)
    if not _lengths(slices, len(shape)):
        raise bad
    box = []
    for size, packed_slice in zip(shape, slices, strict=True):
        bounds = _unpack(packed_slice, bad)
        if not _lengths(bounds, 3) or bounds[2] not in (None, 1):
            raise bad
        start, stop = 0 if bounds[0] is None else bounds[0], size if bounds[1] is None else bounds[1]
        if not (_is_int(start) and _is_int(stop) and 0 <= start <= stop <= size):
            raise bad
        box.append((start, stop))
    return tuple(box)


def _scan_shard(cursor: Cursor, leaves: Sequence[Leaf]) -> Iterator[Piece]:
    magic = False
    for _ in range(cursor.expect("map", "the whole")):
        key = text(cursor, cursor.token())
        if key == ARRAY_CHUNKS:
            magic = cursor.token() == Token("value", True)
            continue
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < len(leaves)):
            raise cursor.fail(f"{key[:40]!r} is not the number of an array of the index")
        for _ in range(cursor.expect("array", "the slices of an array")):
            yield _scan_piece(cursor, int(key), leaves[int(key)])
    if not magic:
        raise cursor.fail(f"it has no {ARRAY_CHUNKS}")
    cursor.end()


def _scan_piece(cursor: Cursor, number: int, leaf: Leaf) -> Piece:
    cursor.expect("array", "a piece with its slice", 2)
    segments: list[Segment] = []
    elements = 0
    token = cursor.token()
    if token.kind == "array":
        for _ in range(token.value):
            elements += _scan_array(cursor, cursor.token(), leaf.dtype, segments)
    else:
        elements = _scan_array(cursor, token, leaf.dtype, segments)
    token = cursor.token()
    if token.kind != "ext" or token.code != SLICE_ND:
        raise cursor.fail(f"a piece of {leaf.name} has no slice")
    bad = cursor.fail(f"the slice of a piece of {leaf.name} is broken or out of range")
    box = _box(cursor.take(token.value), leaf.shape, bad)
    if elements != _volume(box):
        raise cursor.fail(f"a piece of {leaf.name} has {elements} elements, its slice {_volume(box)}")
    return Piece(number, box, cursor.path, tuple(segments))


def _scan_array(cursor: Cursor, token: Token, dtype: str, segments: list[Segment]) -> int:
    """Notes where the bytes of one array are (an extension type, or flax's chunks); returns its elements."""
    if token.kind == "map":
        return _scan_flax_chunks(cursor, token.value, dtype, segments)
    if token.kind != "ext" or token.code not in (NDARRAY, SCALAR, COMPLEX):
        raise cursor.fail("a piece must be an array")
    inner = cursor.inside(token.value)
    if token.code == COMPLEX:
        numbers = decode(inner, _no_ext)
        if dtype != "complex128" or not _lengths(numbers, 2) or not all(type(x) in (int, float) for x in numbers):
            raise inner.fail(f"a complex number in an array of {dtype}")
        segments.append(struct.pack("<dd", *numbers))
        return 1
    inner.expect("array", "an array", 3)
    shape = _shape(decode(inner, _no_ext), inner.fail("a broken shape"))
    stored = _dtype(text(inner, inner.token()), inner)
    size = inner.expect("bin", "the bytes of an array")
    elements = math.prod(shape)
    if stored != dtype or elements * STORAGE[dtype].itemsize != size:
        raise inner.fail(f"{size} bytes of {stored} for {elements} elements of {dtype}")
    segments.append((inner.skip(size), size))
    inner.end()
    return elements


def _scan_flax_chunks(cursor: Cursor, size: int, dtype: str, segments: list[Segment]) -> int:
    """{"__msgpack_chunked_array__": true, "shape": {"0": n, ...}, "chunks": {"0": array, ...}}, in any order."""
    marked, shape = False, None
    chunks: dict[int, tuple[int, list[Segment]]] = {}
    for _ in range(size):
        key = text(cursor, cursor.token())
        if key == FLAX_CHUNKED:
            marked = cursor.token() == Token("value", True)
        elif key == "shape":
            by_axis = decode(cursor, _no_ext)
            if not isinstance(by_axis, dict) or set(by_axis) != {str(i) for i in range(len(by_axis))}:
                raise cursor.fail("a broken shape of a chunked array")
            shape = _shape([by_axis[str(i)] for i in range(len(by_axis))], cursor.fail("a broken shape"))
        elif key == "chunks":
            for _ in range(cursor.expect("map", "the chunks of an array")):
                chunk, token = text(cursor, cursor.token()), cursor.token()
                if not (chunk.isascii() and chunk.isdigit() and len(chunk) < 12) or token.kind == "map":
                    raise cursor.fail("a broken chunk of a chunked array")
                found: list[Segment] = []
                chunks[int(chunk)] = _scan_array(cursor, token, dtype, found), found
        else:
            raise cursor.fail(f"unknown entry {key[:40]!r} in a chunked array")
    elements = sum(count for count, _ in chunks.values())
    if not marked or shape is None or sorted(chunks) != list(range(len(chunks))) or elements != math.prod(shape):
        raise cursor.fail("the chunks of a chunked array do not make up its shape")
    for number in sorted(chunks):
        segments += chunks[number][1]
    return elements


def _unpack(payload: Any, bad: CheckpointError) -> Any:
    """The one object packed in `payload`; `bad` is raised for anything else."""
    if not isinstance(payload, bytes):
        raise bad
    cursor = Cursor(io.BytesIO(payload), "", 0, len(payload))
    try:
        value = decode(cursor, _no_ext)
        cursor.end()
    except CheckpointError:
        raise bad from None
    return value


def _no_ext(code: int, cursor: Cursor) -> Any:
    raise cursor.fail(f"extension type {code} where none is allowed")


def _shape(value: Any, bad: CheckpointError) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_RANK or not all(_is_int(n) and 0 <= n < 1 << 48 for n in value):
        raise bad
    return tuple(value)


def _dtype(value: Any, cursor: Cursor) -> str:
    name = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    if name not in STORAGE:
        raise cursor.fail(f"unknown dtype {str(name)[:40]!r}, allowed: {', '.join(STORAGE)}")
    return name


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _lengths(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
