"""The processes that write or read a checkpoint together. Without torch.distributed it is one, and nothing waits."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from visionmoe.distributed.world import gather

T = TypeVar("T")
Group = Any  # a dist.ProcessGroup, or None: all processes of the job


def rank_of(group: Group) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def together(work: Callable[[], T], group: Group) -> list[T]:
    """Does `work` on every process and returns the results by rank. Collective.

    An error on one of them is raised on all, so that none waits for another that has given up: its own where it has
    one, else an error of the same kind (OSError, ValueError, RuntimeError) of one line that names the rank.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    outcomes = gather((result, None if error is None else (_kind(error), one_line(error))), group)
    if error is not None:
        raise error
    for rank, (_, fault) in enumerate(outcomes):
        if fault is not None:
            kind, text = fault
            raise {"OSError": OSError, "ValueError": ValueError}.get(kind, RuntimeError)(f"rank {rank}: {text}")
    return [result for result, _ in outcomes]  # type: ignore[misc]


def by_first(work: Callable[[], T], group: Group) -> T:
    """Does `work` on the first process alone and returns its result on all. Collective, errors as in `together`."""
    return together(lambda: work() if rank_of(group) == 0 else None, group)[0]  # type: ignore[return-value]


def share_out(sizes: list[int], candidates: list[list[int]], count: int) -> list[int]:
    """Gives each of several pieces of work, of these sizes, to one of its candidates among `count` processes, the large
    ones first and always to the one that has the least so far. The same everywhere, without communication."""
    loads, chosen = [0] * count, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        chosen[number] = min(candidates[number], key=lambda rank: (loads[rank], rank))
        loads[chosen[number]] += max(1, sizes[number])
    return chosen


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _kind(error: Exception) -> str:
    return (
        "OSError" if isinstance(error, OSError) else "ValueError" if isinstance(error, ValueError) else "RuntimeError"
    )
