"""Batches shared by the processes of a job, and what they made of them put together again.

Process r of W takes the whole batches number r, r + W, r + 2W, ... of the list that one process would run: images of a
batch compete for the experts' places, so other batches would give other results. Every batch belongs to one process,
the last, smaller one too, and results are put together in the order of the batches: they are those of one process.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.data.loader import EvalLoader
from visionmoe.distributed.world import current, from_first, gather, gather_tensors
from visionmoe.evaluate.forward import Loader, autocast_context, prepare


@dataclass(frozen=True)
class Share:
    """One of this process's batches. number: among all. images (B, C, H, W), labels, indices (B,).

    progress: how many images all processes together have done after it more than before it.
    """

    number: int
    images: Tensor
    labels: Tensor
    indices: Tensor
    progress: int


def shared_batches(model: nn.Module, loader: Loader, *, start: int = 0, autocast: bool = False) -> Iterator[Share]:
    """This process's batches from number `start` on. It must be read to its end, on every process.

    A model whose parameters are spread over the processes can only run on all of them at once. Where this process has
    fewer batches than the first one, the iterator then runs black images at its end, whose results nobody sees:
    autocast must be that of the other calls.
    """
    world, done = current(), 0
    total = len(loader) if isinstance(loader, EvalLoader) else 0
    for number, batch in _numbered(loader, start):
        total = total if isinstance(loader, EvalLoader) else number + 1
        if (number - start) % world.size == world.rank:
            yield Share(number, *batch, progress=_progress(loader, number, len(batch[0])))
            done += 1
    if world.size > 1 and is_spread(model):
        for _ in range(-(-(total - start) // world.size) - done):
            with autocast_context(model, autocast):
                model(prepare(model, _black(model, loader)))


def is_spread(model: nn.Module) -> bool:
    """Whether parts of its parameters are in other processes, so that its forward pass is collective."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


@dataclass(frozen=True)
class Segment:
    """A few batches, up to number `stop` - 1, of all processes; `batches` are this one's and must be read first."""

    stop: int
    batches: Iterator[Share]


def segments(
    model: nn.Module, loader: EvalLoader, *, start: int, seconds: float, autocast: bool = False
) -> Iterator[Segment]:
    """`shared_batches` in pieces, the same on all processes, after each of which they can put their results together.

    One process alone makes a segment of every batch; several make ones that take about `seconds`. Collective.
    """
    world, total = current(), len(loader)
    own = _Waiting(shared_batches(model, loader, start=start, autocast=autocast), world.size, total)
    rounds = total if is_spread(model) else 1  # black images run at the end alone
    while start < total:
        began, stop = time.monotonic(), min(total, start + rounds * world.size)
        yield Segment(stop, own.until(stop))
        if world.size > 1:
            per_round = max(time.monotonic() - began, 1e-3) / rounds
            rounds = from_first(max(1, min(2 * rounds, int(seconds / per_round))))
        start = stop


class _Waiting:
    """Batches, each of which is held back until its segment comes."""

    def __init__(self, batches: Iterator[Share], step: int, total: int) -> None:
        self.batches, self.step, self.total = batches, step, total
        self.next: Share | None = None

    def until(self, stop: int) -> Iterator[Share]:
        """Those whose number is below `stop`. One of the next segment is read early only where a batch was left out."""
        while True:
            share = self.next or next(self.batches, None)
            self.next = share
            if share is None or share.number >= stop:
                return
            self.next = None
            yield share
            if share.number + self.step >= stop and stop < self.total:
                return


def rows_in_order(rows: Mapping[int, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What all processes made of their batches, in the order of the batches, on every process. Collective.

    rows: by the number of a batch, some tensors (B, ...) on the CPU. Returns as many tensors (N, ...); none without
    any batch.
    """
    columns = max(gather(max(map(len, rows.values()), default=0)))
    lengths = gather({number: len(parts[0]) for number, parts in rows.items()})
    found = []
    for column in range(columns):
        own = torch.cat([parts[column] for parts in rows.values()]) if rows else torch.zeros(0)
        pieces: dict[int, Tensor] = {}
        for numbers, tensor in zip(lengths, gather_tensors(own), strict=True):
            if numbers:
                pieces |= zip(numbers, tensor.split(list(numbers.values())), strict=True)
        found.append(torch.cat([pieces[number] for number in sorted(pieces)]))
    return tuple(found)


def broken_of_all(loader: Loader) -> dict[str, str]:
    """Names of the broken images that any process met, and what is wrong with them. Collective.

    ValueError where they are more than the loader's max_broken.
    """
    if isinstance(loader, EvalLoader):
        loader.merge_broken()
    return dict(getattr(loader, "broken", {}))


def _numbered(loader: Loader, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
    """Batches with their numbers: of an EvalLoader only this process's, else all."""
    world = current()
    if isinstance(loader, EvalLoader):
        for batch in loader.batches(start + world.rank, world.size):
            yield int(batch[2][0]) // loader.config.eval_batch_size, batch  # batches without a whole image are left out
        return
    for number, batch in enumerate(loader):
        if number >= start:
            yield number, batch


def _progress(loader: Loader, number: int, images: int) -> int:
    """Images of this round of batches, one of each process."""
    world = current()
    if world.size == 1:
        return images
    if not isinstance(loader, EvalLoader):
        return images * world.size
    size, first = loader.config.eval_batch_size, number - world.rank
    return min(loader.num_images, (first + world.size) * size) - first * size


def _black(model: nn.Module, loader: Loader) -> Tensor:
    """As many black images as a whole batch has, so that no capacity rounds to nothing that does not elsewhere."""
    config: Any = getattr(model, "config", None)
    count = min(loader.config.eval_batch_size, loader.num_images) if isinstance(loader, EvalLoader) else 1
    return torch.full((count, config.in_channels, *config.image_hw), -1.0)
