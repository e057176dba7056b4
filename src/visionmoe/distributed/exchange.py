"""Expert parallelism: rows travel to the processes that hold their experts, and back.

Every process sends the buffers of all experts, of fixed capacity, so all messages are equally long and no counts are
exchanged. On GPUs the experts are done in a few parts: while one part is computed, the others are on their way, forward
and backward. Between CPUs one message is faster, because sending it takes the cores from the computation.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PARTS = {"cuda": 4}  # of a process's experts, each a message of its own; elsewhere 1


class ExpertExchange:
    """Rows of E experts, of which every process of `group` holds E / size neighbours, in the order of the ranks.

    parts: messages in which they travel, the same on all processes.
    """

    def __init__(self, group: dist.ProcessGroup, parts: int) -> None:
        self.group, self.parts = group, parts
        self.size = dist.get_world_size(group)

    def __call__(self, rows: Tensor, run: Callable[[Tensor, slice], Tensor], *, equal: bool) -> Tensor:
        """The experts' results for this process's rows. (E, N, D) -> (E, N, D).

        run(rows (e, N', D), experts): own experts number experts.start ... on the rows that all processes have for
        them. equal: N is the same everywhere, as in training; else the processes agree on the largest first.
        """
        own, filled = rows.shape[1], rows
        if not equal:
            filled = F.pad(rows, (0, 0, 0, self._most(own, rows.device) - own))
        local = rows.shape[0] // self.size
        by_owner = filled.view(self.size, local, *filled.shape[1:])  # (E, N, D) -> (P, e, N, D)
        parts = _split(local, self.parts)
        there = [_start(by_owner[:, part].contiguous(), self.group) for part in parts]
        back = []
        for part, (sent, trip) in zip(parts, there, strict=True):
            arrived = _Finish.apply(sent, trip)  # (P, e, N, D), by the process that sent it
            results = run(arrived.transpose(0, 1).flatten(1, 2), part)
            results = results.unflatten(1, (self.size, -1)).transpose(0, 1)
            back.append(_start(results.contiguous(), self.group))
        done = [_Finish.apply(sent, trip) for sent, trip in back]
        # (P, e', N, D) -> (P, e, N, D) -> (E, N, D)
        out = (done[0] if len(done) == 1 else torch.cat(done, dim=1)).flatten(0, 1)
        return out if equal else out[:, :own]

    def _most(self, own: int, device: torch.device) -> int:
        most = torch.tensor(own, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)


class _Trip:
    """A message on its way, and its gradient's on the way back; both keep what they send until it has arrived."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.work: Any = None
        self.sent: Tensor | None = None

    def send(self, x: Tensor) -> Tensor:
        """What arrives in the place of x (P, ...), once `wait` has returned."""
        self.sent, out = x, torch.empty_like(x)
        self.work = dist.all_to_all_single(out, x, group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        self.work.wait()
        self.work = self.sent = None


def _start(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, _Trip]:
    trip = _Trip(group)
    return _Start.apply(x, trip), trip


class _Start(torch.autograd.Function):
    """Sends. Its gradient was sent by `_Finish` and is waited for here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.send(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.wait()
        return grad, None


class _Finish(torch.autograd.Function):
    """Waits. Its gradient is sent, and arrives when `_Start`'s backward has waited for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.wait()
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.send(grad.contiguous()), None


def _split(count: int, parts: int) -> list[slice]:
    """0 ... count-1 in at most so many runs of nearly equal length."""
    parts = min(parts, count)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
