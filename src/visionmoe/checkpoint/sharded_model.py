"""Models of which no process ever holds everything: a run's checkpoint or a sharded model to one directory, and stored
parameters, of whatever format, into the parts that a process has."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from visionmoe.checkpoint.errors import CheckpointError
from visionmoe.checkpoint.mapping import compare, complain, our_shapes
from visionmoe.checkpoint.parts import inside, own_parts, part_of
from visionmoe.checkpoint.ranks import Group, by_first, together
from visionmoe.checkpoint.sources import DirectorySource, Source, open_source
from visionmoe.checkpoint.store import verify
from visionmoe.checkpoint.stored import StoredTensors
from visionmoe.config import ModelConfig, from_dict
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
    complain(str(path), compare({name: whole.shape for name, whole in tensors.items()}, our_shapes(config)))
    start, places = plan_file({name: (whole.shape, whole.dtype) for name, whole in tensors.items()}, METADATA)
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
    parts = own_parts({"model": model_state}, group)["model"]
    start, places = plan_file({name: (tuple(t.shape), t.dtype) for name, t in model_state.items()}, METADATA)

    def write_own() -> None:
        with open(path, "r+b") as stream:
            for name, part in parts.items():
                write_box(stream.fileno(), places[name], part.box, part.values)
        sync(path)

    with contextlib.ExitStack() as stack:

        def prepare() -> Path:
            temporary = stack.enter_context(pretrained_files(directory, config, preprocessing, class_names))
            with open(temporary, "wb") as stream:
                stream.write(start)
                stream.truncate(len(start) + sum(place.nbytes for place in places.values()))
            return temporary

        path = by_first(prepare, group)
        together(write_own, group)
        by_first(stack.close, group)


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
    source.check(())
    shapes = our_shapes(source.config)
    asked = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    complain("what is to be filled", compare(asked, {name: shapes[name] for name in asked if name in shapes}))
    for name, tensor in targets.items():
        part = part_of(name, tensor)
        if isinstance(source, DirectorySource):
            source.read_box(name, part.box, part.values)
            continue
        whole = empty_tensor(shapes[name], source.dtype(name))
        source.fill({name: whole})
        part.values.copy_(whole[inside(part.box, tuple((0, size) for size in shapes[name]))])
    return source


def _slices(shape: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """Cuts a tensor, in the order of its bytes, into whole entries of the first axis of about `_BLOCK_BYTES`."""
    if not shape:
        yield ()
        return
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    rest = tuple((0, size) for size in shape[1:])
    for row in range(0, shape[0], rows):
        yield ((row, min(row + rows, shape[0])), *rest)
