"""The released checkpoint format of V-MoE, PREFIX.index and PREFIX.data-00000-of-0000N: reading.

Nothing is unpickled. A broken checkpoint is one `CheckpointError` (a ValueError) that names the file, raised before
memory for its arrays is taken.
"""

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.vmoe_index import STORAGE, Box, Piece, Segment, read_index, scan
from visionmoe.checkpoint.vmoe_write import write_vmoe

__all__ = ["Block", "VmoeReader", "read_vmoe", "upcast_bfloat16", "write_vmoe"]

_BLOCK_BYTES = 1 << 20  # read at once: what is copied out of it, often transposed, is still in the processor's cache


@dataclass(frozen=True)
class Block:
    """A part of array `name`: `array` belongs at `index` (a slice per axis). bfloat16 comes as its bits, uint16."""

    name: str
    index: tuple[slice, ...]
    array: np.ndarray


class VmoeReader:
    """A checkpoint whose descriptions are read and checked and whose arrays are still on disk.

    prefix: path without ".index". shapes and dtypes (names of numpy dtypes, or "bfloat16") by name "a/b/c".
    """

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = os.fspath(prefix)
        self.leaves, self.shard_count = read_index(prefix)
        self._pieces = scan(prefix, self.leaves, self.shard_count)
        self.shapes = {leaf.name: leaf.shape for leaf in self.leaves}
        self.dtypes = {leaf.name: leaf.dtype for leaf in self.leaves}

    @property
    def path(self) -> str:
        """The file that errors about the checkpoint's contents should name."""
        return f"{self.prefix}.index"

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    def blocks(self, names: Collection[str] | None = None) -> Iterator[Block]:
        """Yields the arrays (None: all) in small parts, as they lie in the files; each element once."""
        for piece in self._pieces:
            leaf = self.leaves[piece.leaf]
            if names is None or leaf.name in names:
                for index, array in _read_piece(piece, STORAGE[leaf.dtype]):
                    yield Block(leaf.name, index, array)


def read_vmoe(prefix: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a whole checkpoint into memory: arrays by name "a/b/c". bfloat16 becomes float32, exactly."""
    reader = VmoeReader(prefix)
    flat = {
        leaf.name: np.empty(leaf.shape, np.float32 if leaf.dtype == "bfloat16" else np.dtype(leaf.dtype))
        for leaf in reader.leaves
    }
    for block in reader.blocks():
        bfloat16 = reader.dtypes[block.name] == "bfloat16"
        flat[block.name][block.index] = upcast_bfloat16(block.array) if bfloat16 else block.array
    return flat


def upcast_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers whose upper halves are `bits` (uint16), of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _read_piece(piece: Piece, dtype: np.dtype) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Reads a piece in blocks of at most `_BLOCK_BYTES`: (place in the whole array, values)."""
    with open(piece.path, "rb", buffering=0) as stream:
        source = _Segments(stream, piece)
        for index, shape in _blocks(piece.box, dtype.itemsize):
            data = source.take(math.prod(shape) * dtype.itemsize)
            yield index, np.frombuffer(data, dtype).reshape(shape)


def _blocks(box: Box, itemsize: int) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
    """Cuts a box, in C order, into parts of at most `_BLOCK_BYTES`: (slices, shape)."""
    sizes = [stop - start for start, stop in box]
    axis = 0  # the first axis of which one entry fits
    while axis < len(sizes) and math.prod(sizes[axis + 1 :]) * itemsize > _BLOCK_BYTES:
        axis += 1
    if axis >= len(sizes):
        yield tuple(slice(*bounds) for bounds in box), tuple(sizes)
        return
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(sizes[axis + 1 :]) * itemsize))
    rest = tuple(slice(*bounds) for bounds in box[axis + 1 :])
    for outer in np.ndindex(*sizes[:axis]):
        fixed = tuple(slice(start + i, start + i + 1) for (start, _), i in zip(box, outer, strict=False))
        start, stop = box[axis]
        for row in range(start, stop, rows):
            end = min(row + rows, stop)
            yield (*fixed, slice(row, end), *rest), (*(1,) * axis, end - row, *sizes[axis + 1 :])


class _Segments:
    """The bytes of a piece as one stream."""

    def __init__(self, stream: BinaryIO, piece: Piece) -> None:
        self.stream, self.path = stream, piece.path
        self.waiting: list[Segment] = list(reversed(piece.segments))

    def take(self, size: int) -> bytearray:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            segment = self.waiting.pop()
            length = len(segment) if isinstance(segment, bytes) else segment[1]
            part = min(length, size - done)
            if isinstance(segment, bytes):
                view[done : done + part] = segment[:part]
                rest: Segment = segment[part:]
            else:
                self._read(segment[0], view[done : done + part])
                rest = (segment[0] + part, length - part)
            if part < length:
                self.waiting.append(rest)
            done += part
        return data

    def _read(self, offset: int, view: memoryview) -> None:
        self.stream.seek(offset)
        while view:
            count = self.stream.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.path} is not a valid checkpoint file: it ends too early")
            view = view[count:]
