"""A model as a directory: config.json (config and preprocessing) and model.safetensors."""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visionmoe.config import ModelConfig, from_dict, to_dict
from visionmoe.files import atomic_write, read_json

FORMAT = "visionmoe-1"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_READERS = 4  # threads: filling new memory keeps a core as busy as copying from the file's cache does
_READ_BYTES = 1 << 20  # converted at once: small enough to stay in the processor's cache
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input: resized to (height, width), scaled to [0, 1], then (x - mean) / std.

    resize: "exact" to the size whatever the aspect ratio, or "small": the smaller side to resize_to pixels, then a crop
    of the centre.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Literal["bilinear"] = "bilinear"
    antialias: bool = False
    resize: Literal["exact", "small"] = "exact"
    resize_to: int | None = None

    def __post_init__(self) -> None:
        if (self.resize == "small") != (self.resize_to is not None):
            raise ValueError(f"resize_to is for resize 'small', got {self.resize!r} with {self.resize_to}")
        if self.resize_to is not None and self.resize_to < max(self.image_size):
            raise ValueError(f"resize_to must be at least image_size {self.image_size}, got {self.resize_to}")

    @classmethod
    def of(cls, config: ModelConfig, resize_to: int | None = None) -> "Preprocessing":
        """The reference's evaluation preprocessing: pixels in [-1, 1], bilinear without antialiasing; with resize_to
        the smaller side is resized first."""
        half = (0.5,) * config.in_channels
        resize: Literal["exact", "small"] = "exact" if resize_to is None else "small"
        return cls(image_size=config.image_hw, mean=half, std=half, resize=resize, resize_to=resize_to)


@dataclass(frozen=True)
class PretrainedConfig:
    """The contents of config.json. class_names: of the head's outputs, None where they are not known."""

    model: ModelConfig
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    format: str = FORMAT


@dataclass(frozen=True)
class StoredTensor:
    """shape and dtype of a tensor in a file, and the offset of its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


@dataclass(frozen=True)
class PretrainedWeights:
    """The tensors of a model.safetensors, still on disk, by name."""

    path: Path
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Fills tensors (contiguous, on the CPU, of the stored shapes) that the file has; dtypes are converted."""
        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._read_one, state, state.values()):
                pass  # which raises what went wrong

    def _read_one(self, name: str, target: Tensor) -> None:
        stored = self.tensors[name]
        flat = target.detach().view(-1)
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(stored.offset)
            if target.dtype == stored.dtype:
                _read_bytes(stream, flat.view(torch.uint8), self.path)
                return
            values = torch.empty(min(len(flat), _READ_BYTES // stored.dtype.itemsize), dtype=stored.dtype)
            for part in flat.split(max(1, len(values))):
                given = values[: len(part)]
                _read_bytes(stream, given.view(torch.uint8), self.path)
                part.copy_(given)


def write_pretrained(
    directory: str | os.PathLike,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes config.json and model.safetensors beside and renames them, config.json last.

    preprocessing: by default the reference's for evaluation. class_names: one per class, where they are known.
    """
    directory = Path(directory)
    if class_names is not None and len(class_names) != config.num_classes:
        raise ValueError(f"class_names must be {config.num_classes} names, got {len(class_names)}")
    names = None if class_names is None else tuple(class_names)
    written = PretrainedConfig(config, preprocessing or Preprocessing.of(config), names)
    tensors = _unshared(state)
    with contextlib.ExitStack() as stack:  # leaves in reverse order: config.json is renamed last
        text = json.dumps(to_dict(written), indent=1) + "\n"
        stack.enter_context(atomic_write(directory / CONFIG_NAME)).write_text(text, encoding="utf-8")
        save_file(tensors, stack.enter_context(atomic_write(directory / WEIGHTS_NAME)), metadata={"format": "pt"})
        # New weights must not be read with another model's config, should the renaming be interrupted.
        old = directory / CONFIG_NAME
        if old.is_file() and old.read_bytes() != text.encode():
            old.unlink()


def read_pretrained_config(directory: str | os.PathLike) -> PretrainedConfig:
    """Reads DIR/config.json (or the file itself); ValueError naming it when it is not one of ours."""
    path = Path(directory)
    path = path / CONFIG_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no model was saved there")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a model's config: its format must be {FORMAT!r}")
    try:
        return from_dict(PretrainedConfig, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def open_pretrained_weights(directory: str | os.PathLike) -> PretrainedWeights:
    """Reads the header of DIR/model.safetensors; ValueError naming the file when it is cut or not one."""
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no model was saved there")
    try:
        # Checks the header, and that offsets and the file's size agree. "np": for "pt" it maps the file writable, which
        # the system refuses for one that is larger than the memory.
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, allowed: {', '.join(_DTYPES)}")
            offset = 8 + size + entry["data_offsets"][0]
            tensors[name] = StoredTensor(tuple(entry["shape"]), _DTYPES[entry["dtype"]], offset)
    return PretrainedWeights(path, tensors)


def read_pretrained_state(directory: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of DIR/model.safetensors with their stored dtypes, in memory of their own."""
    weights = open_pretrained_weights(directory)
    state = {name: empty_tensor(stored.shape, stored.dtype) for name, stored in weights.tensors.items()}
    weights.read_into(state)
    return state


def empty_tensor(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """As `torch.empty`, in memory that numpy takes: it asks for large pages, which halves the time of filling it."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(tuple(shape))


def _read_bytes(stream: BinaryIO, target: Tensor, path: Path) -> None:
    """Fills target, uint8 (N,)."""
    view = target.numpy().data
    while view:
        done = stream.readinto(view)  # type: ignore[attr-defined]
        if not done:
            raise ValueError(f"{path} ends too early")
        view = view[done:]


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with memory of its own, which safetensors asks for; copies only where needed."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors
