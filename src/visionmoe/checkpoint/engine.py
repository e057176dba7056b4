"""torch.distributed.checkpoint (DCP) at work: it plans which process writes which part of a tensor, and which stored
parts a process reads; it tells all of an error on one, and writes in a thread of its own. The files are ours.

A process's tensors are given by group and name, of which DCP makes "GROUP.NAME", or by name alone.
"""

import dataclasses
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor, Replicate, Shard

from visionmoe.distributed.world import Group, gather, rank_of
from visionmoe.files import one_line
from visionmoe.model.tensor_file import Box

Groups = Mapping[str, Mapping[str, Tensor]]
Tensors = Groups | Mapping[str, Tensor]
Read = Callable[[MetadataIndex, Box, Tensor], None]  # fills a tensor with what is in a box of a stored part


@dataclasses.dataclass(frozen=True)
class Part:
    """What a process writes: the elements in `box` of a tensor of this name, shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    values: Callable[[], Tensor]


@dataclasses.dataclass
class LastPlan:
    """What this process has planned for its last save, and what of it was its own to write."""

    plan: dcp.SavePlan | None = None
    own: list[dcp.WriteItem] = dataclasses.field(default_factory=list)


def save(tensors: Tensors, writer: "Writer", group: Group) -> None:
    """Every element of all processes' tensors once through `writer`. Collective; errors as `cause` has them."""
    _one_process_is_meant()
    try:
        dcp.save(_dicts(tensors), storage_writer=writer, planner=Planner(), process_group=group)
    except dcp.CheckpointException as error:
        raise cause(error, group) from error


def save_in_thread(tensors: Tensors, writer: "Writer", group: Group, last: LastPlan) -> Future:
    """As `save`, but a thread writes a copy of the tensors. Collective; what goes wrong in the thread is the future's
    exception. last: kept from save to save."""
    _one_process_is_meant()
    planner = Planner()
    stager = _OwnParts(planner, group, last)
    return dcp.async_save(  # type: ignore[return-value]  # of stagers that copy in a thread, too, it is another
        _dicts(tensors), storage_writer=writer, planner=planner, process_group=group, async_stager=stager
    )


def load(targets: Tensors, stored: Mapping[str, dcp.TensorStorageMetadata], read: Read) -> None:
    """Fills tensors, and this process's parts of DTensors, of the stored names (those that DCP makes) and shapes. Not
    collective, as `dcp.load` is, which does the same with the plan."""
    planner = dcp.DefaultLoadPlanner(flatten_sharded_tensors=False)
    planner.set_up_planner(_dicts(targets), dcp.Metadata(dict(stored)))
    with torch.no_grad():
        for item in planner.create_local_plan().items:
            _read_item(item, planner.resolve_tensor(item), read)


def load_from(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """As `load`, from whole tensors in memory."""
    boxes = {name: tuple((0, size) for size in value.shape) for name, value in values.items()}
    stored = {name: stored_parts(tuple(v.shape), v.dtype, boxes[name]) for name, v in values.items()}

    def read(part: MetadataIndex, box: Box, target: Tensor) -> None:
        target.copy_(values[part.fqn][inside(box)])

    load(targets, stored, read)


def read_box(name: str, stored: dcp.TensorStorageMetadata, box: Box, target: Tensor, read: Read) -> None:
    """Fills `target` with a part of a tensor."""
    for item in create_read_items_for_chunk_list(name, stored, [chunk(box)]):
        _read_item(item, target[inside(_box(item.dest_offsets, item.lengths))], read)


def cause(error: BaseException, group: Group) -> BaseException:
    """What went wrong: this process's own error where it has one, else an error of the same kind (OSError, ValueError,
    RuntimeError) of one line that names the rank."""
    if not isinstance(error, dcp.CheckpointException):
        return error
    if (own := error.failures.get(rank_of(group))) is not None:
        return own[0]
    rank, (fault, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return same_kind(fault, f"rank {rank}: {one_line(fault)}")


def same_kind(error: BaseException, text: str) -> Exception:
    return next((kind(text) for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError(text))


def stored_parts(shape: tuple[int, ...], dtype: torch.dtype, *boxes: Box) -> dcp.TensorStorageMetadata:
    """What DCP wants to know of a stored tensor."""
    return dcp.TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [chunk(box) for box in boxes])


def chunk(box: Box) -> dcp.ChunkStorageMetadata:
    return dcp.ChunkStorageMetadata(torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box))


def inside(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in box)


class Planner(dcp.DefaultSavePlanner):
    """torch's plan: what several processes have alike is written by the one that has least to write so far. It refuses
    processes that do not have the same tensors; torch's own writes what there is."""

    def __init__(self) -> None:
        super().__init__(flatten_sharded_tensors=False)
        self.copies: dict[MetadataIndex, Tensor] = {}  # written in the place of the tensors

    def create_local_plan(self) -> dcp.SavePlan:
        for name, tensor in self.state_dict.items():
            placements = tensor.placements if isinstance(tensor, DTensor) else ()
            if any(type(placement) not in (Shard, Replicate) for placement in placements):
                raise ValueError(f"{name} is laid out as {placements}; checkpoints know Shard and Replicate")
        plan = super().create_local_plan()
        # Whole tensors first: torch's balance counts a part as its whole tensor, and rank 0's before all others.
        items = sorted(filter(_has_elements, plan.items), key=lambda item: item.type == WriteItemType.SHARD)
        own = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in self.state_dict.items()}
        return dataclasses.replace(plan, items=items, planner_data=own)

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> tuple[list[dcp.SavePlan], dcp.Metadata]:
        first = all_plans[0].planner_data
        for rank, own in enumerate(plan.planner_data for plan in all_plans):
            for name, _ in sorted(first.items() ^ own.items()):
                here, there = (tensors.get(name, "missing") for tensors in (own, first))
                raise ValueError(f"{name} is {here} on rank {rank}, but {there} on rank 0")
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.copies[index] if index in self.copies else super().lookup_object(index)


