"""Models of which no process ever holds everything: a run's checkpoint or a sharded model to one directory, and stored
parameters, of whatever format, into the parts that a process has."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from visionmoe.checkpoint import engine
from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.mapping import compare, complain, our_shapes
from visionmoe.checkpoint.sources import DirectorySource, Source, open_source
from visionmoe.checkpoint.store import verify
from visionmoe.checkpoint.stored import StoredTensors
from visionmoe.config import ModelConfig, from_dict
from visionmoe.distributed.world import Group
from visionmoe.files import read_json, sync
from visionmoe.model.pretrained import METADATA, Preprocessing, empty_tensor, pretrained_files
from visionmoe.model.tensor_file import Box, memory, plan_file, write_box

_BLOCK_BYTES = 16 << 20  # of a tensor in memory at once; at least one entry of its first axis (one expert)


def export_pretrained(
    checkpoint: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    group: str = "model",
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes the model of a run's checkpoint (RUN/checkpoints/step_XXXXXXXX, written by any number of processes) as
    config.json and model.safetensors, as `save_pretrained` does. One process; a slice of a tensor in memory at a time.

    group: "model", or "ema" for the averaged parameters. preprocessing, class_names: by default what the checkpoint's
    state says ("preprocessing", "class_names"), else as `save_pretrained`.
    CheckpointError (a ValueError) names a damaged file.
    """
    path = Path(checkpoint)
    stored = StoredTensors.open(path, verify(path))
    if group not in stored.groups:
        raise CheckpointError(f"{path} has no {group!r}, only {', '.join(sorted(stored.groups))}")
    state = read_json(path / "state.json")
    if "model" not in state:
        raise CheckpointError(f"{path / 'state.json'} does not say the model's config")
    config = from_dict(ModelConfig, state["model"])
    if preprocessing is None and state.get("preprocessing") is not None:
        preprocessing = from_dict(Preprocessing, state["preprocessing"])
    class_names = state.get("class_names") if class_names is None else class_names
    tensors = stored.groups[group]
    complain(str(path), compare({name: tuple(whole.size) for name, whole in tensors.items()}, our_shapes(config)))
    start, places = plan_file({name: (whole.size, whole.properties.dtype) for name, whole in tensors.items()}, METADATA)
    with pretrained_files(directory, config, preprocessing, class_names) as temporary, open(temporary, "wb") as stream:
        stream.write(start)
        for name, place in places.items():
            for box in _slices(place.shape, place.dtype.itemsize):
                values = torch.empty([stop - begin for begin, stop in box], dtype=place.dtype)
                stored.read_box(group, name, box, values)
                stream.write(memory(values))


def save_pretrained_sharded(
    model_state: Mapping[str, Tensor],
    config: ModelConfig,
    directory: str | os.PathLike,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    *,
    group: Group = None,
) -> None:
    """As `save_pretrained`, of a model whose state has DTensors: every process writes its own parts to their places in
    the one model.safetensors. Collective; the directory is one that all processes see.
    """
    complain("the model's state", compare({n: tuple(t.shape) for n, t in model_state.items()}, our_shapes(config)))
    writer = _ModelWriter(model_state, pretrained_files(directory, config, preprocessing, class_names))
    with writer.begun:
        engine.save(model_state, writer, group)


def read_into_sharded(
    path_or_name: str | os.PathLike | Source,
    config: ModelConfig | str | os.PathLike | None,
    targets: Mapping[str, Tensor],
) -> Source:
    """Fills parameters (our names; tensors, and DTensors of any layout) from what `visionmoe.load` reads, and returns
    the source with its config, preprocessing and class names. Not collective.

    Of a directory every process reads the bytes of its own parts. Of the released format and of .npz, whose arrays
    have their axes in another order, it reads one parameter at a time, and holds one whole beside its own parts.
    Parameters that `targets` leaves out are not read. ValueError for one that is not stored, or in another shape.
    """
    given = isinstance(path_or_name, str | os.PathLike)
    source = open_source(path_or_name, config) if given else path_or_name  # type: ignore[arg-type]
    assert not isinstance(source, str | os.PathLike)
    shapes = our_shapes(source.config)
    source.check({name.partition(".")[0] for name in shapes} - {name.partition(".")[0] for name in targets})
    asked = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    complain("what is to be filled", compare(asked, {name: shapes[name] for name in asked if name in shapes}))

    def read(part: MetadataIndex, box: Box, target: Tensor) -> None:
        if isinstance(source, DirectorySource):
            source.read_box(part.fqn, box, target)
            return
        whole = empty_tensor(shapes[part.fqn], source.dtype(part.fqn))
        source.fill({part.fqn: whole})
        target.copy_(whole[engine.inside(box)])

    whole_boxes = {name: tuple((0, size) for size in shape) for name, shape in asked.items()}
    stored = {name: engine.stored_parts(asked[name], source.dtype(name), box) for name, box in whole_boxes.items()}
    engine.load(targets, stored, read)
    return source


class _ModelWriter(engine.Writer):
    """One file of these tensors. files: yields its path, and gives it its name. begun: left with an error, it removes
    what the first process has begun."""

    def __init__(self, model_state: Mapping[str, Tensor], files: contextlib.AbstractContextManager[Path]) -> None:
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model_state.items()}
        self._start, self._places = plan_file(shapes, METADATA)
        self._files, self.begun = files, contextlib.ExitStack()

    def begin(self) -> Path:
        path = self.begun.enter_context(self._files)
        with open(path, "wb") as stream:
            stream.write(self._start)
            stream.truncate(len(self._start) + sum(place.nbytes for place in self._places.values()))
        return path

    def write(self, path: Path, rank: int, size: int, parts: list[engine.Part]) -> None:
        with open(path, "r+b") as stream:
            for part in parts:
                write_box(stream.fileno(), self._places[part.name], part.box, part.values())
        sync(path)

    def end(self, results: list[None]) -> None:
        self.begun.close()


def _slices(shape: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """Cuts a tensor, in the order of its bytes, into whole entries of the first axis of about `_BLOCK_BYTES`."""
    if not shape:
        yield ()
        return
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    rest = tuple((0, size) for size in shape[1:])
    for row in range(0, shape[0], rows):
        yield ((row, min(row + rows, shape[0])), *rest)
