"""torch.distributed.checkpoint (DCP) at work: it plans which process writes which part of a tensor, and which stored
parts a process reads; it tells all of an error on one, and writes in a thread of its own. The files are ours.

A process's tensors are given by group and name, of which DCP makes "GROUP.NAME", or by name alone.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.tensor import DTensor, Replicate, Shard

from visionmoe.distributed.world import Group, gather, rank_of
from visionmoe.files import one_line
from visionmoe.model.tensor_file import Box

T = TypeVar("T")
Groups = Mapping[str, Mapping[str, Tensor]]
Tensors = Groups | Mapping[str, Tensor]


def save(tensors: Tensors, writer: dcp.StorageWriter, group: Group) -> None:
    """Every element of all processes' tensors once through `writer`. Collective; errors as `cause` has them."""
    _one_process_is_meant()
    try:
        dcp.save(_dicts(tensors), storage_writer=writer, planner=Planner(), process_group=group)
    except dcp.CheckpointException as error:
        raise cause(error, group) from error


def save_in_thread(tensors: Tensors, writer: dcp.StorageWriter, group: Group) -> Future:
    """As `save`, but a thread writes a copy of the tensors. Collective; what goes wrong in the thread is the future's
    exception."""
    _one_process_is_meant()
    planner = Planner()
    stager = _OwnParts(planner, group)
    future = dcp.async_save(
        _dicts(tensors), storage_writer=writer, planner=planner, process_group=group, async_stager=stager
    )
    assert not isinstance(future, AsyncSaveResponse)  # which is of stagers that copy in a thread, too
    return future


def load(
    targets: Tensors,
    stored: Mapping[str, TensorStorageMetadata],
    read: Callable[[ReadItem, Tensor], None],
) -> None:
    """Fills tensors, and this process's parts of DTensors, of the stored names and shapes. Not collective.

    read: fills a tensor with what an item says of a stored part. Its errors are raised as they are.
    """
    _one_process_is_meant()
    planner = dcp.DefaultLoadPlanner(flatten_sharded_tensors=False)
    try:
        with torch.no_grad():
            dcp.load(_dicts(targets), storage_reader=_Reader(stored, read), planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        raise error.failures[0][0] from None


def split_name(name: str) -> tuple[str, str]:
    """The group and the name of which DCP has made one."""
    group, _, rest = name.partition(".")
    return group, rest


def stored_whole(shape: tuple[int, ...], dtype: torch.dtype) -> TensorStorageMetadata:
    """Of a tensor that is stored as one part."""
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [chunk(tuple((0, n) for n in shape))])


def chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box))


def box_of(offsets: torch.Size, sizes: torch.Size) -> Box:
    return tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))


def slices(offsets: torch.Size, sizes: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in box_of(offsets, sizes))


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


class Planner(dcp.DefaultSavePlanner):
    """torch's plan: what several processes have alike is written by the one that has least to write so far. It refuses
    processes that do not have the same tensors; torch's own writes what there is."""

    def __init__(self) -> None:
        super().__init__(flatten_sharded_tensors=False)
        self.copies: dict[MetadataIndex, Tensor] = {}  # written in the place of the tensors

    def create_local_plan(self) -> SavePlan:
        for name, tensor in self.state_dict.items():
            placements = tensor.placements if isinstance(tensor, DTensor) else ()
            if any(type(placement) not in (Shard, Replicate) for placement in placements):
                raise ValueError(f"{name} is laid out as {placements}; checkpoints know Shard and Replicate")
        plan = super().create_local_plan()
        own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.state_dict.items()}
        return dataclasses.replace(plan, items=[item for item in plan.items if _has_part(item)], planner_data=own)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        first = all_plans[0].planner_data
        for rank, theirs in enumerate(plan.planner_data for plan in all_plans):
            for name in sorted(first.keys() ^ theirs.keys()):
                raise ValueError(f"rank {rank} and rank 0 do not have the same tensors: {name}")
            for name, (shape, dtype) in theirs.items():
                if (shape, dtype) != first[name]:
                    raise ValueError(
                        f"{name} is {shape} {dtype} on rank {rank}, but {first[name][0]} {first[name][1]} on rank 0"
                    )
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.copies[index] if index in self.copies else super().lookup_object(index)


class _OwnParts(AsyncStager):
    """Copies what this process is going to write to the CPU's memory. torch's own stagers copy all that it has: of a
    data parallel run everything, on every process."""

    _synchronize_after_execute = False

    def __init__(self, planner: Planner, group: Group) -> None:
        self._planner, self._group = planner, group

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._planner.set_up_planner(state_dict)
        plans = gather(self._planner.create_local_plan(), self._group)
        own = self._planner.create_global_plan(plans)[0][rank_of(self._group)]
        self._planner.copies = {item.index: _copy(self._planner.resolve_data(item)) for item in own.items}
        return state_dict


class Writer(dcp.StorageWriter):
    """A storage without what ours have no use for."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # it is never chosen for a path


class _Reader(dcp.StorageReader):
    def __init__(self, stored: Mapping[str, TensorStorageMetadata], read: Callable[[ReadItem, Tensor], None]) -> None:
        self._stored, self._read = stored, read

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(self._stored))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        for item in plan.items:
            self._read(item, planner.resolve_tensor(item).detach())
        return done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def done(value: T) -> torch.futures.Future[T]:
    future: torch.futures.Future[T] = torch.futures.Future()
    future.set_result(value)
    return future


def _dicts(tensors: Tensors) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in tensors.items()}


def _has_part(item: WriteItem) -> bool:
    """False for the part without elements that some processes have of a DTensor."""
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) > 0 or math.prod(item.tensor_data.size) == 0


def _copy(tensor: Any) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _one_process_is_meant() -> None:
    """torch warns of every save and load that is not one of several processes."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
