"""Tensors of which every process holds a part (torch's DTensor), as the process sees them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it; all of it where it is not a DTensor (whose module is slow to import)."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def spread_like(part: Tensor, reference: Tensor, placements: Sequence[Any] | None = None) -> Tensor:
    """This process's `part` as a DTensor of the reference's mesh; as it is where the reference is no DTensor.

    placements: how it is divided; None: it has the reference's shape, and is divided as that. An axis that is divided
    is as long as the reference's.
    """
    if not hasattr(reference, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(reference, DTensor)
    if placements is None:
        return DTensor.from_local(
            part,
            reference.device_mesh,
            reference.placements,
            run_check=False,
            shape=reference.shape,
            stride=reference.stride(),
        )
    divided = [any(p.is_shard(axis) for p in placements) for axis in range(part.dim())]
    sizes = [reference.shape[axis] if divided[axis] else size for axis, size in enumerate(part.shape)]
    stride = torch.empty(sizes, device="meta").stride()
    return DTensor.from_local(
        part, reference.device_mesh, placements, run_check=False, shape=torch.Size(sizes), stride=stride
    )


def empty_like(
    reference: Tensor, shape: Sequence[int], dtype: torch.dtype, placements: Sequence[Any] | None = None
) -> Tensor:
    """An empty tensor of this whole shape on the reference's device, spread as `spread_like` spreads."""
    if not hasattr(reference, "placements"):
        return torch.empty(*shape, dtype=dtype, device=reference.device)
    from torch.distributed.tensor import DTensor, empty

    assert isinstance(reference, DTensor)
    placements = reference.placements if placements is None else placements
    return empty(*shape, dtype=dtype, device_mesh=reference.device_mesh, placements=placements)


def own_part(whole: Tensor, reference: Tensor) -> Tensor:
    """What this process holds of a tensor that every process has as a whole, when it is divided as the reference."""
    if not hasattr(reference, "placements"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    return distribute_tensor(whole, reference.device_mesh, reference.placements, src_data_rank=None).to_local()


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Root of the sum of all squares, () float32; NaN or infinity when any element is not finite.

    Collective where some are DTensors; equal on all processes where their copies are.
    """
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm([local(t) for t in tensors], dtype=torch.float32)
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for tensor, norm in zip(tensors, norms, strict=True):
        by_groups.setdefault(_sharding_groups(tensor), []).append(norm)
    totals = []
    for groups, own in by_groups.items():
        norm = torch.linalg.vector_norm(torch.stack(own))
        if groups:
            squares = norm.square()
            for group in groups:
                dist.all_reduce(squares, group=group)
            norm = squares.sqrt()
        totals.append(norm)
    return torch.linalg.vector_norm(torch.stack(totals)) if len(totals) > 1 else totals[0]


def _sharding_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The processes among which it is divided, one group for every axis of its mesh; none for a whole tensor."""
    placements = getattr(tensor, "placements", ())
    mesh = getattr(tensor, "device_mesh", None)
    return tuple(mesh.get_group(axis) for axis, p in enumerate(placements) if p.is_shard()) if mesh is not None else ()
