"""Which part of a tensor this process has, and which process writes what when several have the same."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmoe.checkpoint.ranks import Group, rank_of, share_out, size_of
from visionmoe.distributed.world import gather
from visionmoe.model.tensor_file import Box

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """values (local shape), which are the part `box` of a tensor of `shape`."""

    values: Tensor
    shape: tuple[int, ...]
    box: Box


def part_of(name: str, tensor: Tensor) -> Part:
    """What this process holds of a tensor: all of a plain one, the local part of a DTensor, whose axes are divided as
    torch divides them: by the axes of its mesh in their order, into chunks of equal size with the rest in the last.

    ValueError for a DTensor that is not made of parts (with a placement other than Shard and Replicate).
    """
    shape = tuple(tensor.shape)
    box = [(0, size) for size in shape]
    if not hasattr(tensor, "placements"):
        return Part(tensor.detach(), shape, tuple(box))
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    local = tensor.to_local().detach()
    if coordinate is None:  # of a mesh without this process
        return Part(local, shape, tuple((0, 0) for _ in shape) or ((0, 0),))
    for placement, number, count in zip(tensor.placements, coordinate, mesh.shape, strict=True):
        if type(placement) is Shard:
            axis = placement.dim % len(shape)
            start, stop = box[axis]
            chunk = -(-(stop - start) // count)
            box[axis] = min(start + chunk * number, stop), min(start + chunk * (number + 1), stop)
        elif type(placement) is not Replicate:
            raise ValueError(f"{name} is laid out as {tensor.placements}; checkpoints know Shard and Replicate")
    return Part(local, shape, tuple(box))


def own_parts(groups: Groups, group: Group) -> dict[str, dict[str, Part]]:
    """The parts that this process has to write, by group and name: of all processes' together every element once, the
    bytes spread evenly. Collective.

    ValueError, on all processes, when they do not have tensors of the same names, shapes and types that are whole
    together.
    """
    parts = {(g, n): part_of(f"{g}: {n}", tensor) for g, tensors in groups.items() for n, tensor in tensors.items()}
    own = {key: (part.shape, str(part.values.dtype), part.box) for key, part in parts.items()}
    everyone = gather(own, group)
    for rank, theirs in enumerate(everyone):
        for key in sorted(own.keys() ^ theirs.keys()):
            raise ValueError(f"rank {rank} and rank {rank_of(group)} do not have the same tensors: {'/'.join(key)}")
        for key, (shape, dtype, _) in theirs.items():
            if (shape, dtype) != own[key][:2]:
                raise ValueError(f"{'/'.join(key)} is {shape} {dtype} on rank {rank}, but {own[key][:2]} here")
    owners: dict[tuple[tuple[str, str], Box], list[int]] = {}
    for rank, theirs in enumerate(everyone):
        for key, (shape, _, box) in theirs.items():
            if volume(box) or not math.prod(shape):
                owners.setdefault((key, box), []).append(rank)
    _check_whole(own, owners)
    pieces = sorted(owners, key=lambda piece: (piece[0], piece[1]))
    sizes = [volume(box) * parts[key].values.dtype.itemsize for key, box in pieces]
    chosen = share_out(sizes, [owners[piece] for piece in pieces], size_of(group))
    mine: dict[str, dict[str, Part]] = {name: {} for name in groups}
    for (key, _), rank in zip(pieces, chosen, strict=True):
        if rank == rank_of(group):
            mine[key[0]][key[1]] = parts[key]
    return mine


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common, None where that is nothing."""
    common = tuple((max(s, t), min(u, v)) for (s, u), (t, v) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """The index of `box` in an array that holds `outer`."""
    return tuple(slice(start - o, stop - o) for (start, stop), (o, _) in zip(box, outer, strict=True))


def shift(box: Box, outer: Box) -> Box:
    """`box` in the coordinates of an array that holds `outer`."""
    return tuple((start - o, stop - o) for (start, stop), (o, _) in zip(box, outer, strict=True))


def to_memory(parts: Iterable[Part]) -> list[Part]:
    """The same parts in memory of their own on the CPU, whatever happens to the tensors afterwards."""
    waiting = [(part, part.values.to("cpu", copy=True, memory_format=torch.contiguous_format)) for part in parts]
    return [Part(values, part.shape, part.box) for part, values in waiting]


def _check_whole(own: Mapping[tuple[str, str], tuple[tuple[int, ...], str, Box]], owners: Iterable) -> None:
    held = dict.fromkeys(own, 0)
    for key, box in owners:
        held[key] += volume(box)
    for key, (shape, _, _) in own.items():
        if held[key] != math.prod(shape):
            raise ValueError(f"the processes have {held[key]} elements of {'/'.join(key)} {shape}: some are missing")
