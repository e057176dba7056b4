"""Dense ViT checkpoints of google-research/vision_transformer: numpy .npz files with nearly the reference's names."""

import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import IO, TypeVar

import numpy as np

from visionmoe.checkpoint.errors import CheckpointError, MissingFileError
from visionmoe.checkpoint.vmoe_format import Block

# (pattern, the reference's name), applied in this order.
RENAMES = (
    (r"^(opt/target|params)/", ""),
    (r"^Transformer/", "Encoder/"),
    (r"/LayerNorm_2/", "/LayerNorm_1/"),
    (r"/MlpBlock_\d+/", "/Mlp/"),
    (r"/MultiHeadDotProductAttention_\d+/", "/SelfAttention/"),
)
_MAX_INFLATION = 1100  # deflate cannot do more; a file that promises more lies
_DTYPES = ("float16", "float32", "float64")
R = TypeVar("R")


class NpzReader:
    """An .npz checkpoint whose headers are read and whose arrays are still on disk, under the reference's names."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise MissingFileError(f"{self.path} is missing")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._members: dict[str, str] = {}
        self._open(self._read_headers)

    def blocks(self, names: Collection[str] | None = None) -> Iterator[Block]:
        """Yields the arrays (None: all), one after the other."""
        for name, member in self._members.items():
            if names is None or name in names:
                yield Block(name, (slice(None),) * len(self.shapes[name]), self._open(partial(_array, member)))

    def _open(self, read: Callable[[zipfile.ZipFile], R]) -> R:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return read(archive)
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError, NotImplementedError,
                RuntimeError, SyntaxError) as error:  # fmt: skip
            raise CheckpointError(f"{self.path} is not a valid .npz checkpoint: {error}") from None

    def _read_headers(self, archive: zipfile.ZipFile) -> None:
        for info in archive.infolist():
            name = reference_name(info.filename.removesuffix(".npy"))
            with archive.open(info) as stream:
                shape, dtype, header_size = _header(stream)
            size = math.prod(shape) * dtype.itemsize
            lies = info.file_size > _MAX_INFLATION * max(1, info.compress_size)
            if size + header_size != info.file_size or lies or info.compress_size > os.path.getsize(self.path):
                raise ValueError(f"{name} has shape {shape}, but its size in the file is different")
            if dtype.name not in _DTYPES:
                raise ValueError(f"{name} has dtype {dtype}, allowed: {', '.join(_DTYPES)}")
            if name in self.shapes:
                raise ValueError(f"{name} occurs twice")
            self.shapes[name], self.dtypes[name], self._members[name] = shape, dtype.name, info.filename


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a dense ViT's .npz; arrays under the reference's names, for `params_from_vmoe`. Nothing is unpickled."""
    return {block.name: block.array for block in NpzReader(path).blocks()}


def reference_name(name: str) -> str:
    """E.g. "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel" -> "Encoder/encoderblock_0/Mlp/Dense_0/kernel"."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"npy version {version}")
    shape, _, dtype = read(stream)
    return shape, dtype, stream.tell()


def _array(member: str, archive: zipfile.ZipFile) -> np.ndarray:
    with archive.open(member) as stream:
        return np.require(np.lib.format.read_array(stream, allow_pickle=False), requirements=["C", "W"])
