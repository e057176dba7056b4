"""safetensors files of which parts are read and written: the header, and boxes of tensors at their places.

The safetensors package reads slices, but writes only whole files from memory.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the first tensor's bytes
_BLOCK_BYTES = 4 << 20  # read or written at once where values are not already in memory as they lie in the file

Box = tuple[tuple[int, int], ...]  # start and stop on every axis


@dataclass(frozen=True)
class StoredTensor:
    """shape and dtype of a tensor in a file, and the offset of its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header is read and whose tensors are still on disk."""

    path: Path
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    def read_box(self, name: str, box: Box, target: Tensor) -> None:
        """Fills `target`, of the box's shape and of any dtype, strides and device, with this part of a tensor.

        Only the bytes of the box are read. ValueError naming the file when it ends too early.
        """
        stored = self.tensors[name]
        with open(self.path, "rb", buffering=0) as stream:
            for start, index, shape in runs(stored.shape, box, stored.dtype.itemsize):
                part = target[index]
                direct = part.dtype == stored.dtype and part.device.type == "cpu" and part.is_contiguous()
                values = part if direct else torch.empty(shape, dtype=stored.dtype)
                _read(stream.fileno(), values, stored.offset + start * stored.dtype.itemsize, self.path)
                if not direct:
                    part.copy_(values)


def open_tensor_file(path: str | os.PathLike) -> TensorFile:
    """Reads the header; ValueError naming the file when it is cut or not a safetensors file."""
    path = Path(path)
    try:
        # Checks the header, and that offsets and the file's size agree. "np": for "pt" it maps the file writable, which
        # the system refuses for one that is larger than the memory.
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, allowed: {', '.join(DTYPES)}")
            offset = 8 + size + entry["data_offsets"][0]
            tensors[name] = StoredTensor(tuple(entry["shape"]), DTYPES[entry["dtype"]], offset)
    return TensorFile(path, tensors, metadata)


def plan_file(
    shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, StoredTensor]]:
    """(all bytes before the first tensor's, where each tensor belongs) of a file with tensors of these shapes and
    dtypes, in the order of their places. Larger types come first, so that all are aligned.

    ValueError for a dtype that the format, or this package, does not have.
    """
    for name, (_, dtype) in shapes.items():
        if dtype not in _NAMES:
            raise ValueError(f"{name} has dtype {dtype}, allowed: {', '.join(str(d) for d in _NAMES)}")
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    names = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))
    place, places = 0, {}
    for name in names:
        shape, dtype = shapes[name]
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        places[name], place = place, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    return start, {n: StoredTensor(tuple(shapes[n][0]), shapes[n][1], len(start) + places[n]) for n in names}


def write_box(descriptor: int, stored: StoredTensor, box: Box, values: Tensor) -> None:
    """Writes `values`, of the box's shape and the stored dtype, to their places in an open file."""
    for start, index, _ in runs(stored.shape, box, stored.dtype.itemsize):
        data = memory(values[index].detach())
        place = stored.offset + start * stored.dtype.itemsize
        while data:
            done = os.pwrite(descriptor, data, place)
            data, place = data[done:], place + done


def memory(values: Tensor) -> memoryview:
    """A tensor's bytes in C order; a copy only where they do not lie so, or not in this computer's memory."""
    return values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def runs(shape: Sequence[int], box: Box, itemsize: int) -> Iterator[tuple[int, tuple[slice, ...], tuple[int, ...]]]:
    """The contiguous stretches of a box of a C-ordered array, each of at most about `_BLOCK_BYTES`: (number of its
    first element in the array, its place in the box, its shape)."""
    sizes = [stop - start for start, stop in box]
    if not all(sizes):
        return
    if not sizes:
        yield 0, (), ()
        return
    axis = len(sizes) - 1  # the one along which a stretch has several entries, each whole along the axes after it
    while axis > 0 and sizes[axis] == shape[axis]:
        axis -= 1
    while axis < len(sizes) - 1 and math.prod(sizes[axis + 1 :]) * itemsize > _BLOCK_BYTES:
        axis += 1
    strides = [math.prod(shape[i + 1 :]) for i in range(axis + 1)]
    rows = max(1, _BLOCK_BYTES // (math.prod(sizes[axis + 1 :]) * itemsize))
    for outer in np.ndindex(*sizes[:axis]):
        for row in range(0, sizes[axis], rows):
            end = min(row + rows, sizes[axis])
            begin = sum(
                (start + i) * stride for (start, _), i, stride in zip(box, (*outer, row), strides, strict=False)
            )
            index = (*(slice(i, i + 1) for i in outer), slice(row, end))
            yield begin, index, (*(1,) * axis, end - row, *sizes[axis + 1 :])


def _read(descriptor: int, target: Tensor, place: int, path: Path) -> None:
    view = target.detach().reshape(-1).view(torch.uint8).numpy().data
    while view:
        done = os.preadv(descriptor, [view], place)
        if not done:
            raise ValueError(f"{path} ends too early")
        view, place = view[done:], place + done
