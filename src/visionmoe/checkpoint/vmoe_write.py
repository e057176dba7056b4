"""The released checkpoint format of V-MoE: writing. `vmoe_index` describes the format."""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import msgpack
import numpy as np
import torch

from visionmoe.checkpoint.vmoe_index import (
    ARRAY_CHUNKS,
    INDEX_INFO,
    NDARRAY,
    SLICE_ND,
    STORAGE,
    VERSION,
    Box,
    shard_path,
)
from visionmoe.files import atomic_write

_SLICE_BYTES = 64 << 20  # larger arrays are written as several slices of axis 0
_CHUNK_BYTES = 1 << 30  # the reference's limit for one binary value


def write_vmoe(prefix: str | os.PathLike, flat: Mapping[str, np.ndarray | torch.Tensor], num_shards: int = 1) -> None:
    """Writes a checkpoint that the reference can restore; arrays by name "a/b/c".

    A torch tensor may be bfloat16, which numpy has not. The files are written beside and renamed, the index last.
    Slices are at most 64 MiB (whole rows of axis 0) and go to the shard with the fewest bytes.
    """
    if not 1 <= num_shards <= 99_999:
        raise ValueError(f"num_shards must be between 1 and 99999, got {num_shards}")
    names = _sorted_names(flat)
    arrays = [_storable(name, flat[name]) for name in names]
    shards = _assign([[_nbytes(box, dtype) for box in _split(a.shape, dtype)] for a, dtype in arrays], num_shards)
    tree: dict[str, Any] = {}
    for name, (array, dtype), where in zip(names, arrays, shards, strict=True):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _index_info(array.shape, dtype, where)
    index = msgpack.packb({"shard_count": num_shards, "index": tree, "version": VERSION})
    with contextlib.ExitStack() as stack:  # leaves in reverse order: the index is renamed last
        stack.enter_context(atomic_write(f"{os.fspath(prefix)}.index")).write_bytes(index)
        for shard in range(num_shards):
            path = stack.enter_context(atomic_write(shard_path(prefix, shard, num_shards)))
            with open(path, "wb") as stream:
                _write_shard(stream, arrays, shards, shard)
        # An old index must not describe new data files, should the next lines be interrupted.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{os.fspath(prefix)}.index")


def _sorted_names(flat: Mapping[str, Any]) -> list[str]:
    """Names in the order of the nested tree with sorted keys; checks that they make a tree."""
    names = sorted(flat, key=lambda name: name.split("/"))
    for name, following in itertools.pairwise(names):
        if following.startswith(name + "/"):
            raise ValueError(f"names must make a tree, got {name!r} beside {following!r}")
    return names


def _storable(name: str, value: np.ndarray | torch.Tensor) -> tuple[np.ndarray, str]:
    """An array in its stored form and the name of its dtype."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            return value.view(torch.uint16).numpy(), "bfloat16"
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # ml_dtypes, where it is installed
        return array.view(np.uint16), "bfloat16"
    if array.dtype.name not in STORAGE:
        raise ValueError(f"{name} has dtype {array.dtype}, allowed: {', '.join(STORAGE)}")
    return array, array.dtype.name


def _split(shape: tuple[int, ...], dtype: str) -> list[Box]:
    whole: Box = tuple((0, size) for size in shape)
    if not shape or _nbytes(whole, dtype) <= _SLICE_BYTES:
        return [whole]
    rows = max(1, _SLICE_BYTES * shape[0] // _nbytes(whole, dtype))
    return [((row, min(row + rows, shape[0])), *whole[1:]) for row in range(0, shape[0], rows)]


def _nbytes(box: Box, dtype: str) -> int:
    return math.prod(stop - start for start, stop in box) * STORAGE[dtype].itemsize


def _assign(sizes: list[list[int]], num_shards: int) -> list[list[int]]:
    """A shard for every slice: the one with the fewest bytes so far, the first of these."""
    load = [0] * num_shards
    shards: list[list[int]] = []
    for of_array in sizes:
        shards.append([])
        for size in of_array:
            shard = load.index(min(load))
            load[shard] += size
            shards[-1].append(shard)
    return shards


def _index_info(shape: tuple[int, ...], dtype: str, shards: list[int]) -> msgpack.ExtType:
    array = msgpack.packb((shape, dtype, False, {}))
    return msgpack.ExtType(INDEX_INFO, msgpack.packb((array, [_packed_box(b) for b in _split(shape, dtype)], shards)))


def _packed_box(box: Box) -> bytes:
    return msgpack.packb([msgpack.packb((start, stop, None)) for start, stop in box])


def _write_shard(stream: BinaryIO, arrays: list[tuple[np.ndarray, str]], shards: list[list[int]], shard: int) -> None:
    packer = msgpack.Packer()
    numbers = [i for i, where in enumerate(shards) if shard in where]
    stream.write(packer.pack_map_header(1 + len(numbers)) + packer.pack(ARRAY_CHUNKS) + packer.pack(True))
    for number in numbers:
        array, dtype = arrays[number]
        boxes = [b for b, where in zip(_split(array.shape, dtype), shards[number], strict=True) if where == shard]
        stream.write(packer.pack(str(number)) + packer.pack_array_header(len(boxes)))
        for box in boxes:
            _write_piece(stream, packer, array[tuple(slice(*bounds) for bounds in box)], dtype)
            stream.write(packer.pack(msgpack.ExtType(SLICE_ND, _packed_box(box))))


def _write_piece(stream: BinaryIO, packer: msgpack.Packer, array: np.ndarray, dtype: str) -> None:
    """[[flat chunks], ...: each chunk an extension type 1 whose bytes go straight to the file."""
    flat = np.ascontiguousarray(array, STORAGE[dtype]).reshape(-1)
    step = _CHUNK_BYTES // flat.itemsize
    chunks = [flat[i : i + step] for i in range(0, flat.size, step)]
    stream.write(packer.pack_array_header(2) + packer.pack_array_header(len(chunks)))
    for chunk in chunks:
        head = packer.pack_array_header(3) + packer.pack((chunk.size,)) + packer.pack(dtype)
        head += _header(chunk.nbytes, (0xC4, 0xC5, 0xC6))
        size = len(head) + chunk.nbytes
        # msgpack has types of its own for extensions of 1, 2, 4, 8 and 16 bytes; no array is as small as 8 bytes.
        ext = bytes([0xD8]) if size == 16 else _header(size, (0xC7, 0xC8, 0xC9))
        stream.writelines((ext, bytes([NDARRAY]), head, chunk.view(np.uint8).data))


def _header(size: int, types: Iterable[int]) -> bytes:
    """First bytes of a bin or ext of `size` bytes, in the shortest of its three forms."""
    for kind, width in zip(types, (1, 2, 4), strict=True):
        if size < 1 << 8 * width:
            return bytes([kind]) + size.to_bytes(width, "big")
    raise ValueError(f"a chunk of {size} bytes is too large")
