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

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from visionmoe.checkpoint import engine
from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.mapping import compare
from visionmoe.model.tensor_file import Box, TensorFile, open_tensor_file

PARTS_KEY = "visionmoe-parts"  # in a header's metadata: name -> [shape of the whole, offset of the part]
SUFFIX = ".safetensors"
_FILE = re.compile(r"(.+?)(?:-(\d{5,})-of-(\d{5,}))?\.safetensors")


@dataclass(frozen=True)
class StoredTensors:
    """groups: by group ("model", "optimizer", "ema") and name a tensor's size, type and parts, as
    torch.distributed.checkpoint describes them. files: where each part is, and under which name."""

    path: Path
    groups: Mapping[str, Mapping[str, TensorStorageMetadata]] = field(repr=False)
    files: Mapping[MetadataIndex, tuple[TensorFile, str]] = field(repr=False)

    @classmethod
    def open(cls, path: Path, files: Iterable[Path]) -> "StoredTensors":
        """Reads the headers of a folder's files. CheckpointError for one that is not valid, or missing parts."""
        stored = cls(path, {}, {})
        for file in sorted(files):
            if (match := _FILE.fullmatch(file.name)) is not None:
                stored._add(match[1], file)
        for group, tensors in stored.groups.items():
            for name, whole in tensors.items():
                if sum(math.prod(chunk.sizes) for chunk in whole.chunks) != math.prod(whole.size):
                    raise CheckpointError(f"{path} has only parts of {group}: {name}")
        return stored

    def read_box(self, group: str, name: str, box: Box, target: Tensor) -> None:
        """Fills `target` with a part of a tensor. Of the files only the bytes of this part are read."""
        engine.read_box(f"{group}.{name}", self.groups[group][name], box, target, self._read)

    def fill(self, targets: engine.Groups) -> None:
        """Fills tensors, and this process's parts of DTensors, of some groups; other types are converted.

        CheckpointError when these are not the stored ones.
        """
        for group, tensors in targets.items():
            if group not in self.groups:
                raise CheckpointError(f"{self.path} has no {group!r}, only {', '.join(sorted(self.groups))}")
            stored = {name: tuple(whole.size) for name, whole in self.groups[group].items()}
            if faults := compare(stored, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
                raise CheckpointError(f"{self.path}: {group} does not fit this run; {'; '.join(faults)}")
        described = {f"{group}.{name}": self.groups[group][name] for group in targets for name in targets[group]}
        engine.load(targets, described, self._read)

    def _read(self, part: MetadataIndex, box: Box, target: Tensor) -> None:
        file, name = self.files[part]
        try:
            file.read_box(name, box, target)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def _add(self, group: str, path: Path) -> None:
        tensors = self.groups.setdefault(group, {})  # type: ignore[attr-defined]
        try:
            file = open_tensor_file(path)
            places = json.loads(file.metadata[PARTS_KEY]) if PARTS_KEY in file.metadata else None
            for name, part in file.tensors.items():
                shape, offset = (part.shape, (0,) * len(part.shape)) if places is None else places[name]
                whole = tensors.setdefault(name, engine.stored_parts(shape, part.dtype))
                box = tuple((start, start + size) for start, size in zip(offset, part.shape, strict=True))
                if tuple(whole.size) != tuple(shape) or whole.properties.dtype != part.dtype or len(box) != len(shape):
                    raise ValueError(f"{path}: {name} is not a part of the same tensor as in the other files")
                whole.chunks.append(engine.chunk(box))
                self.files[MetadataIndex(f"{group}.{name}", offset)] = file, name  # type: ignore[index]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} does not say where its parts belong: {error}") from None
        except ValueError as error:
            raise CheckpointError(str(error)) from None
