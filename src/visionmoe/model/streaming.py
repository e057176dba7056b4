"""Experts whose weights stay in a memory-mapped file: read ahead while others compute, and out of memory after use.

The weights are tensors in the mapped file, so a page that nobody read ahead is read when it is touched: what is here
decides when the disk works and how much is resident, never what comes out. Linux; elsewhere pages are only touched.
"""

import contextlib
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visionmoe.model.pinned import copied
from visionmoe.model.pretrained import PretrainedWeights

READ_AHEAD = 512 << 20  # bytes of experts that may be resident at once
READERS = 2  # threads: while one waits for its pages, the other's requests are at the disk
_REQUEST = 1 << 20  # bytes asked for at once: of more, Linux reads only as much as it reads ahead by itself
_RESERVE_NOTHING = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: the map may be larger than the memory


class Span(NamedTuple):
    """Bytes start ... stop-1 of a file."""

    start: int
    stop: int


class Key(NamedTuple):
    """One expert of one layer (the number of its block)."""

    layer: int
    expert: int


@dataclass
class Traffic:
    """What streaming did so far. experts: read; bytes: of their weights, from the disk or its cache; waited: seconds
    in which the computation stood still for them; unused: experts read ahead in vain."""

    experts: int = 0
    bytes: int = 0
    waited: float = 0.0
    unused: int = 0