class _OwnParts(BlockingAsyncStager):
    """Copies what this process is going to write to the CPU's memory: what it wrote last, while no process plans
    anything else. torch's own stagers copy all that it has: of a data parallel run everything, on every process."""

    def __init__(self, planner: Planner, group: Group, last: LastPlan) -> None:
        super().__init__()
        self._planner, self._group, self._last = planner, group, last

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._planner.set_up_planner(state_dict)
        plan = self._planner.create_local_plan()
        if not all(gather(plan == self._last.plan, self._group)):
            plans, _ = self._planner.create_global_plan(gather(plan, self._group))
            self._last.plan, self._last.own = plan, plans[rank_of(self._group)].items
        for item in self._last.own:
            values: Any = self._planner.resolve_data(item)
            copy = values.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            self._planner.copies[item.index] = copy
        return state_dict


class Writer(dcp.StorageWriter):
    """Files that all processes write together."""

    @abstractmethod
    def begin(self) -> Path:
        """Where to write, made by the first process alone."""

    @abstractmethod
    def write(self, path: Path, rank: int, size: int, parts: list[Part]) -> Any:
        """Writes what process `rank` of `size` has to; what it returns goes to the first process."""

    @abstractmethod
    def end(self, results: list[Any]) -> None:
        """Done by the first process alone when all have written; results: by rank."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        path, size = self.begin(), len(plans)
        return [dataclasses.replace(plan, storage_data=(path, rank, size)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        path, rank, size = plan.storage_data
        future.set_result(self.write(path, rank, size, [_part(item, planner) for item in plan.items]))
        return future

    def finish(self, metadata: dcp.Metadata, results: list[Any]) -> None:
        self.end(results)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is never chosen for a path


def _part(item: dcp.WriteItem, planner: dcp.SavePlanner) -> Part:
    data = item.tensor_data
    assert data is not None
    box = _box(data.chunk.offsets, data.chunk.sizes)

    def values() -> Tensor:
        tensor: Any = planner.resolve_data(item)
        return tensor.detach()

    return Part(item.index.fqn, tuple(data.size), data.properties.dtype, box, values)


def _has_elements(item: dcp.WriteItem) -> bool:
    """False for the empty part that some processes have of a DTensor."""
    data = item.tensor_data
    assert data is not None
    return math.prod(data.chunk.sizes) > 0 or math.prod(data.size) == 0


def _read_item(item: dcp.ReadItem, target: Tensor, read: Read) -> None:
    read(item.storage_index, _box(item.storage_offsets, item.lengths), target.detach())


def _box(offsets: torch.Size, sizes: torch.Size) -> Box:
    return tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))


def _dicts(tensors: Tensors) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in tensors.items()}


def _one_process_is_meant() -> None:
    """torch warns of every save that is not one of several processes."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
