"""The tensors of a run's checkpoint, still on disk, whatever number of processes has written them.

NAME.safetensors                    one process: whole tensors
NAME-00002-of-00004.safetensors     process 2 of 4: parts; the header's metadata says of which tensors and where
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.mapping import compare
from visionmoe.checkpoint.parts import inside, overlap, part_of, shift, volume
from visionmoe.model.pretrained import empty_tensor
from visionmoe.model.tensor_file import Box, TensorFile, open_tensor_file

PARTS_KEY = "visionmoe-parts"  # in a header's metadata: name -> [shape of the whole, offset of the part]
SUFFIX = ".safetensors"
_FILE = re.compile(r"(.+?)(?:-(\d{5,})-of-(\d{5,}))?\.safetensors")


@dataclass(frozen=True)
class StoredPart:
    file: TensorFile
    box: Box


@dataclass(frozen=True)
class StoredWhole:
    """A tensor: its shape and type, and the parts of which it consists."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[StoredPart] = field(repr=False, default_factory=list)


@dataclass(frozen=True)
class StoredTensors:
    """groups: tensors by group ("model", "optimizer", "ema") and name."""

    path: Path
    groups: Mapping[str, Mapping[str, StoredWhole]] = field(repr=False)

    @classmethod
    def open(cls, path: Path, files: Iterable[Path]) -> "StoredTensors":
        """Reads the headers of a folder's files. CheckpointError for one that is not valid, or missing parts."""
        groups: dict[str, dict[str, StoredWhole]] = {}
        for file in sorted(files):
            if (match := _FILE.fullmatch(file.name)) is not None:
                _add(groups.setdefault(match[1], {}), file)
        for group, tensors in groups.items():
            for name, whole in tensors.items():
                if sum(volume(part.box) for part in whole.parts) != math.prod(whole.shape):
                    raise CheckpointError(f"{path} has only parts of {group}: {name}")
        return cls(path, groups)

    def read(self, group: str, name: str, device: str | torch.device = "cpu") -> Tensor:
        """A whole tensor, in memory of its own."""
        whole = self.groups[group][name]
        target = empty_tensor(whole.shape, whole.dtype)
        self.read_box(group, name, tuple((0, size) for size in whole.shape), target)
        return target.to(device)

    def read_into(self, group: str, name: str, target: Tensor) -> None:
        """Fills a tensor, or this process's part of a DTensor, of the stored shape; other types are converted."""
        part = part_of(name, target)
        self.read_box(group, name, part.box, part.values)

    def read_box(self, group: str, name: str, box: Box, target: Tensor) -> None:
        """Fills `target` with a part of a tensor. Of the files only the bytes of this part are read."""
        try:
            for part in self.groups[group][name].parts:
                if (common := overlap(box, part.box)) is not None:
                    part.file.read_box(name, shift(common, part.box), target[inside(common, box)])
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def fill(self, targets: Mapping[str, Mapping[str, Tensor]]) -> None:
        """`read_into` for all tensors of some groups. CheckpointError when these are not the stored ones."""
        for group, tensors in targets.items():
            if group not in self.groups:
                raise CheckpointError(f"{self.path} has no {group!r}, only {', '.join(sorted(self.groups))}")
            stored = {name: whole.shape for name, whole in self.groups[group].items()}
            if faults := compare(stored, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
                raise CheckpointError(f"{self.path}: {group} does not fit this run; {'; '.join(faults)}")
            for name, tensor in tensors.items():
                self.read_into(group, name, tensor)


def _add(tensors: dict[str, StoredWhole], path: Path) -> None:
    try:
        file = open_tensor_file(path)
        places = json.loads(file.metadata[PARTS_KEY]) if PARTS_KEY in file.metadata else None
        for name, stored in file.tensors.items():
            shape, offset = (stored.shape, (0,) * len(stored.shape)) if places is None else places[name]
            whole = tensors.setdefault(name, StoredWhole(tuple(shape), stored.dtype))
            box = tuple((start, start + size) for start, size in zip(offset, stored.shape, strict=True))
            if whole.shape != tuple(shape) or whole.dtype != stored.dtype or len(box) != len(whole.shape):
                raise ValueError(f"{path}: {name} is not a part of the same tensor as in the other files")
            whole.parts.append(StoredPart(file, box))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not say where its parts belong: {error}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