class MappedFile:
    """A model.safetensors in the address space, privately: writing to a tensor never changes the file."""

    def __init__(self, weights: PretrainedWeights) -> None:
        self._weights = weights
        self._file = os.open(weights.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        flags = mmap.MAP_PRIVATE | _RESERVE_NOTHING
        self._map = mmap.mmap(self._file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, in the mapped file."""
        stored = self._weights.tensors[name]
        count = int(np.prod(stored.shape))
        return torch.frombuffer(self._map, dtype=stored.dtype, count=count, offset=stored.offset).view(stored.shape)

    def spans(self, name: str) -> list[Span]:
        """Where the parts tensor[0], tensor[1], ... are in the file."""
        stored = self._weights.tensors[name]
        size = int(np.prod(stored.shape[1:])) * stored.dtype.itemsize
        return [Span(stored.offset + i * size, stored.offset + (i + 1) * size) for i in range(stored.shape[0])]

    def read(self, span: Span) -> None:
        """Returns when the bytes are resident. Does not hold the interpreter's lock meanwhile."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a file system may not know it: then touching reads the pages
                for at in range(span.start, span.stop, _REQUEST):
                    os.posix_fadvise(self._file, at, min(_REQUEST, span.stop - at), os.POSIX_FADV_WILLNEED)
        self._bytes[span.start : span.stop : mmap.PAGESIZE].max(initial=0)

    def drop(self, span: Span) -> None:
        """Takes whole pages out of the process' memory; they may stay in the system's cache of the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = span.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, span.stop - start)


class ReadAhead:
    """Reads experts in the order in which they will be wanted, at most `budget` bytes ahead of their use."""

    def __init__(self, file: MappedFile, budget: int = READ_AHEAD) -> None:
        self.traffic = Traffic()
        self._file, self._budget = file, budget
        self._pool = futures.ThreadPoolExecutor(READERS, thread_name_prefix="experts")
        self._spans: dict[Key, tuple[Span, ...]] = {}
        self._under_way: dict[Key, futures.Future[None]] = {}
        self._resident = 0
        self._lock = threading.Lock()

    def add(self, key: Key, spans: tuple[Span, ...]) -> None:
        self._spans[key] = spans

    def start(self, wanted: Sequence[Key]) -> None:
        """Begins to read as many of these as the budget allows, the first one always."""
        with self._lock:
            for key in wanted:
                size = self._size(key)
                if key not in self._under_way:
                    if self._resident and self._resident + size > self._budget:
                        return
                    self._under_way[key] = self._pool.submit(self._read, key)
                    self._resident += size

    def keep_only(self, wanted: Iterable[Key]) -> None:
        """Drops what was read ahead and is not wanted."""
        began = time.perf_counter()
        for key in set(self._under_way) - set(wanted):
            self.traffic.unused += self.drop(key)
        self.traffic.waited += time.perf_counter() - began

    def wait(self, key: Key) -> None:
        """Returns when the expert is resident."""
        began = time.perf_counter()
        reading = self._under_way.get(key)
        if reading is not None:
            futures.wait([reading])
        self.traffic.waited += time.perf_counter() - began

    def drop(self, key: Key) -> bool:
        """Takes an expert out of memory; whether it was read or being read."""
        with self._lock:
            reading = self._under_way.pop(key, None)
            if reading is None:
                return False
            self._resident -= self._size(key)
        was_read = not reading.cancel()
        if was_read:
            futures.wait([reading])
            for span in self._spans[key]:
                self._file.drop(span)
        return was_read

    def _read(self, key: Key) -> None:
        for span in self._spans[key]:
            self._file.read(span)
        with self._lock:
            self.traffic.experts += 1
            self.traffic.bytes += self._size(key)

    def _size(self, key: Key) -> int:
        return sum(span.stop - span.start for span in self._spans[key])


class ExpertStream:
    """The experts of one layer in a mapped file. after: the next layer's, begun when this one's are all read.

    fc1, fc2: (E, F, D) and (E, D, F), in the file. A copy of the model has its weights in memory and no stream.
    """

    def __init__(self, layer: int, fc1: Tensor, fc2: Tensor, ahead: ReadAhead) -> None:
        self.ahead = ahead
        self.after: ExpertStream | None = None
        self.fc1, self.fc2, self._layer = fc1, fc2, layer
        self._versions = fc1._version, fc2._version
        self._last_used: Sequence[int] = range(len(fc1))

    def serves(self, fc1: Tensor, fc2: Tensor) -> bool:
        """Whether these are the tensors in the file, not copies of them."""
        return fc1.data_ptr() == self.fc1.data_ptr() and fc2.data_ptr() == self.fc2.data_ptr()

    def run(self, counts: Sequence[int], tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (expert, fc1 (F, D), fc2 (D, F)) for every expert with tokens, on their device, to be used at once.

        Experts without tokens are not read. ValueError where gradients are wanted or the weights were changed.
        """
        if tokens.requires_grad and torch.is_grad_enabled():
            raise ValueError("a model with streamed experts has no gradients: call it within torch.no_grad()")
        if (self.fc1._version, self.fc2._version) != self._versions:
            raise ValueError(f"the experts of block {self._layer} are streamed from a file and cannot be changed")
        experts = [expert for expert, count in enumerate(counts) if count]
        resident = self._resident(experts)
        return resident if tokens.device.type == "cpu" else copied(resident, tokens.device, tokens.dtype)

    def keys(self, experts: Iterable[int]) -> list[Key]:
        return [Key(self._layer, expert) for expert in experts]

    def _resident(self, experts: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields each expert while its weights are resident."""
        keys = self.keys(experts)
        wanted = keys if self.after is None else keys + self.after.keys(self.after._last_used)
        self._last_used = experts
        self.ahead.keep_only(wanted)
        for number, key in enumerate(keys):
            self.ahead.start(wanted[number:])
            self.ahead.wait(key)
            try:
                yield key.expert, self.fc1[key.expert], self.fc2[key.expert]
            finally:
                self.ahead.drop(key)
        self.ahead.start(wanted[len(keys) :])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def open_streams(weights: PretrainedWeights, layers: Sequence[int], read_ahead: int) -> dict[int, ExpertStream]:
    """Streams of the experts of these blocks, by block. weights: our names; read_ahead: bytes."""
    file = MappedFile(weights)
    ahead = ReadAhead(file, read_ahead)
    streams: dict[int, ExpertStream] = {}
    for layer in sorted(layers, reverse=True):
        names = [f"blocks.{layer}.mlp.experts.{part}.weight" for part in ("fc1", "fc2")]
        for expert, spans in enumerate(zip(*map(file.spans, names), strict=True)):
            ahead.add(Key(layer, expert), spans)
        stream = ExpertStream(layer, file.tensor(names[0]), file.tensor(names[1]), ahead)
        stream.after = next(reversed(streams.values()), None)
        streams[layer] = stream
    return streams
